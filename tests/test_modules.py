"""LoRALinear: every promise of the module over the operator, over nn.Linear and over the Conv1D of transformers.

x (..., K)   weight (N, K), of a Conv1D (K, N)   lora_a (R, K)   lora_b (N, R)   y (..., N)
"""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from fused_lora import LoRALinear

K, N, R = 61, 45, 8
BASES = {"linear": lambda: nn.Linear(K, N), "no-bias": lambda: nn.Linear(K, N, False), "conv1d": lambda: Conv1D(N, K)}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()  # its limit on graphs counts over layers, and so over tests


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]()


def trained(base, **settings):
    """A LoRALinear over ``base`` whose factors are not zero."""
    layer = LoRALinear.from_linear(base, r=R, **settings)
    nn.init.normal_(layer.lora_b, std=0.3)
    return layer


def rounding_bound(layer, x):
    """How far two roundings of y may lie apart: per element, 2 eps of what is summed, and the sums' own rounding."""
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    summed = x.double().abs() @ weight.double().abs().t()
    summed += abs(layer.scale) * (x.double().abs() @ layer.lora_a.double().abs().t()) @ layer.lora_b.double().abs().t()
    if layer.bias is not None:
        summed += layer.bias.double().abs()
    accumulate = torch.promote_types(layer.weight.dtype, torch.float32)
    return summed * (2 * torch.finfo(layer.weight.dtype).eps + 2 * (K + R + 2) * torch.finfo(accumulate).eps)


def assert_agree(layer, a, b, x):
    assert a.dtype == b.dtype
    assert ((a.double() - b.double()).abs() <= rounding_bound(layer, x)).all()


class TestStart:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("lead", [(), (1,), (5,), (3, 4), (2, 3, 4), (0,)])
    def test_new_layer_is_its_base_bit_for_bit(self, base, dtype, lead):
        base.to(dtype)
        x = torch.randn(*lead, K, dtype=dtype)
        wanted = base(x[None])[0] if isinstance(base, Conv1D) and not lead else base(x)
        assert torch.equal(LoRALinear.from_linear(base, r=R)(x), wanted)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_new_layer_is_its_base_up_to_the_order_of_a_sum(self, base, dtype):
        # Where the CPU has no instructions for the dtype, the base sums in another order than the operator's blocks.
        base.to(dtype)
        x = torch.randn(17, K, dtype=dtype)
        layer = LoRALinear.from_linear(base, r=R)
        assert_agree(layer, layer(x), base(x), x)

    def test_from_linear_shares_and_freezes(self, base):
        weight, bias = base.weight, base.bias
        layer = LoRALinear.from_linear(base.eval(), r=R)
        assert layer.weight is weight
        assert layer.bias is bias
        assert base.weight is weight, "the layer it was made from is left as it is"
        assert not weight.requires_grad
        assert bias is None or not bias.requires_grad
        assert layer.lora_a.requires_grad
        assert layer.lora_b.requires_grad
        assert not layer.training
        assert (layer.lora_a.shape, layer.lora_b.shape) == ((R, K), (N, R))
        assert [*layer.modules()] == [layer]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_adapter_dtype(self, dtype):
        layer = LoRALinear(K, N, dtype=dtype)
        assert layer.lora_a.dtype == layer.lora_b.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert LoRALinear(K, N, dtype=dtype, adapter_dtype=dtype).lora_a.dtype == dtype

    def test_init_lora_weights(self):
        bound = (1 / K) ** 0.5  # Kaiming with a = √5
        layer = LoRALinear(K, N, r=64)
        assert 0.9 * bound < layer.lora_a.abs().max() <= bound
        assert not layer.lora_b.any()
        layer = LoRALinear(K, N, r=64, init_lora_weights="gaussian")
        assert layer.lora_a.std().item() == pytest.approx(1 / 64, rel=0.1)
        assert not layer.lora_b.any()
        layer = LoRALinear(K, N, r=64, init_lora_weights=False)
        assert layer.lora_a.all()
        assert layer.lora_b.all()
        assert layer.lora_b.abs().max() <= (1 / 64) ** 0.5

    def test_constructor_matches_from_linear(self):
        torch.manual_seed(3)
        built = LoRALinear(K, N, r=R, lora_alpha=4, dtype=torch.float64)
        torch.manual_seed(3)
        taken = LoRALinear.from_linear(nn.Linear(K, N, dtype=torch.float64), r=R, lora_alpha=4)
        assert built.state_dict().keys() == taken.state_dict().keys()
        assert all(
            torch.equal(a, b) for a, b in zip(built.state_dict().values(), taken.state_dict().values(), strict=True)
        )
        assert built.scale == taken.scale == 0.5


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "error", "words"),
        [
            ({"r": 0}, ValueError, "r must be at least 1, got 0"),
            ({"r": 2.0}, TypeError, "r must be an int, got float 2.0"),
            ({"r": True}, TypeError, "r must be an int"),
            ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite, got nan"),
            ({"lora_alpha": "16"}, TypeError, "lora_alpha must be a number, got str '16'"),
            ({"lora_dropout": 1.5}, ValueError, r"must be in \[0, 1\], got 1.5"),
            ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must be .* got 'pissa'"),
            ({"init_lora_weights": 1}, ValueError, "init_lora_weights must be .* got 1"),
        ],
    )
    def test_bad_settings(self, settings, error, words):
        with pytest.raises(error, match=words):
            LoRALinear(K, N, **settings)
        with pytest.raises(error, match=words):
            LoRALinear.from_linear(nn.Linear(K, N), **settings)

    def test_other_modules(self):
        with pytest.raises(TypeError, match=r"an nn\.Linear or a transformers Conv1D, got Conv1d"):
            LoRALinear.from_linear(nn.Conv1d(3, 3, 1))

    def test_bad_scale(self):
        layer = LoRALinear(K, N)
        with pytest.raises(ValueError, match="scale must be finite, got inf"):
            layer.set_scale(float("inf"))
        with pytest.raises(ValueError, match="lora_alpha must be finite"):
            layer.set_alpha(float("nan"))
        assert layer.scale == 2.0


