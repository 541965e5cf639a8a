"""The operator under tracing: torch.compile without graph breaks, export, fake tensors, and opcheck on both ops.

x (*lead, K)   weight (N, K)   lora_a (R, K)   lora_b (N, R)   bias, lora_bias (N,)   y, dy (*lead, N)
"""

import functools
import itertools

import pytest
import torch
from accuracy import GRADIENTS, REGIMES, STRATEGIES, Case, make_inputs
from torch import nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fused_lora
from fused_lora import lora_linear, reference

N, K, R = 13, 11, 3


@pytest.fixture
def poison():
    """Traced code must see torch's own allocators."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs():
    """How many graphs have been compiled since the test began."""
    return counters["stats"]["unique_graphs"]


def call(inputs, **arguments):
    tensors = {name: t for name, t in inputs.items() if name != "dy"}
    return lora_linear(**tensors, **arguments)


def gradients(inputs, function, dy):
    """y and the gradients of ``function(inputs)``."""
    inputs = inputs | {name: inputs[name].detach().requires_grad_() for name in GRADIENTS}
    y = function(inputs)
    return y, torch.autograd.grad(y, [inputs[name] for name in GRADIENTS], dy)


def assert_same(ours, expected, **tolerance):
    torch.testing.assert_close(ours[0], expected[0], **tolerance)
    for mine, theirs in zip(ours[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_one_graph_and_the_same_bits(p, strategy, backend):
    inputs = make_inputs(Case((17,), N=N, K=K, R=R, biases="both"))

    def function(tensors):
        return call(tensors, scale=1.5, dropout_p=p, seed=5, strategy=strategy)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    expected = gradients(inputs, function, inputs["dy"])
    assert_same(gradients(inputs, compiled, inputs["dy"]), expected, rtol=0, atol=0)
    assert graphs() == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_rows_are_dynamic(p, backend):
    """0 and 1 rows included. One graph serves every count from 2 on; torch always makes its own for 0 and for 1."""

    def function(tensors):
        return call(tensors, scale=1.5, dropout_p=p, seed=5)

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for rows in (17, 5, 129, 2, 1, 0, 3, 64, 1, 0):
        inputs = make_inputs(Case((rows,), N=N, K=K, R=R, biases="both"))
        expected = gradients(inputs, function, inputs["dy"])
        assert_same(gradients(inputs, compiled, inputs["dy"]), expected, rtol=0, atol=0)
    assert graphs() <= 3


def test_marked_dynamic_rows_do_not_specialise():
    compiled = torch.compile(lambda tensors: call(tensors, dropout_p=0.5, seed=5), backend="aot_eager", fullgraph=True)
    for batch, length in ((2, 17), (3, 5), (7, 129)):
        inputs = make_inputs(Case((batch, length), N=N, K=K, R=R))
        inputs = {name: t for name, t in inputs.items() if t is not None}
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(inputs["x"], dim)
        assert torch.equal(compiled(inputs), call(inputs, dropout_p=0.5, seed=5))
    assert graphs() == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_another_scale_compiles_nothing(backend):
    inputs = make_inputs(Case((17,), N=N, K=K, R=R, biases="both"))
    compiled = torch.compile(lambda scale: call(inputs, scale=scale), backend=backend, fullgraph=True)
    for value in (1.0, 2.0, -0.5, 0.0):
        scale = torch.tensor(value)
        assert torch.equal(compiled(scale), call(inputs, scale=scale))
    assert graphs() == 1


def test_another_seed_compiles_nothing():
    inputs = make_inputs(Case((17,), N=N, K=K, R=R, biases="both"))
    compiled = torch.compile(lambda seed: call(inputs, dropout_p=0.5, seed=seed), backend="aot_eager", fullgraph=True)
    for seed in (torch.tensor(3), torch.tensor(2**40), torch.tensor(-1)):
        assert torch.equal(compiled(seed), call(inputs, dropout_p=0.5, seed=seed))
    assert graphs() == 1


def test_every_call_of_a_compiled_layer_draws_a_new_mask():
    inputs = make_inputs(Case((17,), N=N, K=K, R=R))
    compiled = torch.compile(lambda: call(inputs, dropout_p=0.5), backend="inductor", fullgraph=True)
    torch.manual_seed(3)
    first, second = compiled(), compiled()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(compiled(), first)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_forward_and_backward_of_a_compiled_layer_use_one_mask(backend):
    """With identities for factors, y and dx are the mask itself."""
    x = torch.ones(9, K, requires_grad=True)
    a, b = torch.eye(K), torch.eye(K)

    def function(x):
        return lora_linear(x, torch.zeros(K, K), a, b, dropout_p=0.5)

    y = torch.compile(function, backend=backend, fullgraph=True)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert set(y.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "float64"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_has_the_dtypes_and_bits_of_eager_in_every_regime(backend, regime):
    inputs = make_inputs(Case((17,), N=N, K=K, R=R, regime=regime, biases="both"))

    def function(tensors):
        with REGIMES[regime].active():
            return call(tensors, scale=1.5, dropout_p=0.5, seed=5)

    expected = gradients(inputs, function, inputs["dy"])
    ours = gradients(inputs, torch.compile(function, backend=backend, fullgraph=True), inputs["dy"])
    assert ours[0].dtype == expected[0].dtype == REGIMES[regime].output
    assert_same(ours, expected, rtol=0, atol=0)


class Block(nn.Module):
    """A network around the operator: a norm, two layers, an activation."""

    def __init__(self, p):
        super().__init__()
        torch.manual_seed(0)
        self.p = p
        self.norm = nn.LayerNorm(K)
        self.up, self.down = nn.Linear(K, N).requires_grad_(False), nn.Linear(N, K).requires_grad_(False)
        self.up_a, self.up_b = nn.Parameter(torch.randn(R, K)), nn.Parameter(torch.randn(N, R))
        self.down_a, self.down_b = nn.Parameter(torch.randn(R, N)), nn.Parameter(torch.randn(K, R))

    def forward(self, x):
        h = lora_linear(self.norm(x), self.up.weight, self.up_a, self.up_b, 0.5, self.up.bias, dropout_p=self.p, seed=3)
        h = nn.functional.gelu(h)
        return x + lora_linear(
            h, self.down.weight, self.down_a, self.down_b, 0.5, self.down.bias, dropout_p=self.p, seed=4
        )


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_network_trains_the_same_compiled(p, checkpointed):
    x = torch.randn(17, K, generator=torch.Generator().manual_seed(1))

    def train(compiled):
        block = Block(p)
        function = (lambda x: checkpoint(block, x, use_reentrant=False)) if checkpointed else block
        function = torch.compile(function, fullgraph=True) if compiled else function
        optimizer = torch.optim.SGD([t for t in block.parameters() if t.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss = function(x).square().mean()
            loss.backward()
            optimizer.step()
        return loss.detach(), [t.detach() for t in block.parameters()]

    assert_same(train(True), train(False))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_export_keeps_the_op_and_dynamic_rows(p, strict):
    block = Block(p)
    x = torch.randn(17, K)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: rows},), strict=strict)
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    ops = [node.target for graph in graphs for node in graph.nodes if node.op == "call_function"]
    assert ops.count(torch.ops.fused_lora.linear_forward.default) == 2
    for size in (17, 2, 130):
        x = torch.randn(size, K)
        assert torch.equal(program.module()(x), block(x))


def test_fake_tensors_have_the_real_shapes_dtypes_and_strides():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for regime in REGIMES:
        inputs = make_inputs(Case((2, 5), N=N, K=K, R=R, regime=regime, biases="both", layout="transposed"))
        with REGIMES[regime].active():
            real = gradients(inputs, lambda tensors: call(tensors, dropout_p=0.5), inputs["dy"])
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                fakes = {name: mode.from_tensor(t) for name, t in inputs.items()}
                fake = gradients(fakes, lambda tensors: call(tensors, dropout_p=0.5), fakes["dy"])
        for ours, expected in zip((fake[0], *fake[1]), (real[0], *real[1]), strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (expected.shape, expected.dtype, expected.stride())


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def op_arguments(regime, p, strategy, lead=(2, 5), scale_tensor=None):
    """The arguments of both ops, in order, for one call."""
    inputs = make_inputs(Case(lead, N=N, K=K, R=R, regime=regime, biases="both"))
    x, weight, bias, a, b, lora_bias, dy = (
        inputs[name] for name in ("x", "weight", "bias", "lora_a", "lora_b", "lora_bias", "dy")
    )
    seed = torch.tensor(5) if p else None
    output = REGIMES[regime].output
    forward = (x, weight, bias, a, b, lora_bias, 1.5, scale_tensor, seed, p, output, strategy)
    s = torch.ops.fused_lora.linear_forward(*forward)[1]
    dtypes = (x.dtype, a.dtype, bias.dtype)
    recast = x.dtype != output or weight.dtype != output
    backward = (dy, x, weight, a, b, s, 1.5, scale_tensor, seed, p, *dtypes, K, R, recast)
    return forward, backward


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("regime", list(REGIMES))
def test_opcheck(regime, p, strategy):
    if strategy == "triton" and regime == "float64":
        return  # the kernels refuse it; test_misuse.py holds the message
    forward, backward = op_arguments(regime, p, strategy)
    torch.library.opcheck(torch.ops.fused_lora.linear_forward.default, forward, test_utils=OPCHECKS)
    torch.library.opcheck(
        torch.ops.fused_lora.linear_backward.default, (*backward, [True] * 5, strategy), test_utils=OPCHECKS
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("need", list(itertools.product([False, True], repeat=5)), ids=str)
def test_opcheck_of_every_set_of_needs(need, strategy):
    _, backward = op_arguments("float32", 0.5, strategy)
    utils = ("test_schema", "test_faketensor")  # tracing sees the same op for every set
    torch.library.opcheck(
        torch.ops.fused_lora.linear_backward.default, (*backward, list(need), strategy), test_utils=utils
    )


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0, 3)], ids=str)
def test_opcheck_of_small_shapes_and_a_scale_tensor(lead):
    forward, backward = op_arguments("float32", 0.5, None, lead, torch.tensor(0.5))
    torch.library.opcheck(torch.ops.fused_lora.linear_forward.default, forward, test_utils=OPCHECKS)
    arguments = (*backward, [True] * 5, None)
    torch.library.opcheck(torch.ops.fused_lora.linear_backward.default, arguments, test_utils=OPCHECKS)


def test_a_changing_float_scale_breaks_no_graph():
    """Dynamo makes a changing float a symbol: a check that asked for its value would break the graph."""
    x, weight, a, b = torch.randn(5, 16), torch.randn(12, 16), torch.randn(3, 16), torch.randn(12, 3)
    compiled = torch.compile(lambda x, scale: lora_linear(x, weight, a, b, scale), fullgraph=True, backend="aot_eager")
    for scale in (0.3, 0.4, 0.5, -2.0):
        torch.testing.assert_close(compiled(x, scale), lora_linear(x, weight, a, b, scale))


def test_set_scale_between_forward_and_backward():
    layer = fused_lora.LoRALinear(16, 12)
    torch.nn.init.normal_(layer.lora_b)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 16)
    (expected,) = torch.autograd.grad(layer(x).sum(), layer.lora_a)
    y = compiled(x)
    layer.set_scale(0.1)
    (grad,) = torch.autograd.grad(y.sum(), layer.lora_a)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("regime", ["float32", "bfloat16+float32"])
def test_opcheck_with_gradients(regime, p):
    """The ops' own derivatives, which exported graphs and double backward through a compiled graph use."""
    forward, backward = op_arguments(regime, p, None)
    forward = tuple(leaf(t) if n in (0, 2, 3, 4, 5) else t for n, t in enumerate(forward))
    torch.library.opcheck(torch.ops.fused_lora.linear_forward.default, forward, test_utils=OPCHECKS)
    backward = tuple(leaf(t) if n in (0, 1, 3, 4) else t for n, t in enumerate(backward))
    arguments = (*backward, [True] * 5, None)
    torch.library.opcheck(torch.ops.fused_lora.linear_backward.default, arguments, test_utils=OPCHECKS)


