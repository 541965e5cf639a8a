"""Patched PEFT layers against PEFT's own: the accuracy rule wherever the forward is fused, and what is kept.

K in_features, N out_features, R rank; x (..., K).
"""

import copy

import pytest
import torch
from peft_models import K, N, R, assert_accurate, layers, patched_copy, peft_model, randomize, run
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lora import dora, peft_forward, peft_status
from fused_lora.dropout import keep_mask, keep_scale

DRAWS = 12  # the smallest result, dlora_bias, has 45 elements: the rule needs a few hundred
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# name: dtype of the base and of x, whether adapters are float32 over it (PEFT's default), autocast
REGIMES = {
    "R1-bf16": (BF16, True, None),
    "R1-fp16": (F16, True, None),
    "R2-bf16": (BF16, False, None),
    "R2-fp16": (F16, False, None),
    "R3-autocast": (F32, True, BF16),
    "R3-base16": (BF16, True, BF16),
    "R4-fp32": (F32, True, None),
}
# What a configuration asks for beside the defaults; ``scaling`` and ``edit`` act on the finished layer.
CONFIGS = {
    "plain": {},
    "no-bias": {"base": "no-bias"},
    "conv1d": {"base": "conv1d"},
    "lora-bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
    "trained-bias": {"bias": "all"},
    "several": {"adapters": 3},
    "several-one-rank": {"adapters": 3, "other_rank": R, "lora_bias": True},
    "dora": {"use_dora": True},
    "dora-conv1d": {"use_dora": True, "base": "conv1d"},
}


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def three_runs(model, x, dy, autocast=None, patch=None, **kwargs):
    """(ours, PEFT's, the truth) of one draw."""
    patched, report = patched_copy(model, **(patch or {}))
    assert report.fused == len(report.layers) == 3, report
    ours = run(patched, x, dy, autocast, **kwargs)
    plain = run(model, x, dy, autocast, **kwargs)
    truth = run(copy.deepcopy(model).double(), x.double(), dy.double(), **kwargs)
    return ours, plain, truth


def inputs(dtype, lead=(40,)):
    return torch.randn(*lead, K).to(dtype), torch.randn(*lead, 3 * N).to(dtype)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("regime", REGIMES)
def test_accuracy_rule(regime, config):
    dtype, cast_adapters, autocast = REGIMES[regime]
    draws = []
    for seed in range(DRAWS):
        model = peft_model(dtype=dtype, seed=seed, cast_adapters=cast_adapters, **CONFIGS[config])
        # Of few rows a bias gradient is a sum without any rounding, and the rule would compare accidents.
        draws.append(three_runs(model, *inputs(dtype, (300,)), autocast=autocast))
    assert_accurate(draws)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (3, 0, 2), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("config", ["plain", "conv1d", "several", "dora"])
def test_shapes_of_x(config, lead):
    if config == "conv1d" and 0 in lead:
        pytest.skip("transformers' Conv1D itself refuses x without rows")
    if config == "dora" and lead == ():
        pytest.skip("PEFT's DoRA gives a vector a leading dimension; tested with the fallbacks")
    draws = []
    for seed in range(DRAWS):
        draws.append(three_runs(peft_model(seed=seed, **CONFIGS[config]), *inputs(F32, lead)))
    assert draws[0][0].results["y"].shape == (*lead, 3 * N)
    assert_accurate(draws)


def test_strides():
    x, dy = torch.randn(K, 40).t(), torch.randn(3 * N, 40).t()
    draws = [three_runs(peft_model(seed=seed), x, dy) for seed in range(DRAWS)]
    draws += [three_runs(peft_model(seed=seed), torch.randn(80, 2 * K)[::2, ::2], dy) for seed in range(DRAWS)]
    assert_accurate(draws)