class TestScaleAndSwitch:
    def test_set_scale_and_alpha(self, base):
        layer, x = trained(base, lora_alpha=16), torch.randn(7, K)
        branch = layer(x) - base(x)
        layer.set_scale(0.5)
        assert (layer.scale, layer.lora_alpha) == (0.5, 4.0)
        assert torch.allclose(layer(x) - base(x), branch / 4, atol=1e-5)
        layer.set_alpha(24)
        assert (layer.scale, layer.lora_alpha) == (3.0, 24)
        assert torch.allclose(layer(x) - base(x), branch * 1.5, atol=1e-5)

    def test_rslora(self):
        layer = LoRALinear(K, N, r=16, lora_alpha=8, use_rslora=True)
        assert layer.scale == 2.0
        layer.set_scale(1.0)
        assert layer.lora_alpha == 4.0

    def test_set_scale_does_not_recompile(self, base):
        layer, x = trained(base), torch.randn(7, K)
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph

        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        for scale in (2.0, 0.25, -1.0):
            layer.set_scale(scale)
            assert torch.equal(compiled(x), layer(x))
        assert len(graphs) == 1

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("merged", [False, True])
    def test_disabled_is_the_base_bit_for_bit(self, base, dtype, merged):
        base.to(dtype)
        layer, x = trained(base), torch.randn(3, 7, K, dtype=dtype)
        wanted = base(x)
        if merged:
            layer.merge()
        assert not torch.equal(layer(x), wanted)
        layer.enabled = False
        assert torch.equal(layer(x), wanted)
        layer.enabled = True
        assert not torch.equal(layer(x), wanted)


