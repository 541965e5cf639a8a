"""The operator inside autograd: every derivative there is, and nothing computed or kept that was not asked for.

x (*lead, K)   weight (N, K)   lora_a (R, K)   lora_b (N, R)   bias, lora_bias (N,)   y, dy (*lead, N)   M = rows of x
"""

import itertools

import pytest
import torch
from accuracy import GRADIENTS, STRATEGIES, Case, block_sizes, make_inputs, run
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_lora import lora_linear, reference

SUBSETS = [subset for n in range(1, 6) for subset in itertools.combinations(GRADIENTS, n)]


def leaves(wanted=GRADIENTS, lead=(2, 2), N=3, K=4, R=2, regime="float64", layout="contiguous", p=0.0):
    """The tensors of a call by name, those in ``wanted`` requiring grad; no dy."""
    inputs = make_inputs(Case(lead, N=N, K=K, R=R, regime=regime, layout=layout, biases="both", p=p))
    del inputs["dy"]
    for name in wanted:
        inputs[name] = inputs[name].detach().requires_grad_()
    return inputs


def function_of(names, inputs, p=0.0, operator=lora_linear, strategy="torch"):
    """The operator as a function of the tensors ``names`` alone, with a fixed mask."""

    def function(*tensors):
        arguments = inputs | dict(zip(names, tensors, strict=True))
        return operator(**arguments, scale=1.5, dropout_p=p, seed=11, strategy=strategy)

    return function


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 2)], ids=str)
def test_gradcheck_of_everything(lead, p):
    inputs = leaves(lead=lead)
    tensors = [inputs[name] for name in GRADIENTS]
    function = function_of(GRADIENTS, inputs, p)
    assert gradcheck(function, tensors, check_batched_grad=True, check_forward_ad=True, check_undefined_grad=False)
    assert gradgradcheck(function, tensors, check_batched_grad=True)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_gradcheck_of_every_subset(wanted, p):
    inputs = leaves(wanted, lead=(3,))
    tensors = [inputs[name] for name in wanted]
    assert gradcheck(function_of(wanted, inputs, p), tensors)
    assert gradgradcheck(function_of(wanted, inputs, p), tensors)


