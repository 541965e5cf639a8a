"""torchtitan's converter and layers, fused: beside torchtitan where it is installed, else beside a layer like its."""

import copy
import importlib.util
from dataclasses import dataclass

import pytest
import torch
from accuracy import compare, wide
from torch import nn

from fused_lora.compat import route, torchtitan

M, K, N, R, ALPHA = 33, 48, 40, 8, 12.0
INSTALLED = importlib.util.find_spec("torchtitan") is not None
needs_torchtitan = pytest.mark.skipif(not INSTALLED, reason="torchtitan is not installed")


class Linear(nn.Linear):
    """What torchtitan's ``Linear`` is to us: a subclass of nn.Linear that keeps its forward, with a Config."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        in_features: int
        out_features: int

    def __init__(self, config):
        super().__init__(config.in_features, config.out_features, bias=getattr(config, "bias", False))


class Layer(Linear):
    """What its LoRA class is to us."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        rank: int
        alpha: float
        bias: bool = False

    def __init__(self, config):
        super().__init__(config)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self._lora_scaling = config.alpha / config.rank
        self.lora_a = Linear(Linear.Config(in_features=config.in_features, out_features=config.rank))
        self.lora_b = Linear(Linear.Config(in_features=config.rank, out_features=config.out_features))

    def forward(self, input):
        return super().forward(input) + self._lora_scaling * self.lora_b(self.lora_a(input))


def make(bias=False, dtype=torch.float32):
    """(their layer, the fused one) with the same values."""
    fields = {"in_features": K, "out_features": N, "rank": R, "alpha": ALPHA, "bias": bias}
    theirs = Layer(Layer.Config(**fields)).to(dtype)
    fused_class = torchtitan.fused_class(Layer)
    ours = fused_class(fused_class.Config(**fields)).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run(layer, x, dy):
    x = x.clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "da": layer.lora_a.weight.grad, "db": layer.lora_b.weight.grad}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_their_layer_fused(bias, dtype, monkeypatch):
    calls, errors = [], {}
    fused = route.fused
    monkeypatch.setattr(route, "fused", lambda *args: calls.append(1) or fused(*args))
    for _ in range(4):
        theirs, ours = make(bias, dtype)
        x, dy = torch.randn(3, M, K, dtype=dtype), torch.randn(3, M, N, dtype=dtype)
        found, other = run(ours, x, dy), run(theirs, x, dy)
        truth = run(copy.deepcopy(theirs).double(), x.double(), dy.double())
        for name, t in found.items():
            assert t.dtype == dtype
            if dtype == torch.float64:
                torch.testing.assert_close(t, truth[name])
            errors.setdefault(name, []).append((wide(t), wide(other[name]), wide(truth[name])))
    complaints = [compare(name, draws, dtype) for name, draws in errors.items() if dtype != torch.float64]
    assert not any(complaints), "\n".join(complaints)
    assert len(calls) == 4
    assert ours.weight.grad is None
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, Layer)
    assert type(ours).__name__ == "Layer"


@pytest.mark.parametrize("change", ["hook", "forward", "redistribute", "trainable", "subclass"])
def test_what_the_operator_has_no_answer_to_is_their_forward(change):
    theirs, ours = make()
    x = torch.randn(M, K)
    if change == "hook":
        for layer in (theirs, ours):
            layer.lora_a.register_forward_hook(lambda module, args, y: 2 * y)
    elif change == "forward":  # what parallelize() does to a factor
        for layer in (theirs, ours):
            layer.lora_b.forward = lambda t, layer=layer: 3 * nn.functional.linear(t, layer.lora_b.weight)
    elif change == "redistribute":

        class Redistributing(Linear):
            def forward(self, t):
                return super().forward(t) + 1

        for layer in (theirs, ours):
            layer.lora_b.__class__ = Redistributing
    elif change == "trainable":
        ours.weight.requires_grad_()
    else:
        ours.weight = nn.Parameter(ours.weight.detach().as_subclass(type("Sharded", (torch.Tensor,), {})), False)
    assert torch.equal(torch.as_tensor(ours(x)).as_subclass(torch.Tensor), theirs(x))


