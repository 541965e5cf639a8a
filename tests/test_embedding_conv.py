"""LoRAEmbedding and LoRAConv1d/2d/3d against float64 with ΔW written out, against PEFT, and their promises as modules.

Accuracy rule of ``accuracy.py``: for y and every gradient, at most twice the error of the plain layer, PEFT's way.
"""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from accuracy import REGIMES, compare, wide
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lora import LoRAConv1d, LoRAConv2d, LoRAConv3d, LoRAEmbedding

V, D, R = 40, 24, 6
# name: (dimensions, arguments of the convolution after its 24 and 36 channels). Every kind of stride, padding,
# dilation, grouping and padding mode is in one of them; their product would test torch.
CONVOLUTIONS = {
    "1d": (1, {"kernel_size": 3}),
    "1d-stride-padding": (1, {"kernel_size": 5, "stride": 2, "padding": 2}),
    "1d-same-dilation": (1, {"kernel_size": 3, "padding": "same", "dilation": 2}),
    "1d-valid-no-bias": (1, {"kernel_size": 4, "padding": "valid", "bias": False}),
    "1d-same-even-circular": (1, {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}),
    "2d": (2, {"kernel_size": 3, "padding": 1}),
    "2d-1x1": (2, {"kernel_size": 1}),
    "2d-oblong": (2, {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}),
    "2d-reflect": (2, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "2d-replicate-stride": (2, {"kernel_size": 3, "padding": (1, 2), "stride": 2, "padding_mode": "replicate"}),
    "2d-groups": (2, {"kernel_size": 3, "padding": 1, "groups": 3}),
    "2d-groups-circular": (2, {"kernel_size": 3, "padding": 1, "groups": 2, "padding_mode": "circular"}),
    "2d-rank-1-per-group": (2, {"kernel_size": 3, "padding": 1, "groups": 6}),
    "3d": (3, {"kernel_size": 2, "padding": 1, "stride": 2}),
    "3d-groups-dilation": (3, {"kernel_size": 2, "groups": 2, "dilation": 2, "bias": False}),
}
CONV = {
    1: (nn.Conv1d, LoRAConv1d, F.conv1d),
    2: (nn.Conv2d, LoRAConv2d, F.conv2d),
    3: (nn.Conv3d, LoRAConv3d, F.conv3d),
}
CASES = ["embedding", "embedding-padding", *CONVOLUTIONS]
# The regimes in which these layers have arithmetic of their own to get wrong; float64 is gradcheck's.
_REGIMES = ["float32", "bfloat16", "bfloat16+float32", "float16+float32", "autocast"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def make_base(case, dtype=torch.float32):
    if case.startswith("embedding"):
        return nn.Embedding(V, D, padding_idx=3 if "padding" in case else None, dtype=dtype)
    dimensions, settings = CONVOLUTIONS[case]
    return CONV[dimensions][0](24, 36, **settings, dtype=dtype)


def make_layer(case, dtype=torch.float32, base=None, trained=True, **settings):
    """The LoRA layer of a case; ``trained`` factors are of unit scale over their fan-in, so that nothing cancels."""
    base = make_base(case, dtype) if base is None else base
    if case.startswith("embedding"):
        layer = LoRAEmbedding.from_embedding(base, r=R, lora_alpha=9, **settings)
    else:
        layer = CONV[CONVOLUTIONS[case][0]][1].from_conv(base, r=R, lora_alpha=9, **settings)
    if trained:
        nn.init.normal_(layer.lora_a, std=1.0 if "embedding" in case else layer.lora_a[0].numel() ** -0.5)
        nn.init.normal_(layer.lora_b, std=R**-0.5)
    return layer


def make_input(case, dtype=torch.float32):
    if case.startswith("embedding"):
        return torch.randint(0, V, (8, 11))
    return torch.randn(2, 24, *(9, 7, 5)[: CONVOLUTIONS[case][0]]).to(dtype)


def conv(case, x, weight, bias, groups):
    """The base's convolution with another weight; the padding written out with F.pad."""
    dimensions, settings = CONVOLUTIONS[case]
    base = make_base(case)
    mode = settings.get("padding_mode", "constant")
    x = F.pad(x, base._reversed_padding_repeated_twice, mode=mode)
    return CONV[dimensions][2](x, weight, bias, base.stride, 0, base.dilation, groups)


def plain(case, layer, x, weight, bias, a, b):
    """What PEFT computes, on any tensors (PEFT itself forgets dilation and padding mode for lora_a)."""
    if case.startswith("embedding"):
        base = F.embedding(x, weight, layer.padding_idx)
        return (base + (F.embedding(x, a.t(), layer.padding_idx) @ b.t()) * layer.scale).to(base.dtype)
    base = conv(case, x, weight, bias, layer.groups)
    branch = CONV[CONVOLUTIONS[case][0]][2](conv(case, x.to(a.dtype), a, None, 1), b, groups=layer.groups)
    return (base + branch * layer.scale).to(base.dtype)


def exact(case, layer, x, weight, bias, a, b):
    """The base layer with weight + ΔW; for a grouped convolution as the dense one it is."""
    if case.startswith("embedding"):
        return F.embedding(x, weight + layer.scale * (b @ a).t(), layer.padding_idx)
    G = layer.groups
    dense = torch.zeros(36, 24, *weight.shape[2:], dtype=weight.dtype)
    delta = []
    for g in range(G):
        rows, columns = slice(g * 36 // G, (g + 1) * 36 // G), slice(g * 24 // G, (g + 1) * 24 // G)
        dense[rows, columns] = weight[rows]
        delta.append(torch.tensordot(b[rows].flatten(1), a[g * R // G : (g + 1) * R // G], 1))
    return conv(case, x, dense + layer.scale * torch.cat(delta), bias, 1)


def results(formula, case, layer, x, dy, dtype=None):
    """y and the gradients of ``formula`` on detached copies, cast to ``dtype``."""
    tensors = [x, layer.weight, layer.bias, layer.lora_a, layer.lora_b]
    cast = [t if t is None or not t.is_floating_point() else t.detach().to(dtype or t.dtype) for t in tensors]
    wanted = {"lora_a": cast[3], "lora_b": cast[4]} | ({"x": cast[0]} if x.is_floating_point() else {})
    for t in wanted.values():
        t.requires_grad_()
    y = formula(case, layer, *cast)
    gradients = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    return {"y": y} | dict(zip((f"d{name}" for name in wanted), gradients, strict=True))


def ours(case, layer, x, weight, bias, a, b):
    return torch.func.functional_call(layer, {"lora_a": a, "lora_b": b}, x)


def assert_agree(case, layer, a, b, x):
    """a and b differ by two roundings of weight and of y at most, and by the order of the sums."""
    assert a.dtype == b.dtype
    tensors = (x, layer.weight, layer.bias, layer.lora_a, layer.lora_b)
    summed = plain(case, layer, *(t.double().abs() if t is not None and t.is_floating_point() else t for t in tensors))
    terms = (0 if "embedding" in case else layer.lora_a[0].numel()) + layer.r + 2
    accumulate = torch.promote_types(layer.weight.dtype, torch.float32)
    bound = summed * (2 * torch.finfo(layer.weight.dtype).eps + 2 * terms * torch.finfo(accumulate).eps)
    assert ((a.double() - b.double()).abs() <= bound).all()


@pytest.mark.parametrize("regime", _REGIMES)
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_plain(case, regime):
    kind = REGIMES[regime]
    errors = {}
    for _ in range(4):
        layer = make_layer(case, kind.weight, adapter_dtype=kind.adapters)
        x = make_input(case, kind.x)
        dy = torch.randn_like(layer(x).detach().float())
        with kind.active():
            found, other = results(ours, case, layer, x, dy), results(plain, case, layer, x, dy)
        truth = results(exact, case, layer, x, dy, torch.float64)
        for name, t in found.items():
            assert t.dtype == other[name].dtype
            errors.setdefault((name, t.dtype), []).append((wide(t), wide(other[name]), wide(truth[name])))
    complaints = [compare(name, draws, dtype) for (name, dtype), draws in errors.items()]
    assert not any(complaints), "\n".join(complaints)


@pytest.mark.parametrize("case", ["embedding", "1d-same-even-circular", "2d-groups"])
def test_gradcheck(case):
    layer = make_layer(case, torch.float64)
    x = make_input(case, torch.float64)[:1]
    inputs = [layer.lora_a.detach().requires_grad_(), layer.lora_b.detach().requires_grad_()]
    if x.is_floating_point():
        inputs.append(x.requires_grad_())

    def call(a, b, x=x):
        return ours(case, layer, x, None, None, a, b)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_starts_as_base_and_disabled_is_base_bit_for_bit(case, dtype):
    base = make_base(case, dtype)
    x = make_input(case, dtype)
    wanted = base(x)
    layer = make_layer(case, base=base, trained=False)
    assert layer.weight is base.weight
    assert not layer.weight.requires_grad
    assert torch.equal(layer(x), wanted)
    layer = make_layer(case, base=base)
    assert not torch.equal(layer(x), wanted)
    for merge in (False, True):
        layer.merge() if merge else None
        layer.enabled = False
        assert torch.equal(layer(x), wanted)
        layer.enabled = True


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_unmerge_and_plain_layers(case, dtype):
    base = make_base(case, dtype)
    layer, x = make_layer(case, base=base), make_input(case, dtype)
    weight, before, apart = base.weight, base.weight.clone(), layer(x)
    layer.merge()
    assert_agree(case, layer, layer(x), apart, x)
    merged = layer.to_base()
    assert type(merged) is type(base) is layer.base_type
    assert torch.equal(merged(x), layer(x))
    assert merged.weight.requires_grad is False
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(layer.to_base().weight, merged.weight), "the sum is formed in float32 whatever autocast says"
    layer.set_scale(0.0)
    assert torch.equal(layer.to_base().eval()(x), layer(x)), "merging follows the scale"
    layer.set_scale(9 / R)
    layer.unmerge()
    assert layer.weight is weight
    assert torch.equal(weight, before)
    assert torch.equal(layer(x), apart)
    layer.enabled = False
    assert torch.equal(layer.to_base()(x), base(x))


@pytest.mark.parametrize("case", CASES)
def test_delta_weight_is_never_built_in_forward(case, monkeypatch):
    layer, x = make_layer(case), make_input(case)
    monkeypatch.setattr(type(layer), "delta_weight", lambda self: pytest.fail("ΔW was built"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert not [t for t in saved if t.shape == layer.weight.shape and t.data_ptr() != layer.weight.data_ptr()]


@pytest.mark.parametrize("case", CASES)
def test_state_dict_copies_and_casts(case):
    base = make_base(case)
    layer, x = make_layer(case, base=base), make_input(case)
    assert list(layer.state_dict()) == [*base.state_dict(), "lora_a", "lora_b"]
    other = make_layer(case)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(twin.to_base()(x), layer.to_base()(x))
        assert repr(twin) == repr(layer)
    layer.bfloat16()
    assert layer.scale == 1.5 == layer._scale_tensor.item()
    assert layer(make_input(case, torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("case", ["embedding-padding", "1d-same-even-circular", "2d-groups", "3d"])
def test_compiles_whole_and_follows_the_scale(case):
    layer, x, graphs = make_layer(case), make_input(case), []
    compiled = torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    for scale in (1.5, -0.5):
        layer.set_scale(scale)
        assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1


class TestAgainstPeft:
    """The same factors in PEFT's layers give the same output, and PEFT's shapes are ours."""

    @pytest.mark.parametrize("case", ["embedding", "embedding-padding", "1d-stride-padding", "2d", "2d-groups", "3d"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_output(self, case, dtype):
        from peft import LoraConfig, get_peft_model

        base, x = nn.ModuleDict({"m": make_base(case, dtype)}), make_input(case, dtype)
        layer = make_layer(case, base=copy.deepcopy(base["m"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # merging a grouped convolution, which PEFT does not do
            config = LoraConfig(r=R, lora_alpha=9, target_modules=["m"])
            theirs = get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model["m"]
        if "embedding" in case:
            a, b = theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]
        else:
            a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
        assert (a.shape, b.shape) == (layer.lora_a.shape, layer.lora_b.shape)
        with torch.no_grad():
            a.copy_(layer.lora_a), b.copy_(layer.lora_b)
        assert theirs.scaling["default"] == layer.scale
        assert_agree(case, layer, layer(x), theirs(x), x)


class TestEmbedding:
    def test_start_is_pefts(self):
        layer = LoRAEmbedding(2000, 64, r=16)
        assert not layer.lora_a.any()
        assert layer.lora_b.std().item() == pytest.approx(1.0, rel=0.1)
        layer = LoRAEmbedding(2000, 64, r=16, init_lora_weights=False)
        assert layer.lora_a.std().item() == pytest.approx(1.0, rel=0.1)

    def test_padding_row_gets_no_gradient(self):
        layer = make_layer("embedding-padding")
        layer(torch.tensor([[3, 5, 3, 7]])).square().sum().backward()
        touched = layer.lora_a.grad.any(0)
        assert touched.nonzero().flatten().tolist() == [5, 7]

    def test_scale_grad_by_freq(self):
        layer = make_layer("embedding", base=nn.Embedding(V, D, scale_grad_by_freq=True))
        layer(torch.tensor([5])).sum().backward()
        once = layer.lora_a.grad.clone()
        layer.lora_a.grad = None
        layer(torch.tensor([5, 5, 5])).sum().backward()
        assert torch.allclose(layer.lora_a.grad, once)

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"max_norm=1 would rewrite the frozen weight"):
            LoRAEmbedding.from_embedding(nn.Embedding(V, D, max_norm=1.0))
        with pytest.raises(ValueError, match="sparse=True is not supported"):
            LoRAEmbedding.from_embedding(nn.Embedding(V, D, sparse=True))
        with pytest.raises(TypeError, match=r"from_embedding takes an nn\.Embedding, got EmbeddingBag"):
            LoRAEmbedding.from_embedding(nn.EmbeddingBag(V, D))
        with pytest.raises(ValueError, match="r must be at least 1, got 0"):
            LoRAEmbedding(V, D, r=0)


class TestConvolution:
    def test_constructor_takes_the_arguments_of_torch(self):
        layer = LoRAConv2d(24, 36, (3, 2), 2, (1, 0), (1, 2), 2, False, "reflect", r=4, lora_alpha=8, lora_dropout=0.1)
        assert isinstance(layer.to_base(), nn.Conv2d)
        assert layer.to_base().groups == 1, "with ΔW a grouped convolution is a dense one"
        wanted = "24, 36, kernel_size=(3, 2), stride=(2, 2), padding=(1, 0), dilation=(1, 2), groups=2, "
        wanted += "padding_mode=reflect, bias=False, r=4, lora_alpha=8, scale=2, lora_dropout=0.1"
        assert repr(layer) == f"LoRAConv2d({wanted})"
        layer.enabled = False
        assert layer.to_base().groups == 2
        assert layer(torch.randn(24, 8, 9)).shape == (36, 4, 4), "without a batch dimension"

    def test_refusals(self):
        with pytest.raises(ValueError, match="r=8 is not a multiple of groups=3"):
            LoRAConv2d(24, 36, 3, groups=3, r=8)
        with pytest.raises(TypeError, match=r"LoRAConv2d goes over an nn\.Conv2d, got Conv1d"):
            LoRAConv2d.from_conv(nn.Conv1d(3, 3, 1))
        with pytest.raises(TypeError, match="got ConvTranspose2d"):
            LoRAConv2d.from_conv(nn.ConvTranspose2d(3, 3, 1))

    @pytest.mark.parametrize("case", ["1d", "2d-reflect"])
    def test_dropout(self, case):
        layer, x = make_layer(case, lora_dropout=0.5), make_input(case)
        assert not torch.equal(layer(x), layer(x))
        assert torch.equal(layer.eval()(x), layer(x))
        layer.train().lora_dropout = 1.0
        layer.enabled = False
        base = layer(x)
        layer.enabled = True
        assert torch.equal(layer(x), base)

    @pytest.mark.parametrize("case", ["2d", "1d-same-even-circular"])
    def test_drops_before_padding(self, case):
        layer, x = make_layer(case, torch.float64, lora_dropout=0.5), make_input(case, torch.float64)
        base = layer.to_base()
        base.weight = layer.weight
        torch.manual_seed(5)
        found = layer(x)
        torch.manual_seed(5)
        dropped = F.dropout(x, 0.5)
        assert torch.allclose(found, base(x) + layer.eval()(dropped) - base(dropped), rtol=0, atol=1e-13)

    def test_dropout_keeps_the_mean(self):
        layer, x = make_layer("1d", lora_dropout=0.3), make_input("1d")[:1]
        with torch.no_grad():
            draws = layer(x.expand(900, -1, -1))
            whole = layer.eval()(x)
            layer.enabled = False
            branch = whole - layer(x)
            # How much of the branch each draw has: 1 on average, or the survivors are scaled wrongly.
            shares = ((draws - whole + branch) * branch).sum((1, 2)) / branch.square().sum()
        sigma = shares.std() / 30
        assert sigma < 0.02
        assert abs(shares.mean() - 1) < 4 * sigma

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoint_with_dropout(self, reentrant):
        layer, x = make_layer("2d", lora_dropout=0.3), make_input("2d").requires_grad_()
        gradients = []
        for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
            layer.zero_grad()
            x.grad = None
            torch.manual_seed(5)
            call(x).square().mean().backward()
            gradients.append([x.grad, layer.lora_a.grad, layer.lora_b.grad])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("case", ["embedding", "2d-groups"])
def test_steps_move_only_the_factors(case):
    layer, x = make_layer(case), make_input(case)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    layer(x).square().mean().backward()
    optimizer.step()
    for name, t in layer.state_dict().items():
        assert torch.equal(t, before[name]) == (name in ("weight", "bias")), name
