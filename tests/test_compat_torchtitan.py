"""torchtitan's converter and layers, fused: beside torchtitan where it is installed, else beside a layer like its."""

import copy
import importlib.util
import pickle
import types
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

    _sharding_config = None

    def __init__(self, config):
        super().__init__(config.in_features, config.out_features, bias=getattr(config, "bias", False))

    def parallelize(self, parallel_dims):
        for child in self.children():
            child.parallelize(parallel_dims)
        if self._sharding_config is not None:
            forward = self.forward
            self.forward = lambda t: 3 * forward(t) if self._sharding_config.in_dst_shardings else forward(t)


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


@pytest.mark.parametrize(("tp", "redistributes", "fused"), [(1, False, True), (1, True, False), (2, False, False)])
def test_parallelized(tp, redistributes, fused):
    """torchtitan wraps every factor's forward, which is idle where nothing is redistributed."""
    theirs, ours = make()
    fields = dict.fromkeys(torchtitan._REDISTRIBUTIONS)
    sharding = types.SimpleNamespace(**fields | {"in_dst_shardings": {"input": 1} if redistributes else None})
    for layer in (theirs, ours):
        layer.lora_a._sharding_config = layer.lora_b._sharding_config = sharding
        layer.parallelize(types.SimpleNamespace(tp=tp))
    x = torch.randn(M, K)
    refused = route.refusal(
        x, ours.weight, None, ours.lora_a.weight, ours.lora_b.weight, nn.Identity(), ours.lora_a, ours.lora_b
    )
    assert (refused == "") == fused
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_mode_that_follows_functions_sees_theirs():
    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    theirs, ours = make()
    x, seen = torch.randn(M, K), []
    with Watching():
        assert torch.equal(ours(x), theirs(x))
    assert seen.count(nn.functional.linear) == 6


def test_a_default_device_is_no_such_mode(monkeypatch):
    calls, fused = [], route.fused
    monkeypatch.setattr(route, "fused", lambda *args: calls.append(1) or fused(*args))
    _, ours = make()
    with torch.device("cpu"):
        ours(torch.randn(M, K))
    assert calls == [1]


def test_a_forward_that_a_factor_had_before_stays():
    theirs, ours = make()
    for layer in (theirs, ours):
        forward = layer.lora_a.forward
        layer.lora_a.forward = lambda t, forward=forward: 2 * forward(t)
        layer.lora_a._sharding_config = types.SimpleNamespace(**dict.fromkeys(torchtitan._REDISTRIBUTIONS))
        layer.parallelize(types.SimpleNamespace(tp=1))
    x = torch.randn(M, K)
    assert torch.equal(ours(x), theirs(x))


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
    with pytest.raises(ImportError, match="torchtitan, which cannot be imported: No module named"):
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
            config = converter.Config(rank=R, alpha=ALPHA, target_modules=["wqkv", "wo", "w1", "w2", "w3"])
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
        assert len(calls) == sum(name.endswith("lora_a.weight") for name in named) == 5 * len(theirs.layers)

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

    @pytest.mark.parametrize("backend", ["spmd_types", "partial_dtensor"])
    def test_parallelized_by_it_on_one_process(self, backend, tmp_path, monkeypatch):
        from torchtitan.distributed import parallel_dims, utils
        from torchtitan.distributed.parallel_dims import ParallelDims
        from torchtitan.models.llama3 import model_registry
        from torchtitan.models.llama3.sharding import set_llama3_sharding_config

        monkeypatch.setattr(parallel_dims, "device_type", "cpu")
        monkeypatch.setattr(utils, "_spmd_backend", backend)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            config = torchtitan.LoRAConverter.Config(rank=R, alpha=ALPHA, target_modules=["w1"])
            model = model_registry("debugmodel", converters=[config]).model
            set_llama3_sharding_config(model, enable_sp=True)
            model = model.build()
            model.init_states()
            degrees = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "world_size"), 1)
            dims = ParallelDims(**degrees, spmd_backend=backend)
            dims.build_mesh()
            model.parallelize(dims)
            layer = model.layers["0"].feed_forward.w1
            assert "forward" in layer.__dict__
            with torch.no_grad():
                layer.lora_b.weight.normal_()
            calls, fused = [], route.fused
            monkeypatch.setattr(route, "fused", lambda *args: calls.append(1) or fused(*args))
            x = torch.randn(7, layer.in_features)
            expected = nn.functional.linear(x, layer.weight) + ALPHA / R * layer.lora_b(layer.lora_a(x))
            torch.testing.assert_close(layer(x), expected)
            assert calls == [1]
        finally:
            torch.distributed.destroy_process_group()

    def test_configurations_are_pickled(self):
        config = torchtitan.LoRAConverter.Config(rank=R, alpha=ALPHA, target_modules=["wo"])
        again = pickle.loads(pickle.dumps(config))
        assert again == config
        assert type(again.build()) is torchtitan.LoRAConverter
        assert repr(config).startswith("LoRAConverter.Config(rank=8")

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