def test_tied_and_strided_factors():
    """ensure_weight_tying makes A and B transposed views of one storage."""
    draws = []
    for seed in range(DRAWS):
        model = peft_model(seed=seed)
        for layer in (model.base_model.model.q, model.base_model.model.k):
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            a.weight = nn.Parameter(torch.randn(K, R).t())
            b.weight = nn.Parameter(torch.randn(R, N).t())
            assert not a.weight.is_contiguous()
        draws.append(three_runs(model, *inputs(F32)))
    assert_accurate(draws)


@pytest.mark.parametrize(
    "scaling", [0.0, -1.5, 3, torch.tensor(0.75), torch.tensor(0.75, dtype=torch.float64)], ids=str
)
def test_scaling(scaling):
    draws = []
    for seed in range(DRAWS):
        model = peft_model(seed=seed)
        for layer in (model.base_model.model.q, model.base_model.model.v):
            layer.scaling["default"] = scaling
        draws.append(three_runs(model, *inputs(F32)))
    assert_accurate(draws)


def test_scaling_zero_does_not_hide_infinity():
    model = peft_model()
    for layer in (model.base_model.model.q, model.base_model.model.k, model.base_model.model.v):
        layer.scaling["default"] = 0.0
        layer.lora_A["default"].weight.data[0, 0] = torch.inf
    patched, _ = patched_copy(model)
    x, _ = inputs(F32)
    assert torch.equal(patched(x).isnan(), model(x).isnan())
    assert patched(x).isnan().any()


def test_hotswap_padding():
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    draws = []
    for seed in range(DRAWS):
        model = peft_model(seed=seed)
        prepare_model_for_compiled_hotswap(model, target_rank=2 * R)
        layer = model.base_model.model.q
        assert layer.lora_A["default"].weight.shape == (2 * R, K)
        assert layer.r["default"] == R
        assert isinstance(layer.scaling["default"], torch.Tensor)
        draws.append(three_runs(model, *inputs(F32)))
    assert_accurate(draws)


@pytest.mark.parametrize("regime", ["R1-bf16", "R2-bf16", "R3-autocast", "R4-fp32"])
@pytest.mark.parametrize("config", ["plain", "dora", "several", "several-one-rank"])
def test_dropout_with_the_same_mask(regime, config, monkeypatch):
    """PEFT's layer, given our masks as its dropout modules, against the patched layer that draws them."""
    dtype, cast_adapters, autocast = REGIMES[regime]
    p, seeds = 0.3, [torch.tensor(s) for s in (11, -22, 33, 44, -55, 66, 77, 88, -99)]
    draws = []
    for seed in range(DRAWS):
        model = peft_model(dtype=dtype, seed=seed, cast_adapters=cast_adapters, lora_dropout=p, **CONFIGS[config])
        x, dy = inputs(dtype)
        patched, report = patched_copy(model)
        assert report.fused == 3
        draw_these(seeds, monkeypatch)
        ours = run(patched, x, dy, autocast)
        queue = iter(seeds)
        for layer in layers(model):
            for adapter in layer.active_adapters:
                layer.lora_dropout[adapter] = FixedMask(next(queue), p)
        plain = run(model, x, dy, autocast)
        draws.append((ours, plain, run(copy.deepcopy(model).double(), x.double(), dy.double())))
    assert_accurate(draws)


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]], ids="-".join)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_adapters_of_two_dtypes(p, order, monkeypatch):
    """A bfloat16 adapter beside a float32 one over a bfloat16 base, in PEFT's order of casts."""
    draws = []
    for seed in range(DRAWS):
        model = peft_model(dtype=BF16, seed=seed, adapters=2, lora_dropout=p, lora_bias=True)
        model.base_model.set_adapter(order)
        seeds = [torch.tensor(i) for i in range(6)]
        for layer in layers(model):
            layer.lora_A["other"].to(BF16), layer.lora_B["other"].to(BF16)
        x, dy = inputs(BF16, (300,))
        patched, report = patched_copy(model)
        assert report.fused == 3
        draw_these(seeds, monkeypatch)
        ours, queue = run(patched, x, dy), iter(seeds)
        for layer in layers(model):
            for name in order:
                layer.lora_dropout[name] = FixedMask(next(queue), p)
        plain = run(model, x, dy)
        draws.append((ours, plain, run(copy.deepcopy(model).double(), x.double(), dy.double())))
    assert_accurate(draws)


