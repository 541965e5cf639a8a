"""LoRA through torch.nn.utils.parametrize: start, gradients, switch, both removals, misuse."""

import pytest
import torch
from torch import nn

from fused_lora import count_parameters, lora_parameters
from fused_lora.parametrize import lora_parametrize, lora_unparametrize, set_lora_enabled

CASES = {
    "linear": (lambda: nn.Linear(12, 7), "weight", (3, 12)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), "weight", (2, 4, 8, 8)),
    "embedding": (lambda: nn.Embedding(11, 5), "weight", None),
    "recurrent": (lambda: nn.GRU(6, 4, batch_first=True), "weight_hh_l0", (2, 5, 6)),
}


def run(module, shape):
    x = torch.arange(6) if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(1))
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.fixture(params=CASES)
def case(request):
    build, name, shape = CASES[request.param]
    return build(), name, shape


def test_starts_as_the_base_and_trains_only_the_factors(case):
    module, name, shape = case
    before = run(module, shape)
    lora_parametrize(module, name, r=2, lora_alpha=4)
    assert torch.equal(run(module, shape), before)
    run(module, shape).square().sum().backward()
    entry = module.parametrizations[name][0]
    assert entry.lora_b.grad.abs().sum() > 0
    assert module.parametrizations[name].original.grad is None


def test_the_weight_is_the_sum(case):
    module, name, _ = case
    base = getattr(module, name).detach().clone()
    lora_parametrize(module, name, r=2, lora_alpha=3)
    entry = module.parametrizations[name][0]
    nn.init.normal_(entry.lora_b)
    truth = base.double() + 1.5 * (entry.lora_b.double() @ entry.lora_a.double()).view(base.shape)
    torch.testing.assert_close(getattr(module, name).double(), truth, rtol=1e-6, atol=1e-6)


def test_disabled_is_the_base_bit_for_bit(case):
    module, name, shape = case
    before = run(module, shape)
    lora_parametrize(module, name, r=3)
    nn.init.normal_(module.parametrizations[name][0].lora_b)
    assert not torch.equal(run(module, shape), before)
    assert set_lora_enabled(module, False) == 1
    assert torch.equal(run(module, shape), before)
    set_lora_enabled(module, True)
    assert not torch.equal(run(module, shape), before)


def test_counted_and_listed_as_lora():
    model = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3)).requires_grad_(False)
    for layer in (model[0], model[2]):
        lora_parametrize(layer, r=2)
    assert count_parameters(model) == (115 + 58, 58, 58)
    assert {id(p) for p in lora_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}


def test_removal_restores_or_bakes_in(case):
    module, name, shape = case
    original = getattr(module, name)
    before = run(module, shape)
    lora_parametrize(module, name, r=3)
    lora_unparametrize(module, name)
    assert getattr(module, name) is original
    assert torch.equal(run(module, shape), before)

    lora_parametrize(module, name, r=3)
    nn.init.normal_(module.parametrizations[name][0].lora_b)
    adapted = run(module, shape)
    lora_unparametrize(module, name, merge=True)
    assert torch.equal(run(module, shape), adapted)
    assert [key for key, _ in module.named_parameters() if "lora" in key] == []


def test_low_precision_weight_has_float32_factors_and_one_rounding():
    torch.manual_seed(0)  # where float32 lands on a tie of bfloat16, rounding twice may differ: not with this draw
    module = lora_parametrize(nn.Linear(8, 8).bfloat16(), r=2, lora_alpha=2)
    entry = module.parametrizations.weight[0]
    assert entry.lora_a.dtype == torch.float32
    nn.init.normal_(entry.lora_b)
    base = module.parametrizations.weight.original
    assert torch.equal(module.weight, (base.double() + entry.lora_b.double() @ entry.lora_a.double()).bfloat16())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: lora_parametrize(m, "wieght"), "no parameter 'wieght'; it has weight, bias"),
        (lambda m: lora_parametrize(m, "bias"), "two or more dimensions"),
        (lambda m: lora_parametrize(m, "weight", r=0), "r must be at least 1, got 0"),
        (lambda m: lora_parametrize(lora_parametrize(m)), "already carries LoRA"),
        (lambda m: lora_unparametrize(m), "does not carry LoRA"),
    ],
)
def test_misuse(call, message):
    with pytest.raises(ValueError, match=message):
        call(nn.Linear(4, 4))