@pytest.mark.parametrize("layout", ["transposed", "permuted", "strided", "offset", "expanded-x"])
def test_gradcheck_of_views(layout):
    wanted = GRADIENTS if layout != "expanded-x" else GRADIENTS[1:]  # a leaf cannot overlap itself
    inputs = leaves(wanted, lead=(2, 3), layout=layout)
    tensors = [inputs[name] for name in wanted]
    assert gradcheck(function_of(wanted, inputs, 0.4), tensors)
    assert gradgradcheck(function_of(wanted, inputs, 0.4), tensors)


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_what_requires_grad_gets_one(wanted, strategy):
    inputs = leaves(wanted, regime="float32")
    y = lora_linear(**inputs, dropout_p=0.4, strategy=strategy)
    y.sum().backward()
    for name, t in inputs.items():
        assert (t.grad is not None) == (name in wanted), name
        assert t.grad is None or (t.grad.dtype, t.grad.shape) == (t.dtype, t.shape)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_create_graph_does_not_change_the_gradients(wanted, p):
    """The differentiable backward is another expression of the same gradients, to float64's rounding."""
    inputs = leaves(wanted, lead=(5,))
    tensors = [inputs[name] for name in wanted]
    y = function_of(wanted, inputs, p)(*tensors)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    plain = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    differentiable = torch.autograd.grad(y, tensors, dy, create_graph=True)
    for name, ours, theirs in zip(wanted, plain, differentiable, strict=True):
        torch.testing.assert_close(
            ours, theirs.detach(), rtol=1e-14, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("regime", ["bfloat16", "bfloat16+float32", "float16+float32"])
@pytest.mark.parametrize(("wanted", "p"), [(GRADIENTS, 0.4), (("lora_b",), 0.0)], ids=["all", "lora_b"])
def test_create_graph_in_low_precision_keeps_the_dtypes_and_the_accuracy(regime, wanted, p):
    case = Case((17,), N=13, K=11, R=3, regime=regime, p=p, biases="both")
    inputs = make_inputs(case)
    expected = run(reference.lora_linear, case, {name: t.double() for name, t in inputs.items()}, 11)
    dy = inputs.pop("dy")
    tensors = [inputs[name].requires_grad_() for name in wanted]
    y = lora_linear(**inputs, scale=1.625, dropout_p=p, seed=11)
    with torch.autocast("cpu", torch.bfloat16):  # which must not lower what the backward does
        gradients = torch.autograd.grad(y, tensors, dy, create_graph=True)
    for name, gradient, tensor in zip(wanted, gradients, tensors, strict=True):
        assert gradient.dtype == tensor.dtype
        truth = expected[f"d{name}"]
        rounding = torch.finfo(gradient.dtype).eps
        assert (gradient.double() - truth).abs().max() <= 4 * rounding * truth.abs().max(), name


def test_double_backward_through_a_gradient_penalty():
    """The use people make of it: the norm of dx in the loss."""
    inputs = leaves(("x", "lora_a", "lora_b"), lead=(5,))
    tensors = [inputs[name] for name in ("x", "lora_a", "lora_b")]

    def penalty(operator):
        y = function_of((), inputs, 0.4, operator)()
        (dx,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
        return torch.autograd.grad(y.sum() + dx.norm(), tensors)

    for ours, expected in zip(penalty(lora_linear), penalty(reference.lora_linear), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_many_upstream_gradients_at_once():
    inputs = leaves(lead=(3,), regime="float32")
    tensors = [inputs[name] for name in GRADIENTS]
    y = function_of((), inputs, 0.4)()
    many = torch.randn(6, *y.shape, generator=torch.Generator().manual_seed(0))
    batched = torch.autograd.grad(y, tensors, many, is_grads_batched=True, retain_graph=True)
    for k, dy in enumerate(many):
        for ours, expected in zip(batched, torch.autograd.grad(y, tensors, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(ours[k], expected)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
class TestTransforms:
    """torch.func on the operator is torch.func on the formula, whatever strategy was asked for."""

    def functions(self, p, strategy):
        names, inputs = ("x", "lora_a", "lora_b"), leaves((), lead=(3,), regime="float32")
        ours = function_of(names, inputs, p, lora_linear, strategy)
        return ours, function_of(names, inputs, p, reference.lora_linear), [inputs[name] for name in names]

    def same(self, transform, p, strategy):
        ours, formula, tensors = self.functions(p, strategy)
        torch.testing.assert_close(transform(ours, tensors), transform(formula, tensors))

    def test_grad(self, p, strategy):
        def transform(f, tensors):
            return torch.func.grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2))(*tensors)

        self.same(transform, p, strategy)

    def test_vmap(self, p, strategy):
        def transform(f, tensors):
            stacked = [torch.stack([t, 2 * t]) for t in tensors]
            return torch.func.vmap(f)(*stacked), torch.func.vmap(f, in_dims=(0, None, None))(stacked[0], *tensors[1:])

        self.same(transform, p, strategy)

    def test_jvp(self, p, strategy):
        def transform(f, tensors):
            return torch.func.jvp(f, tuple(tensors), tuple(t.cos() for t in tensors))

        self.same(transform, p, strategy)

    def test_per_sample_gradients(self, p, strategy):
        def transform(f, tensors):
            per_sample = torch.func.grad(lambda x, a, b: f(x, a, b).square().sum(), argnums=(1, 2))
            return torch.func.vmap(per_sample, in_dims=(0, None, None))(*tensors)

        self.same(transform, p, strategy)

    def test_hessian(self, p, strategy):
        def transform(f, tensors):
            return torch.func.hessian(lambda a: f(tensors[0], a, tensors[2]).square().sum())(tensors[1])

        self.same(transform, p, strategy)

    def test_forward_mode(self, p, strategy):
        def transform(f, tensors):
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(t, t.cos()) for t in tensors]
                return tuple(forward_ad.unpack_dual(f(*duals)))

        self.same(transform, p, strategy)


def test_the_module_under_functional_call():
    """Factors handed in from outside, as meta-learning does it."""
    inputs = leaves((), lead=(3,))

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_a, self.lora_b = (torch.nn.Parameter(inputs[name]) for name in ("lora_a", "lora_b"))

        def forward(self, x):
            return lora_linear(x, inputs["weight"], self.lora_a, self.lora_b)

    def loss(factors):
        return torch.func.functional_call(Layer(), factors, (inputs["x"],)).square().sum()

    factors = {name: inputs[name] for name in ("lora_a", "lora_b")}
    gradients = torch.func.grad(loss)(factors)
    tensors = [factors[name].clone().requires_grad_() for name in factors]
    expected = torch.autograd.grad(loss(dict(zip(factors, tensors, strict=True))), tensors)
    torch.testing.assert_close(tuple(gradients.values()), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("regime", ["float32", "bfloat16+float32"])
def test_checkpointing_repeats_the_mask(regime, use_reentrant, strategy):
    """The seed comes from torch's generator, so the second forward of a checkpoint draws it again."""

    def gradients(call):
        inputs = leaves(lead=(9,), N=7, K=7, R=3, regime=regime)

        def block(x):
            for _ in range(2):
                x = lora_linear(**(inputs | {"x": x}), dropout_p=0.5, strategy=strategy)
            return x

        torch.manual_seed(21)
        y = call(block, inputs["x"])
        y.float().square().sum().backward()
        return [y.detach()] + [inputs[name].grad for name in GRADIENTS]

    plain = gradients(lambda block, x: block(x))
    recomputed = gradients(lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant))
    for ours, expected in zip(recomputed, plain, strict=True):
        assert torch.equal(ours, expected)


def kept_bytes(inputs, call):
    """Bytes of storage autograd keeps for the backward beyond those of the tensors in ``inputs``; and the result."""
    own = {t.untyped_storage().data_ptr() for t in inputs.values()}
    kept: dict[int, int] = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    return sum(kept.values()), y


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", itertools.product((torch.float32, torch.bfloat16), repeat=2), ids=str)
def test_under_autocast_a_gradient_does_not_depend_on_which_others_are_wanted(dtypes, p):
    """A CPU's arithmetic follows the dtypes of x and W, which the backward must know without the gradient of x too."""
    of_x, of_weight = dtypes
    x, weight = torch.randn(300, 64).to(of_x), torch.randn(48, 64).to(of_weight)
    grads = []
    for need_x in (False, True):
        a, b = (
            torch.linspace(-1, 2, 4 * n).view(shape).requires_grad_() for n, shape in ((64, (4, 64)), (48, (48, 4)))
        )
        with torch.autocast("cpu", torch.bfloat16):
            y = lora_linear(x.clone().requires_grad_(need_x), weight, a, b, 2.0, dropout_p=p, seed=3)
        grads.append(torch.autograd.grad(y.float().square().sum(), (a, b)))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "permuted"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("regime", ["float32", "bfloat16", "bfloat16+float32", "autocast", "autocast-x16"])
def test_kept_for_the_backward_is_s_and_a_seed(regime, p, layout, strategy):
    case = Case((3, 43), N=61, K=67, R=4, regime=regime, layout=layout, biases="both")
    inputs = make_inputs(case)
    del inputs["dy"]
    for name in GRADIENTS:
        inputs[name].requires_grad_()
    from accuracy import REGIMES

    with REGIMES[regime].active():
        kept, y = kept_bytes(inputs, lambda: lora_linear(**inputs, scale=2.0, dropout_p=p, strategy=strategy))
    assert kept <= case.rows * case.R * 4 + 64
    # Nor is anything kept where the hooks do not see it.
    assert not [name for name, value in vars(y.grad_fn).items() if isinstance(value, torch.Tensor)]


def test_an_s_that_one_gemm_rounded_is_kept_as_it_was_rounded():
    inputs = leaves(lead=(43,), regime="bfloat16")
    with block_sizes("native"):
        kept, _ = kept_bytes(inputs, lambda: lora_linear(**inputs, scale=2.0))
    assert kept == 43 * 2 * 2


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (("x",), {"weight", "lora_a", "lora_b"}),
        (("lora_a",), {"x", "lora_b"}),
        (("lora_b",), {"s", "lora_a"}),
        (("bias",), set()),
        (("lora_bias",), set()),
        (("lora_a", "lora_b"), {"x", "s", "lora_a", "lora_b"}),
    ],
)
def test_nothing_is_kept_for_a_gradient_nobody_asked_for(wanted, names):
    inputs = leaves(wanted, lead=(9,), regime="float32")
    own = {t.untyped_storage().data_ptr(): name for name, t in inputs.items()}
    kept = set()

    def pack(t):
        kept.add(own.get(t.untyped_storage().data_ptr(), "s"))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(**inputs)
    assert kept <= names