def draw_these(seeds, monkeypatch):
    """Let the patched layers draw these seeds, in this order."""
    queue = iter(list(seeds))
    for module in (peft_forward, dora):
        monkeypatch.setattr(module, "draw_seed", lambda device: next(queue))


class FixedMask(nn.Module):
    """Dropout with a given mask; not an nn.Identity, so that PEFT's DoRA takes its dropout path."""

    def __init__(self, seed, p):
        super().__init__()
        self.seed, self.p = seed, p

    def forward(self, x):
        return x * keep_mask(self.seed, len(x), x.shape[-1], self.p).to(x.dtype) * keep_scale(self.p)


def test_dropout_statistics_and_independence():
    """Over many calls the mean output is the undropped one, and two layers of one call have different masks."""
    model, _ = patched_copy(peft_model(base="no-bias", lora_dropout=0.5))
    for layer in (model.base_model.model.q, model.base_model.model.k):
        layer.base_layer.weight.data.zero_()
        layer.lora_B["default"].weight.data.copy_(torch.eye(N, R))
        layer.lora_A["default"].weight.data.copy_(torch.eye(R, K))
        layer.scaling["default"] = 1.0
    y = model(torch.ones(4000, K)).detach()
    q, k = y[:, :R], y[:, N : N + R]
    assert set(q.unique().tolist()) == {0.0, 2.0}
    count = q.numel()
    for mask in (q, k):
        assert abs((mask > 0).float().mean() - 0.5) < 4 * 0.5 / count**0.5
    assert abs(((q > 0) == (k > 0)).float().mean() - 0.5) < 4 * 0.5 / count**0.5
    assert torch.equal(model.eval()(torch.ones(2, K))[:, :R], torch.ones(2, R))


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("regime", REGIMES)
def test_torch_dropout_is_peft_bit_for_bit(regime, adapters):
    dtype, cast_adapters, autocast = REGIMES[regime]
    model = peft_model(dtype=dtype, cast_adapters=cast_adapters, lora_dropout=0.3, adapters=adapters, lora_bias=True)
    patched, report = patched_copy(model, dropout="torch")
    assert report.fused == 3
    x, dy = inputs(dtype)
    results = []
    for m in (patched, model):
        torch.manual_seed(7)
        results.append(run(m, x, dy, autocast))
        results.append(torch.get_rng_state())
    assert results[0].equals(results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["fused", "torch"])
@pytest.mark.parametrize("config", ["plain", "dora"])
def test_checkpointing_recomputes_the_same(config, mode, reentrant):
    model = peft_model(lora_dropout=0.4, **CONFIGS[config])
    patched, _ = patched_copy(model, dropout=mode)
    x, dy = inputs(F32)
    results = []
    for call in (patched, lambda x: checkpoint(patched, x, use_reentrant=reentrant)):
        for parameter in patched.parameters():
            parameter.grad = None
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        call(leaf).backward(dy)
        results.append([leaf.grad, *(p.grad for p in patched.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("config", "p"), [("plain", 0.0), ("several", 0.0), ("dora", 0.0), ("several", 0.3)])
def test_double_backward(config, p, monkeypatch):
    model = peft_model(seed=1, lora_dropout=p, **CONFIGS[config]).double()
    patched, _ = patched_copy(model)
    if p:
        seeds = [torch.tensor(i) for i in range(9)]
        draw_these(seeds, monkeypatch)
        for layer in layers(model):
            for adapter in layer.active_adapters:
                layer.lora_dropout[adapter] = FixedMask(seeds.pop(0), p)
    x, dy = torch.randn(5, K, dtype=torch.float64), torch.randn(5, 3 * N, dtype=torch.float64)
    results = []
    for m in (patched, model):
        leaf, weights = x.clone().requires_grad_(), dy.clone().requires_grad_()
        parameters = [p for p in m.parameters() if p.requires_grad]
        first = torch.autograd.grad(m(leaf), [leaf, *parameters], weights, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), [leaf, weights, *parameters]))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)  # float64 on both sides


