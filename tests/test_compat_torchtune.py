"""torchtune's LoRALinear as a drop-in: its formula, its checkpoints, its protocol, and what is not fused.

x (..., K)   weight (N, K)   bias (N,)   lora_a.weight (R, K)   lora_b.weight (N, R)   y (..., N)
"""

import copy
import inspect
import math
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from accuracy import REGIMES, compare, wide
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_lora import lora_linear
from fused_lora.compat import route
from fused_lora.compat import torchtune as compat

K, N, R, ALPHA = 61, 45, 6, 9.0
LoRALinear = compat.LoRALinear


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def checkpoint_of(weight_dtype=torch.float32, adapter_dtype=None, bias=True):
    """What torchtune saves for one layer: its keys and shapes, values of unit scale over their fan-in."""
    adapter_dtype = adapter_dtype or weight_dtype
    tensors = {"weight": torch.randn(N, K).div(K**0.5).to(weight_dtype)}
    if bias:
        tensors["bias"] = torch.randn(N).to(weight_dtype)
    tensors["lora_a.weight"] = torch.randn(R, K).div(K**0.5).to(adapter_dtype)
    tensors["lora_b.weight"] = torch.randn(N, R).div(R**0.5).to(adapter_dtype)
    return tensors


def make_layer(tensors=None, frozen=True, **settings):
    """A layer that has loaded a checkpoint."""
    tensors = checkpoint_of() if tensors is None else tensors
    layer = LoRALinear(K, N, R, ALPHA, use_bias="bias" in tensors, **settings)
    for name, t in tensors.items():
        layer.get_parameter(name).data = layer.get_parameter(name).data.to(t.dtype)
    assert list(layer.state_dict()) == list(tensors)
    layer.load_state_dict(tensors)
    if frozen:
        compat.set_trainable_params(layer, compat.get_adapter_params(layer))
    return layer


def formula(x, weight, a, b, bias=None):
    return F.linear(x, weight, bias) + (ALPHA / R) * F.linear(F.linear(x.to(a.dtype), a), b)


def exact(x, weight, bias, a, b):
    return formula(x, weight, a, b, bias)


def results(function, x, tensors, dy, dtype=None):
    """y, dx, da, db of ``function(x, weight, bias, a, b)`` on copies, cast to ``dtype``."""
    x, *tensors = (None if t is None else t.detach().to(dtype or t.dtype) for t in (x, *tensors))
    weight, bias, a, b = tensors
    wanted = [t.requires_grad_() for t in (x, a, b)]
    y = function(x, weight, bias, a, b)
    return dict(zip(("y", "dx", "da", "db"), (y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))), strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("regime", ["float32", "bfloat16", "float16", "bfloat16+float32", "autocast", "autocast-x16"])
def test_as_accurate_as_the_formula(regime, bias):
    kind, errors = REGIMES[regime], {}
    for _ in range(4):
        layer = make_layer(checkpoint_of(kind.weight, kind.adapters, bias))
        tensors = (layer.weight, layer.bias, layer.lora_a.weight, layer.lora_b.weight)
        x, dy = torch.randn(17, K).to(kind.x), torch.randn(17, N)

        def ours(x, weight, bias, a, b, layer=layer):
            return torch.func.functional_call(layer, {"lora_a.weight": a, "lora_b.weight": b}, x)

        def plain(x, weight, bias, a, b, output=kind.output):
            return formula(x, weight, a, b, bias).to(output)

        with kind.active():
            assert not route.refusal(x, layer.weight, layer.bias, *tensors[2:], layer.dropout)
            found, other = results(ours, x, tensors, dy), results(plain, x, tensors, dy)
        truth = results(exact, x, tensors, dy, torch.float64)
        for name, t in found.items():
            assert t.dtype == other[name].dtype
            errors.setdefault((name, t.dtype), []).append((wide(t), wide(other[name]), wide(truth[name])))
    complaints = [compare(name, draws, dtype) for (name, dtype), draws in errors.items()]
    assert not any(complaints), "\n".join(complaints)