def test_a_call_of_its_own_counts():
    theirs, ours = make()

    class Calling(Linear):
        def __call__(self, t):
            return super().__call__(t) + 1

    for layer in (theirs, ours):
        layer.lora_b.__class__ = Calling
    x = torch.randn(M, K)
    assert torch.equal(ours(x), theirs(x))


def test_compiled_in_one_graph():
    _, ours = make()
    x = torch.randn(M, K)
    expected = run(ours, x, torch.ones(M, N))
    got = run(torch.compile(ours, fullgraph=True, backend="aot_eager"), x, torch.ones(M, N))
    for name, t in expected.items():
        torch.testing.assert_close(got[name], t)


@pytest.mark.skipif(INSTALLED, reason="torchtitan is installed")
def test_without_torchtitan_the_name_says_so():
    with pytest.raises(ImportError, match="torchtitan, which is not installed"):
        _ = torchtitan.LoRAConverter
    with pytest.raises(AttributeError, match="nothing"):
        _ = torchtitan.nothing


@needs_torchtitan
class TestTorchtitan:
    """A Llama of torchtitan's, built with its converter and with ours."""

    def models(self):
        from torchtitan.components.lora import LoRAConverter as Theirs
        from torchtitan.models.llama3 import model_registry

        for converter in (Theirs, torchtitan.LoRAConverter):
            config = converter.Config(rank=R, alpha=ALPHA, target_modules=["wq", "wkv", "wo", "w1", "w2", "w3"])
            model = model_registry("debugmodel", converters=[config]).model.build()
            torch.manual_seed(0)
            model.init_states()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_b" in name:
                        parameter.normal_()
            yield model

    def test_the_same_model_fused(self, monkeypatch):
        theirs, ours = self.models()
        named = {name: p.requires_grad for name, p in theirs.named_parameters()}
        assert {name: p.requires_grad for name, p in ours.named_parameters()} == named
        ours.load_state_dict(theirs.state_dict())
        calls, fused = [], route.fused
        monkeypatch.setattr(route, "fused", lambda *args: calls.append(1) or fused(*args))
        tokens, positions = torch.randint(0, 2000, (32,)), torch.arange(16).repeat(2)
        arguments = {"attention_masks": ours.get_attention_masks(positions), "positions": positions}
        with torch.no_grad():  # torchtitan's attention has no backward on a CPU
            got, expected = ours(tokens, **arguments), theirs(tokens, **arguments)
        # float32 through six blocks: whether it is the same network. How exact a layer is, the tests above say.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        assert len(calls) == sum(name.endswith("lora_a.weight") for name in named)

    def test_gradients(self):
        theirs, ours = (next(iter(model.layers.values())).feed_forward.double() for model in self.models())
        x = torch.randn(7, theirs.w1.in_features, dtype=torch.float64)
        ours.load_state_dict(theirs.state_dict())
        for module in (theirs, ours):
            module(x).square().sum().backward()
        for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None) == ("lora" not in name)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad)

    def test_the_order_of_converters_is_checked(self):
        from torchtitan.components.quantization import Float8LinearConverter
        from torchtitan.models.utils import validate_converter_order

        lora = torchtitan.LoRAConverter.Config(rank=R, alpha=ALPHA)
        float8 = Float8LinearConverter.Config(emulate=True)
        validate_converter_order([float8, lora])
        with pytest.raises(ValueError, match="must be applied before"):
            validate_converter_order([lora, float8])

    def test_layers_over_another_forward_are_theirs(self):
        from torchtitan.models.common.linear import Linear, ScaledBiasRowwiseLinear

        converter = torchtitan.LoRAConverter.Config(rank=R, alpha=ALPHA).build()
        for kind, wanted in ((Linear, True), (ScaledBiasRowwiseLinear, False)):
            made = converter._make_lora_config(kind.Config(in_features=K, out_features=N, bias=True))
            assert ("Fused" in type(made)._owner.__mro__[0].forward.__qualname__) == wanted
            assert made.build()(torch.randn(3, K)).shape == (3, N)