def kept_bytes(model, x, autocast=None, **kwargs):
    """Bytes a forward keeps for its backward beside the parameters, in units of x."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return t

    casts = torch.autocast("cpu", autocast or BF16, enabled=autocast is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), casts:
        for layer in layers(model):
            layer(x, **kwargs)
    return sum(s.nbytes() for s in storages.values()) / x.nbytes


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(256, 256) for _ in range(3))


@pytest.mark.parametrize(("p", "mode"), [(0.0, "fused"), (0.1, "fused"), (0.1, "torch")])
@pytest.mark.parametrize("regime", ["R1-bf16", "R2-bf16", "R3-autocast", "R3-base16", "R4-fp32"])
def test_kept_bytes(regime, p, mode):
    from peft import LoraConfig, get_peft_model

    dtype, cast_adapters, autocast = REGIMES[regime]
    config = LoraConfig(r=4, target_modules=["q", "k", "v"], lora_dropout=p)
    model = get_peft_model(Wide().to(dtype), config, autocast_adapter_dtype=cast_adapters)
    randomize(model)
    patched, _ = patched_copy(model, dropout=mode)
    x = torch.randn(4096, 256, dtype=dtype, requires_grad=True) * 1  # no leaf: autocast would cache its cast
    ours, plain = kept_bytes(patched, x, autocast), kept_bytes(model, x, autocast)
    print(f"\n{regime} p={p} dropout={mode!r}: kept {ours:.2f} x bytes(x), PEFT {plain:.2f}")
    assert ours <= (1.35 if p else 1.15)
    if regime != "R2-bf16" or p:  # where both keep x and s, and PEFT's s is in bfloat16
        assert ours <= plain


def test_kept_bytes_of_two_adapters_with_dropout():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q", "k", "v"], lora_dropout=0.1)
    model = get_peft_model(Wide().to(BF16), config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    patched, report = patched_copy(model)
    assert report.fused == 3
    x = torch.randn(4096, 256, dtype=BF16, requires_grad=True) * 1
    ours, plain = kept_bytes(patched, x), kept_bytes(model, x)
    print(f"\ntwo adapters, p=0.1: kept {ours:.2f} x bytes(x), PEFT {plain:.2f}")
    assert ours <= 1.35 < plain


def test_dora_starts_as_the_frozen_layer():
    model = peft_model(use_dora=True)
    for layer in layers(model):
        layer.lora_B["default"].weight.data.zero_()
        layer.lora_magnitude_vector["default"].weight.data.copy_(torch.linalg.norm(layer.base_layer.weight, dim=1))
    patched, report = patched_copy(model)
    assert report.fused == 3
    x, _ = inputs(F32)
    with model.disable_adapter():
        assert torch.equal(patched(x), model(x))


def test_dora_norm_follows_every_write():
    """The cached norm notices optimizer steps, writes through .data as in PEFT's hot swap, a new scale and merging."""
    model = peft_model(use_dora=True, train=False)
    patched, _ = patched_copy(model)
    x, _ = inputs(F32)

    def edit(change):
        for m in (model, patched):
            change(m.base_model.model.q, m)

    changes = [
        lambda layer, m: layer.lora_A["default"].weight.data.mul_(1.5),
        lambda layer, m: layer.lora_B["default"].weight.data.add_(0.1),
        lambda layer, m: layer.scaling.update(default=0.3),
        lambda layer, m: layer.base_layer.weight.requires_grad_(False).mul_(0.5),
        lambda layer, m: (m.merge_adapter(), layer.base_layer.weight.data.mul_(1.0), m.unmerge_adapter()),
        lambda layer, m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
    ]
    for change in changes:
        with torch.no_grad():
            patched(x)
            edit(change)
            torch.testing.assert_close(patched(x), model(x))
    assert peft_status(patched).fused == 3