class TestSurface:
    def test_signature_and_attributes(self):
        wanted = "(in_dim, out_dim, rank, alpha, dropout=0.0, use_bias=False, quantize_base=False, "
        wanted += "**quantization_kwargs)"
        signature = inspect.signature(LoRALinear)
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == wanted
        layer = LoRALinear(in_dim=K, out_dim=N, rank=R, alpha=ALPHA, dropout=0.25)
        found = {n: getattr(layer, n) for n in ("in_dim", "out_dim", "rank", "alpha", "use_bias", "_quantize_base")}
        assert list(found.values()) == [K, N, R, ALPHA, False, False]
        assert (layer.disabled, layer.merged, layer.bias) == (False, False, None)
        assert isinstance(layer.dropout, nn.Dropout)
        assert layer.dropout.p == 0.25
        assert isinstance(LoRALinear(K, N, R, ALPHA).dropout, nn.Identity)
        assert [type(m) for m in layer.modules()] == [LoRALinear, nn.Dropout, nn.Linear, nn.Linear]
        assert all(p.requires_grad for p in layer.parameters()), "torchtune freezes later"
        assert layer.adapter_params() == ["lora_a.weight", "lora_b.weight"]
        assert isinstance(layer, compat.AdapterModule)

    def test_a_seed_starts_it_as_in_torchtune(self):
        torch.manual_seed(3)
        layer = LoRALinear(K, N, R, ALPHA, use_bias=True)
        torch.manual_seed(3)
        base, a, _ = nn.Linear(K, N), nn.Linear(K, R, bias=False), nn.Linear(R, N, bias=False)
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        assert torch.equal(layer.weight, base.weight)
        assert torch.equal(layer.bias, base.bias)
        assert torch.equal(layer.lora_a.weight, a.weight)
        assert not layer.lora_b.weight.any()
        x = torch.randn(3, K)
        layer.weight.requires_grad_(False)
        assert torch.equal(layer(x), base(x))

    def test_meta_device_protocol(self, monkeypatch):
        monkeypatch.undo()  # torch.device() as a context remembers which functions torch.empty and its sisters are
        torch.utils._device._device_constructors.cache_clear()
        tensors = checkpoint_of()
        with torch.device("meta"):
            layer = LoRALinear(K, N, R, ALPHA, use_bias=True)
        assert all(p.is_meta for p in layer.parameters())
        assert layer(torch.randn(3, K, device="meta")).shape == (3, N)
        x, a, b = torch.randn(3, K, device="meta"), layer.lora_a.weight, layer.lora_b.weight
        assert route.refusal(x, layer.weight.detach(), None, a, b, layer.dropout) == route.INPUT
        assert layer.to_empty(device="cpu") is layer
        assert [name for name, p in layer.named_parameters() if p.is_meta] == ["weight", "bias"]
        layer.initialize_parameters()
        assert layer.lora_a.weight.abs().max() <= K**-0.5
        assert not layer.lora_b.weight.any()
        layer.load_state_dict({name: tensors[name] for name in ("weight", "bias")}, strict=False, assign=True)
        x = torch.randn(3, K)
        assert torch.equal(layer(x), F.linear(x, tensors["weight"], tensors["bias"]))

    def test_copies(self):
        layer, x = make_layer(dropout=0.1).eval(), torch.randn(3, K)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), layer(x))

    def test_refusals(self):
        with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
            LoRALinear(K, N, 0, ALPHA)
        with pytest.raises(ValueError, match=r"``quantize_base`` is False, but received .*block_size"):
            LoRALinear(K, N, R, ALPHA, block_size=8)

    def test_quantize_base_without_torchao(self, monkeypatch):
        for name in compat._NF4_MODULES:
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match="pip install torchao"):
            LoRALinear(K, N, R, ALPHA, quantize_base=True)