class TestMerge:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_merged_agrees_and_unmerge_restores(self, base, dtype):
        base.to(dtype)
        layer, x = trained(base), torch.randn(17, K, dtype=dtype)
        weight, before, apart = layer.weight, layer.weight.clone(), layer(x)
        layer.merge()
        assert layer.merged
        assert_agree(layer, layer(x), apart, x)
        layer.merge()
        layer.unmerge()
        assert not layer.merged
        assert layer.weight is weight
        assert torch.equal(weight, before)
        assert torch.equal(layer(x), apart)

    def test_merge_follows_scale(self, base):
        layer, x = trained(base), torch.randn(17, K)
        layer.merge()
        layer.set_scale(-3.0)
        merged = layer(x)
        layer.unmerge()
        assert_agree(layer, merged, layer(x), x)

    def test_merge_follows_a_step_and_a_checkpoint(self, base):
        layer, x = trained(base), torch.randn(17, K)
        layer.merge()
        state = {name: t + 0.25 for name, t in layer.state_dict().items()}
        with torch.no_grad():
            layer.lora_a.mul_(2)
        for change in (None, state):
            if change is not None:
                layer.load_state_dict(change)
            merged = layer(x)
            layer.unmerge()
            assert_agree(layer, merged, layer(x), x)
            layer.merge()

    def test_merge_follows_replaced_parameters(self, base):
        layer, x = trained(base), torch.randn(17, K)
        layer.merge()
        layer.load_state_dict({name: 2 * t for name, t in layer.state_dict().items()}, assign=True)
        layer.merge()
        layer.lora_b = nn.Parameter(3 * layer.lora_b.detach())  # as new as what it replaces: no version tells
        merged = layer(x)
        layer.unmerge()
        assert_agree(layer, merged, layer(x), x)

    def test_inference_mode(self, base):
        layer, x = trained(base), torch.randn(17, K)
        with torch.inference_mode():
            layer.merge()
            inferred = layer(x)
        x.requires_grad_()
        layer(x).sum().backward()  # a sum that were an inference tensor would fail here
        assert torch.equal(layer(x), inferred)
        with torch.inference_mode():
            made = LoRALinear(K, N)
            made.merge()
            made(x.detach())

    def test_to_linear_and_to_base(self, base):
        layer, x = trained(base, lora_dropout=0.5).eval(), torch.randn(17, K)
        linear, plain = layer.to_linear(), layer.to_base()
        assert type(linear) is nn.Linear
        assert type(plain) is type(base) is layer.base_type
        for module in (linear, plain):
            assert_agree(layer, module(x), layer(x), x)
            assert not module.training
            assert not any(p.requires_grad for p in module.parameters())
            assert module.weight.data_ptr() != layer.weight.data_ptr()
        assert plain.state_dict().keys() == base.state_dict().keys()
        layer.enabled = False
        assert torch.equal(layer.to_base()(x), base(x))
        assert torch.equal(layer.to_linear()(x), F.linear(x, layer.to_linear().weight, base.bias))
        assert layer.to_base().weight is base.weight


class TestState:
    def test_state_dict(self, base):
        keys = list(base.state_dict())
        layer, x = trained(base), torch.randn(5, K)
        layer.merge()
        assert list(layer.state_dict()) == [*keys, "lora_a", "lora_b"]
        other = trained(copy.deepcopy(base))
        assert not torch.equal(other(x), layer(x))
        other.load_state_dict(layer.state_dict())
        layer.unmerge()
        assert torch.equal(other(x), layer(x))
        missing = layer.load_state_dict(base.state_dict(), strict=False)
        assert (missing.missing_keys, missing.unexpected_keys) == (["lora_a", "lora_b"], [])

    @pytest.mark.parametrize("merged", [False, True])
    def test_deepcopy_and_pickle(self, base, merged):
        layer, x = trained(base, lora_alpha=3), torch.randn(5, K)
        if merged:
            layer.merge()
        stream = io.BytesIO()
        torch.save(layer, stream)
        stream.seek(0)
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)]
        wanted = layer(x)
        with torch.no_grad():
            layer.lora_b.zero_()
        layer.set_scale(9.0)
        for other in copies:
            assert torch.equal(other(x), wanted)
            assert (other.scale, other.merged) == (3 / R, merged)
            assert type(other.to_base()) is type(base)
            assert other.state_dict().keys() == layer.state_dict().keys()

    def test_deepcopy_keeps_ties(self):
        linear = nn.Linear(K, K)
        tied = copy.deepcopy(nn.ModuleList([LoRALinear.from_linear(linear), linear]))
        assert tied[0].weight is tied[1].weight

    def test_extra_repr(self):
        layer = LoRALinear(K, N, bias=False, r=4, lora_alpha=2, lora_dropout=0.1, use_rslora=True)
        wanted = (
            "in_features=61, out_features=45, bias=False, r=4, lora_alpha=2, scale=1, lora_dropout=0.1, use_rslora=True"
        )
        assert repr(layer) == f"LoRALinear({wanted})"
        layer.merge()
        layer.enabled = False
        assert repr(layer) == f"LoRALinear({wanted}, merged, disabled)"
        assert "fan_in_fan_out=True" in repr(LoRALinear.from_linear(Conv1D(N, K)))