def leaf(t):
    return t.detach().clone().requires_grad_()


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_can_be_trained(strict):
    layer = fused_lora.LoRALinear(16, 12, r=3, init_lora_weights=False)
    model, x = torch.nn.Sequential(layer, torch.nn.Linear(12, 5)), torch.randn(4, 16)
    exported = torch.export.export(model, (x,), strict=strict).module()
    exported(x).square().sum().backward()
    ours = {name: p.grad for name, p in exported.named_parameters()}
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (ours[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_double_backward_through_a_graph_that_autograd_sees(p):
    """``backend="eager"`` runs the ops under autograd: none of the second derivatives may be lost."""
    x, weight, a, b = torch.randn(5, 16), torch.randn(12, 16), torch.randn(3, 16), torch.randn(12, 3)
    tensors = [leaf(t) for t in (x, a, b)]

    def second(operator, wrap):
        y = wrap(lambda x: operator(x, weight, *tensors[1:], 0.5, dropout_p=p, seed=7).tanh())(tensors[0])
        grads = torch.autograd.grad(y.sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)

    expected = second(reference.lora_linear, lambda function: function)
    ours = second(lora_linear, lambda function: torch.compile(function, fullgraph=True, backend="eager"))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_selective_checkpointing_sees_one_operation(p):
    layer = fused_lora.LoRALinear(16, 12, r=3, lora_dropout=p, init_lora_weights=False)
    x, products = torch.randn(5, 16), [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

    def gradients(kept):
        torch.manual_seed(3)
        contexts = functools.partial(create_selective_checkpoint_contexts, kept)
        y = checkpoint(lambda x: layer(x).sin(), leaf(x), use_reentrant=False, context_fn=contexts)
        return torch.autograd.grad(y.sum(), (layer.lora_a, layer.lora_b))

    for kept in (products, [torch.ops.fused_lora.linear_forward.default]):
        torch.manual_seed(3)
        expected = torch.autograd.grad(layer(x).sin().sum(), (layer.lora_a, layer.lora_b))
        for one, other in zip(gradients(kept), expected, strict=True):
            assert torch.equal(one, other)


def test_make_fx_traces_the_ops():
    x, weight, a, b = torch.randn(5, 16), torch.randn(12, 16), torch.randn(3, 16), torch.randn(12, 3)
    graph = make_fx(lambda x, scale: lora_linear(x, weight, a, b, scale, dropout_p=0.5, seed=7))(x, torch.tensor(0.5))
    assert torch.ops.fused_lora.linear_forward.default in {node.target for node in graph.graph.nodes}
    torch.testing.assert_close(graph(x, torch.tensor(2.0)), lora_linear(x, weight, a, b, 2.0, dropout_p=0.5, seed=7))