class TestFused:
    def test_alpha_and_disabled_are_read_in_every_call(self):
        layer, x = make_layer(), torch.randn(3, K)
        one = layer(x)
        layer.alpha *= 2
        assert torch.equal(layer(x), make_like(layer, alpha=2 * ALPHA)(x))
        assert not torch.equal(layer(x), one)
        layer.disabled = True
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))

    def test_dropout_is_the_operators_and_rests_in_evaluation(self):
        layer, x = make_layer(dropout=0.3), torch.randn(64, K)
        torch.manual_seed(5)
        y = layer(x)
        torch.manual_seed(5)
        a, b = layer.lora_a.weight, layer.lora_b.weight
        assert torch.equal(y, lora_linear(x, layer.weight, a, b, ALPHA / R, layer.bias, dropout_p=0.3))
        assert not torch.equal(layer(x), y)
        assert torch.equal(layer.eval()(x), lora_linear(x, layer.weight, a, b, ALPHA / R, layer.bias))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing_draws_the_same_mask(self, reentrant):
        layer, x = make_layer(dropout=0.3), torch.randn(8, K, requires_grad=True)
        gradients = []
        for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
            torch.manual_seed(5)
            call(x).square().sum().backward()
            gradients.append([x.grad.clone(), layer.lora_a.weight.grad.clone()])
            x.grad = layer.lora_a.weight.grad = None
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

    def test_compiles_whole(self):
        layer, x, graphs = make_layer(), torch.randn(5, K), []
        compiled = torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
        assert torch.equal(compiled(x), layer(x))
        assert len(graphs) == 1
        assert any("linear_forward" in part.code for part in graphs[0].modules() if hasattr(part, "code"))

    def test_keeps_nothing_large(self):
        layer, x = make_layer(dropout=0.1), torch.randn(512, K, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer(x)
        known = [x.data_ptr(), *(p.data_ptr() for p in layer.parameters())]
        assert sum(t.nbytes for t in saved if t.data_ptr() not in known) == 512 * R * 4 + 8


def make_like(layer, alpha):
    twin = copy.deepcopy(layer)
    twin.alpha = alpha
    return twin


class Watching(TorchDispatchMode):
    """Counts matrix products, as FLOP counters and selective checkpointing do."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += "mm" in str(func)
        return func(*args, **(kwargs or {}))


class TestUnfused:
    """What the operator would not honour gives torchtune's own expression, bit for bit."""

    def plain(self, layer, x):
        return formula(x, layer.weight, layer.lora_a.weight, layer.lora_b.weight, layer.bias)

    def reason(self, layer, x):
        a, b = layer.lora_a.weight, layer.lora_b.weight
        return route.refusal(x, layer.weight, layer.bias, a, b, layer.dropout, layer.lora_a, layer.lora_b)

    def test_trainable_base_gets_its_gradient(self):
        layer, x = make_layer(frozen=False), torch.randn(7, K)
        assert self.reason(layer, x) == route.TRAINABLE
        assert torch.equal(layer(x), self.plain(layer, x))
        layer(x).sum().backward()
        assert torch.equal(layer.weight.grad, torch.ones(7, N).t() @ x)
        with torch.no_grad():
            assert self.reason(layer, x) == ""

    @pytest.mark.parametrize("name", ["lora_a", "lora_b", "dropout"])
    def test_hooks_fire(self, name):
        layer, x, seen = make_layer(dropout=0.5).eval(), torch.randn(7, K), []
        handle = layer.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
        assert self.reason(layer, x) == route.HOOKS
        assert torch.equal(layer(x), self.plain(layer, x))
        assert seen == [name]
        handle.remove()
        assert self.reason(layer, x) == ""

    def test_global_hooks_fire(self):
        layer, x, seen = make_layer(), torch.randn(7, K), []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        try:
            assert self.reason(layer, x) == route.HOOKS
            layer(x)
        finally:
            handle.remove()
        assert seen == [layer.dropout, layer.lora_a, layer.lora_b, layer]

    def test_a_bias_given_to_a_factor_counts(self):
        layer, x = make_layer(), torch.randn(7, K)
        layer.lora_b.bias = nn.Parameter(torch.randn(N))
        assert self.reason(layer, x) == route.FACTORS
        base = F.linear(x, layer.weight, layer.bias)
        assert torch.equal(layer(x), base + (ALPHA / R) * layer.lora_b(layer.lora_a(x)))

    def test_dispatch_modes_see_the_plain_operations(self):
        layer, x = make_layer(), torch.randn(7, K)
        with Watching() as mode:
            assert self.reason(layer, x) == route.TRACED
            assert torch.equal(layer(x), self.plain(layer, x))
        assert mode.products == 6

    def test_replaced_modules_are_called(self):
        layer, x = make_layer(), torch.randn(7, K)
        layer.lora_b = nn.Sequential(layer.lora_b, nn.Tanh())
        layer.lora_b.weight = layer.lora_b[0].weight
        assert self.reason(layer, x) == route.FACTORS
        branch = torch.tanh(F.linear(layer.lora_a(x), layer.lora_b.weight))
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias) + (ALPHA / R) * branch)
        layer = make_layer()
        layer.dropout = nn.AlphaDropout(0.1)
        assert self.reason(layer, x) == route.FACTORS

    def test_dtypes_that_do_not_go_together_raise_torchs_error(self):
        layer = make_layer()
        x = torch.randn(7, K, dtype=torch.float64)
        assert self.reason(layer, x) == route.DTYPES
        with pytest.raises(RuntimeError, match="same dtype"):
            layer(x)

    def test_functorch(self):
        layer, x = make_layer(checkpoint_of(torch.float64)), torch.randn(4, 7, K, dtype=torch.float64)
        assert torch.allclose(torch.vmap(layer)(x), layer(x), rtol=0, atol=1e-13)