class TestMoves:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("merged", [False, True])
    def test_casts_keep_the_scale_exact(self, base, dtype, merged):
        layer, x = trained(base, lora_alpha=0.8), torch.randn(17, K)
        assert layer.scale == 0.8 / R  # 0.1 is no number of bfloat16 or float16
        if merged:
            layer.merge()
        layer.to(dtype)
        assert layer.scale == 0.8 / R == layer._scale_tensor.item()
        assert {p.dtype for p in layer.parameters()} == {dtype}
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        layer.unmerge()
        assert_agree(layer, y, layer(x.to(dtype)), x.to(dtype))
        if not merged:  # the graph reads the scale from a tensor, which must not have been cast
            graph = torch.compile(layer, backend="eager", fullgraph=True)
            assert torch.equal(graph(x.to(dtype)), layer(x.to(dtype)))

    def test_meta_to_device(self, base):
        layer = LoRALinear.from_linear(base.to("meta"), r=R, lora_alpha=0.8)
        assert layer.lora_a.device.type == layer._scale_tensor.device.type == "meta"
        layer.to_empty(device="cpu")
        assert layer._scale_tensor.item() == 0.8 / R
        layer.load_state_dict({name: torch.ones_like(t) for name, t in layer.state_dict().items()})
        y = layer(torch.ones(1, K))
        assert torch.allclose(y, torch.full_like(y, K + (layer.bias is not None) + 0.1 * K * R))
        state = layer.state_dict()
        assigned = LoRALinear.from_linear(base.to("meta"), r=R, lora_alpha=0.8)
        assigned.load_state_dict(state, assign=True)
        assert torch.equal(torch.compile(assigned, backend="eager", fullgraph=True)(torch.ones(1, K)), y)


class TestTraining:
    def test_steps_move_only_the_factors(self, base):
        layer, x = trained(base, lora_dropout=0.1), torch.randn(32, K)
        before = {name: t.clone() for name, t in layer.state_dict().items()}
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
        for name, t in layer.state_dict().items():
            assert torch.equal(t, before[name]) == (name in ("weight", "bias")), name
        assert layer.weight.grad is None

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoint_with_dropout(self, base, reentrant):
        layer, x = trained(base, lora_dropout=0.3), torch.randn(32, K, requires_grad=True)

        def gradients(call):
            torch.manual_seed(5)
            loss = call(x).square().mean()
            return loss, *torch.autograd.grad(loss, [x, layer.lora_a, layer.lora_b])

        def through_checkpoint(x):
            return checkpoint(layer, x, use_reentrant=reentrant)

        if reentrant:  # the reentrant form has no torch.autograd.grad
            torch.manual_seed(5)
            through_checkpoint(x).square().mean().backward()
            found = (x.grad, layer.lora_a.grad, layer.lora_b.grad)
        else:
            found = gradients(through_checkpoint)[1:]
        assert all(torch.equal(a, b) for a, b in zip(found, gradients(layer)[1:], strict=True))

    def test_dropout_follows_training_mode(self, base):
        layer, x = trained(base, lora_dropout=0.5), torch.randn(8, K)
        assert not torch.equal(layer(x), layer(x)), "each call draws its own mask"
        assert torch.equal(layer.eval()(x), layer(x))
        layer.train().lora_dropout = 1.0
        assert torch.equal(layer(x), base(x))