class Multiplications(TorchDispatchMode):
    """Counts the multiply-adds of every matrix product."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:] if name == "mm" else args[1:3]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_no_work_for_a_gradient_nobody_asked_for(wanted, p):
    M, N, K, R = 8, 16, 32, 4
    inputs = leaves(wanted, lead=(M,), N=N, K=K, R=R, regime="float32")
    y = lora_linear(**inputs, dropout_p=p, strategy="torch")
    expected = M * N * R * ("lora_b" in wanted)  # db
    expected += M * N * R * ("x" in wanted or "lora_a" in wanted)  # ds
    expected += M * K * R * ("lora_a" in wanted)  # da
    expected += (M * N * K + M * K * R) * ("x" in wanted)  # dx
    with Multiplications() as multiplications:
        y.backward(torch.ones_like(y))
    assert multiplications.count == expected


def test_inputs_may_be_overwritten_where_they_are_not_kept():
    inputs = leaves(("lora_b",), lead=(3,))
    y = lora_linear(**inputs)
    inputs["x"].zero_()  # only s is needed
    y.sum().backward()


def test_overwriting_what_is_kept_is_noticed():
    inputs = leaves(("lora_a", "lora_b"), lead=(3,))
    y = lora_linear(**inputs)
    inputs["x"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_output_may_be_overwritten():
    """y is not kept, so an activation may work in place on it."""
    inputs = leaves(lead=(3,))
    y = lora_linear(**inputs)
    y.relu_().sum().backward()
    assert inputs["lora_a"].grad is not None


def test_a_second_backward_over_a_retained_graph_gives_the_same():
    inputs = leaves(lead=(3,), p=0.4)
    tensors = [inputs[name] for name in GRADIENTS]
    y = lora_linear(**inputs, dropout_p=0.4)
    first = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
    for ours, expected in zip(torch.autograd.grad(y.sum(), tensors), first, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("regime", ["float32", "bfloat16+float32"])
def test_a_transform_around_the_backward_alone(regime, p):
    """The forward ran before: forward-over-reverse, and one vmap over many gradients of the same graph."""
    case = Case((300,), N=48, K=64, R=4, regime=regime)  # no longer tiny
    inputs = make_inputs(case)
    dy, wanted = inputs.pop("dy"), ("x", "lora_a", "lora_b")
    tensors = [inputs[name].requires_grad_() for name in wanted]
    y = lora_linear(**inputs, scale=0.5, dropout_p=p, seed=7)
    other = torch.randn_like(dy)
    plain = torch.autograd.grad(y, tensors, other, retain_graph=True)
    with forward_ad.dual_level():
        duals = torch.autograd.grad(y, tensors, forward_ad.make_dual(dy, other), retain_graph=True)
        tangents = [forward_ad.unpack_dual(grad).tangent for grad in duals]
    mapped = torch.vmap(lambda v: torch.autograd.grad(y, tensors, v, retain_graph=True))(torch.stack([dy, other]))
    for one, tangent, many in zip(plain, tangents, mapped, strict=True):
        rounding = (2e-2 if one.dtype == torch.bfloat16 else 1e-5) * one.abs().max()
        assert (tangent - one).abs().max() <= rounding
        assert (many[1] - one).abs().max() <= rounding


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_weight_made_in_inference_mode_is_not_saved_where_no_dx_is_wanted(p, autocast):
    inputs = leaves(("lora_a", "lora_b"), regime="float32")
    with torch.inference_mode():
        inputs["weight"] = inputs["weight"].clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = lora_linear(**inputs, dropout_p=p)
    y.float().sum().backward()
    assert inputs["lora_a"].grad is not None