class NF4Tensor(torch.Tensor):
    """A stand-in for torchao's: bfloat16 values that only ``to`` makes dense."""

    def to(self, dtype):
        return self.as_subclass(torch.Tensor).to(dtype)


class TestQuantised:
    @pytest.mark.parametrize("dropout", [0.0, 0.2])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_the_dense_layer_and_keeps_no_dense_weight(self, dtype, dropout):
        dense = make_layer(checkpoint_of(dtype), dropout=dropout)
        dense.weight.data = dense.weight.bfloat16().to(dtype)
        layer = copy.deepcopy(dense)
        layer._quantize_base = True
        layer.weight = nn.Parameter(dense.weight.detach().bfloat16().as_subclass(NF4Tensor), requires_grad=False)
        x, dy, found = torch.randn(9, K, dtype=dtype), torch.randn(9, N, dtype=dtype), []
        for module in (layer, dense):
            torch.manual_seed(5)
            leaf, saved = x.clone().requires_grad_(), []
            module.bias.requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: kept.append(t) or t, lambda t: t):
                y = module(leaf)
            parameters = [leaf, module.bias, module.lora_a.weight, module.lora_b.weight]
            found.append([y, *torch.autograd.grad(y, parameters, dy)])
            assert [type(t) is NF4Tensor for t in saved if t.shape == (N, K)] == [module is layer]
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

    def test_a_bias_of_another_dtype_is_added_by_torch(self):
        layer, x = make_layer(checkpoint_of(torch.bfloat16)), torch.randn(3, K, dtype=torch.bfloat16)
        nf4, (a, b) = layer.weight.detach().as_subclass(NF4Tensor), (layer.lora_a.weight, layer.lora_b.weight)
        assert route.refusal(x, nf4, layer.bias, a, b, layer.dropout) == ""
        assert route.refusal(x, nf4, layer.bias.float(), a, b, layer.dropout) == route.DTYPES
