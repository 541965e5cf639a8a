"""LoRA layers where others reach into them: autocast, parametrized factors, computed weights, loaders, a thawed base.

x (..., K)   weight (N, K)   lora_a (R, K)   lora_b (N, R)   y (..., N)
"""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from fused_lora import LoRAConv1d, LoRAEmbedding, LoRALinear

K, N, R = 12, 7, 3
MAKE = {
    "linear": lambda: LoRALinear(K, N, r=R, init_lora_weights=False),
    "dora": lambda: LoRALinear(K, N, r=R, init_lora_weights=False, use_dora=True),
    "embedding": lambda: LoRAEmbedding(K, N, r=R, init_lora_weights=False),
    "convolution": lambda: LoRAConv1d(K, N, 1, r=R, init_lora_weights=False),
}
KINDS = list(MAKE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def input_of(layer):
    if isinstance(layer, LoRAEmbedding):
        return torch.arange(K)
    shape = (5, K, 4) if isinstance(layer, LoRAConv1d) else (5, K)
    return torch.randn(shape, dtype=layer.weight.dtype)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, t):
        return t * self.factor


class TestMergedOfAComputedFactor:
    def agrees(self, layer):
        x = input_of(layer)
        merged = layer(x)
        layer.unmerge()
        torch.testing.assert_close(merged, layer(x))
        layer.merge()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", ["lora_a", "lora_b"])
    def test_parametrized(self, kind, name):
        layer = MAKE[kind]().double()
        parametrize.register_parametrization(layer, name, Times(2.0))
        entry = layer.parametrizations[name]
        layer.merge()
        for changed in (entry.original, entry[0].factor, layer.weight):
            for _ in range(4):
                layer(input_of(layer))
                with torch.no_grad():
                    changed.mul_(1.5)
                self.agrees(layer)

    def test_one_sum_where_nothing_changes(self):
        layer = MAKE["linear"]()
        parametrize.register_parametrization(layer, "lora_a", Times(2.0))
        layer.merge()
        merged = layer._merged_weight
        for _ in range(3):
            layer(input_of(layer))
        assert layer._merged_weight is merged

    def test_pruned(self):
        layer = MAKE["linear"]().double()
        prune.l1_unstructured(layer, "lora_b", 0.5)
        layer.merge()
        with torch.no_grad():
            layer.lora_b_orig.mul_(3)
        self.agrees(layer)


@pytest.mark.parametrize("kind", ["linear", "embedding", "convolution"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_no_update(kind, dtype):
    layer = MAKE[kind]()
    wanted = layer.delta_weight()
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(layer.delta_weight(), wanted)


COMPUTED = {
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight", "weight_mask"),
    "pruned bias": (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), "bias", "bias_mask"),
    "spectral_norm": (nn.utils.spectral_norm, "weight", "weight_u"),
    "weight_norm": (nn.utils.weight_norm, "weight", "weight_g"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", list(COMPUTED))
def test_a_base_whose_weight_is_computed(how):
    compute, name, other = COMPUTED[how]
    linear = compute(nn.Linear(K, N))
    before = dict(linear.named_parameters())
    for use_dora in (False, True):
        with pytest.raises(
            ValueError, match=rf"Linear cannot .* {name} is computed from other tensors \(.*{other}.*\)"
        ):
            LoRALinear.from_linear(linear, r=R, use_dora=use_dora)
    assert dict(linear.named_parameters()) == before
    assert all(p.requires_grad for p in linear.parameters())


def test_a_computed_weight_of_other_layers():
    with pytest.raises(ValueError, match=r"Embedding cannot .* weight is computed from other tensors"):
        LoRAEmbedding.from_embedding(prune.l1_unstructured(nn.Embedding(K, N), "weight", 0.5))
    with pytest.raises(ValueError, match=r"Conv1d cannot .* weight is computed from other tensors"):
        LoRAConv1d.from_conv(nn.utils.parametrizations.weight_norm(nn.Conv1d(K, N, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_layer_trains_no_weight(kind):
    layer = MAKE[kind]()
    x = input_of(layer)
    layer.merge()
    wanted = layer(x)
    layer.weight.requires_grad_(True)
    name = layer.base_type.__name__
    with pytest.raises(
        ValueError, match=rf"^weight requires grad, .* no gradient: .*requires_grad_\(False\), or use {name}"
    ):
        layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), wanted)
    layer.enabled = False
    layer(x).sum().backward()
    assert layer.weight.grad is not None


class TestALoaderThatPutsParametersInPlace:
    """As from_pretrained does over a model that was built on meta: one by one, by neither load_state_dict nor to."""

    def loaded(self, kind):
        source = MAKE[kind]()
        with torch.device("meta"):
            layer = MAKE[kind]()
        for name, p in source.named_parameters():
            layer._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
        assert layer._scale_tensor.is_meta
        return layer

    @pytest.fixture(autouse=True)
    def device_contexts(self, monkeypatch):
        monkeypatch.undo()  # torch.device() as a context remembers which functions torch.empty and its sisters are
        torch.utils._device._device_constructors.cache_clear()

    @pytest.mark.parametrize("kind", KINDS)
    def test_compile(self, kind):
        layer, graphs = self.loaded(kind), []

        def backend(graph, _):
            graphs.append(graph)
            return graph

        x = input_of(layer)
        wanted = layer(x)
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), wanted)
        assert layer._scale_tensor.device == layer.lora_a.device
        for scale in (0.5, -1.5, 3.0):
            layer.set_scale(scale)
            torch.testing.assert_close(compiled(x), layer(x))
        assert len(graphs) == 2  # the first call brings the scale over

    @pytest.mark.filterwarnings("error:.*assigned during export", "error:.*side effects")
    @pytest.mark.parametrize("strict", [False, True])
    def test_export(self, strict):
        layer = self.loaded("linear")
        x = input_of(layer)
        program = torch.export.export(layer, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), layer(x))
        assert layer._scale_tensor.is_meta
