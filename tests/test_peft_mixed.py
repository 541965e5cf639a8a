"""Mixed batches through ``adapter_names``, which PEFT takes in evaluation mode only: fused, with and without gradients.

x (samples, ..., K): sample i uses adapter names[i], "__base__" uses none.
"""

import copy

import pytest
import torch
from peft_models import Eager, K, N, assert_accurate, layers, patched_copy, peft_model, run
from test_peft_numerics import REGIMES, Wide, kept_bytes
from torch.utils.checkpoint import checkpoint

from fused_lora.peft_parts import route_mixed

# PEFT's, over a base without bias.
pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True`")
X = torch.randn(7, K, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def eager(monkeypatch):
    return Eager(monkeypatch)


def mixed_model(seed=0, trained=False, **config):
    """Three adapters, the first one active; ``trained``: all of them want gradients, biases of the base too."""
    model = peft_model(seed=seed, adapters=3, train=False, lora_bias=True, **config)
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        if trained and ("lora_" in name or name.endswith("base_layer.bias")):
            parameter.requires_grad_()
    return model


MIXES = {
    "sorted": ["default"] * 2 + ["__base__"] + ["other"] * 4,
    "shuffled": ["other", "__base__", "default", "third", "default", "other", "__base__"],
    "one": ["third"] * 7,
    "base": ["__base__"] * 7,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(7,), (7, 3), (7, 2, 3)], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_mixed_batches(mix, lead, dtype):
    x, model, names = torch.randn(*lead, K).to(dtype), mixed_model(), MIXES[mix]
    for layer in layers(model):
        layer.base_layer.to(dtype)  # the adapters stay in float32
    ours, _ = patched_copy(model)
    with torch.no_grad():
        expected, result = model(x, adapter_names=names), ours(x, adapter_names=names)
        truth = copy.deepcopy(model).double()(x.double(), adapter_names=names)
        fused = not isinstance(route_mixed(layers(ours)[0], x, names), str)
    assert fused == (mix != "base")  # where PEFT too runs the base layer alone
    assert result.dtype == expected.dtype
    for norm in (torch.max, lambda errors: errors.square().mean()):
        assert norm((result - truth).abs()) <= 2 * norm((expected - truth).abs())


def three_runs(model, x, dy, names, autocast=None):
    """(ours, PEFT's, the truth) of one draw, with gradients."""
    ours, _ = patched_copy(model)
    truth = run(copy.deepcopy(model).double(), x.double(), dy.double(), adapter_names=names)
    plain = run(model, x, dy, autocast, adapter_names=names)
    return run(ours, x, dy, autocast, adapter_names=names), plain, truth


@pytest.mark.parametrize(
    ("base", "mix"), [*(("linear", mix) for mix in MIXES), ("no-bias", "shuffled"), ("conv1d", "shuffled")]
)
@pytest.mark.parametrize("regime", REGIMES)
def test_gradients_of_mixed_batches(regime, base, mix, eager):
    """y and every gradient that PEFT has: of x, of the biases and of the adapters in the batch, and of no other."""
    dtype, cast_adapters, autocast = REGIMES[regime]
    names, draws, calls = MIXES[mix] * 6, [], []
    for seed in range(6):
        model = mixed_model(seed, trained=True, base=base, dtype=dtype, cast_adapters=cast_adapters)
        # Of few rows a bias gradient is a sum without any rounding, and the rule would compare accidents.
        x, dy = torch.randn(42, 40, K).to(dtype), torch.randn(42, 40, 3 * N).to(dtype)
        before = eager.calls
        draws.append(three_runs(model, x, dy, names, autocast))
        calls.append(eager.calls - before)
    assert calls == [9 if mix == "base" else 6] * 6  # PEFT's two models; of "base" PEFT too runs the base layers alone
    assert_accurate(draws)


@pytest.mark.parametrize("lead", [(7,), (7, 0), (7, 2, 3), (0, 4)], ids=str)
def test_gradients_of_mixed_batches_of_any_shape(lead):
    names = MIXES["shuffled"][: lead[0]]
    draws = []
    for seed in range(12):
        model = mixed_model(seed, trained=True)
        draws.append(three_runs(model, torch.randn(*lead, K), torch.randn(*lead, 3 * N), names))
    assert_accurate(draws)


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B", "default"])
def test_gradients_of_mixed_batches_that_are_asked_for(wanted):
    draws = []
    for seed in range(6):
        model = mixed_model(seed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted in name)
        draws.append(three_runs(model, torch.randn(42, 8, K), torch.randn(42, 8, 3 * N), MIXES["shuffled"] * 6))
    named = [name for name in draws[0][0].results if "lora" in name]
    assert all(wanted in name for name in named)
    assert bool(named) == (wanted != "x")
    assert_accurate(draws)


@pytest.mark.parametrize("scale", [0.0, torch.tensor(0.75), torch.tensor(-2.0, dtype=torch.float64)], ids=str)
def test_mixed_batches_with_another_scaling(scale):
    draws = []
    for seed in range(6):
        model = mixed_model(seed, trained=True)
        for layer in layers(model):
            layer.scaling["other"] = scale
        draws.append(three_runs(model, torch.randn(42, 8, K), torch.randn(42, 8, 3 * N), MIXES["shuffled"] * 6))
    assert_accurate(draws)


@pytest.mark.parametrize("scale", [0.0, 1e-46])
def test_infinite_factors_show_in_mixed_batches_at_every_scale(scale):
    model = mixed_model()
    for layer in layers(model):
        layer.scaling["other"] = scale
        with torch.no_grad():
            layer.lora_B["other"].weight[2] = torch.inf
    ours, _ = patched_copy(model)
    with torch.no_grad():
        y, expected = (each(X, adapter_names=MIXES["shuffled"]) for each in (ours, model))
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert not y[[0, 5]].isfinite().all()


def test_second_derivatives_of_mixed_batches():
    model = mixed_model(trained=True).double()
    ours, _ = patched_copy(model)
    x, dy = torch.randn(7, 2, K).double(), torch.randn(7, 2, 3 * N).double()
    results = []
    for m in (ours, model):
        leaf, weights = x.clone().requires_grad_(), dy.clone().requires_grad_()
        parameters = [p for n, p in m.named_parameters() if p.requires_grad]
        first = torch.autograd.grad(
            m(leaf, adapter_names=MIXES["shuffled"]), [leaf, *parameters], weights, create_graph=True
        )
        total = sum(gradient.square().sum() for gradient in first)
        # The gradients of a bias are constants.
        second = torch.autograd.grad(total, [leaf, weights, *parameters], allow_unused=True)
        results.append([*first, *(gradient for gradient in second if gradient is not None)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)  # float64 on both sides


@pytest.mark.parametrize("mix", ["sorted", "shuffled"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_mixed_batches(reentrant, mix):
    """Recomputed the same bits, also where the first pass has no gradients, and work in place on y is allowed."""
    ours, _ = patched_copy(mixed_model(trained=True))
    x, results = torch.randn(7, 3, K), []

    def forward(x):
        for layer in layers(ours):
            layer(x, adapter_names=MIXES[mix]).mul_(2)
        return ours(x, adapter_names=MIXES[mix])

    for call in (forward, lambda x: checkpoint(forward, x, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        ours.zero_grad()
        y = call(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in ours.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("regime", ["R1-bf16", "R2-bf16", "R3-autocast", "R3-base16", "R4-fp32"])
def test_kept_bytes_of_mixed_batches(regime):
    from peft import LoraConfig, get_peft_model

    dtype, cast_adapters, autocast = REGIMES[regime]
    config = LoraConfig(r=4, target_modules=["q", "k", "v"])
    model = get_peft_model(Wide().to(dtype), config, autocast_adapter_dtype=cast_adapters)
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name and not cast_adapters:  # PEFT 0.18's add_adapter has no argument for it
            parameter.data = parameter.data.to(dtype)
    model.eval()
    ours, _ = patched_copy(model)
    x = torch.randn(64, 64, 256, dtype=dtype, requires_grad=True) * 1
    names = ["default", "__base__", "other", "default"] * 16
    kept = [kept_bytes(m, x, autocast, adapter_names=names) for m in (ours, model)]
    print(f"\n{regime}, mixed batch: kept {kept[0]:.2f} x bytes(x), PEFT {kept[1]:.2f}")
    assert kept[0] <= 1.15 < kept[1]


def test_mixed_batches_keep_adapters_apart():
    """A broken adapter reaches its own samples only."""
    model = mixed_model()
    ours, _ = patched_copy(model)
    for layer in layers(ours):
        layer.lora_B["other"].weight.data.fill_(torch.nan)
    with torch.no_grad():
        broken = ours(X, adapter_names=MIXES["shuffled"]).isnan().any(1)
    assert broken.tolist() == [name == "other" for name in MIXES["shuffled"]]
    x = X.clone().requires_grad_()
    y = ours(x, adapter_names=MIXES["shuffled"])
    y.sum().backward()
    assert y.isnan().any(1).tolist() == x.grad.isnan().any(1).tolist() == broken.tolist()
    assert layers(ours)[0].lora_A["default"].weight.grad.isfinite().all()


def test_mixed_batches_that_peft_must_decide():
    model = mixed_model()
    ours, _ = patched_copy(model)
    names = MIXES["shuffled"]
    for wrong in (names[:3], [*names[:-1], "nobody"]):
        messages = []
        for m in (model, ours):
            with torch.no_grad(), pytest.raises(ValueError) as raised:
                m(X, adapter_names=wrong)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    for m in (model, ours):  # the length comes before the names, which cannot even be looked up
        with pytest.raises(ValueError, match="should be the same as"):
            layers(m)[0](X, adapter_names=[["default"]] * 3)
    ours.train()
    with pytest.raises(ValueError, match="training mode"):
        ours(X, adapter_names=names)


def trained_base(model):
    for layer in layers(model):
        layer.base_layer.weight.requires_grad_()


def dropout_in_training(model):
    for layer in layers(model):
        layer.lora_dropout["other"] = torch.nn.Dropout(0.5)


@pytest.mark.parametrize("edit", [trained_base, dropout_in_training], ids=lambda edit: edit.__name__)
def test_mixed_batches_on_peft_s_forward(edit, eager):
    model = mixed_model()
    edit(model)
    ours, _ = patched_copy(model)
    results, dy = [], torch.randn(7, 3 * N)
    for m in (ours, model):
        torch.manual_seed(3)
        results.append(run(m, X, dy, adapter_names=MIXES["shuffled"]))
    assert eager.calls == 6
    assert results[0].equals(results[1])


def test_compiled_mixed_batches():
    """A list of names is a constant of the graph: PEFT's forward is traced, and gives PEFT's numbers."""
    model = mixed_model(trained=True)
    ours, _ = patched_copy(model)
    results, dy = [], torch.randn(7, 3 * N)
    for m in (ours, model):
        torch._dynamo.reset()
        results.append(run(torch.compile(m, backend="aot_eager"), X, dy, adapter_names=MIXES["shuffled"]))
    assert results[0].equals(results[1])


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_scaling_does_not_leave_the_range_of_float16(autocast, lora_bias):
    """s times the scale is more than float16 holds; s is not, nor that times B."""
    dtype = torch.float32 if autocast else torch.float16
    model = peft_model(train=False, dtype=dtype, cast_adapters=False, r=1, lora_alpha=64, lora_bias=lora_bias)
    for layer in layers(model):
        layer.lora_A["default"].weight.data.fill_(0.02)
        layer.lora_B["default"].weight.data.fill_(1e-3)
        layer.base_layer.weight.data.mul_(0.01)
        if lora_bias:
            layer.lora_B["default"].bias.data.fill_(0.5)
    ours, _ = patched_copy(model)
    x, names = torch.full((2, K), 4000.0, dtype=dtype), ["default"] * 2  # s = 4880
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=autocast):
        assert not isinstance(route_mixed(layers(ours)[0], x, names), str)
        y, expected = ours(x, adapter_names=names), model(x, adapter_names=names)
    assert expected.isfinite().all()
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=0.5)
