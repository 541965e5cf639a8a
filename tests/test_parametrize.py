"""LoRA through torch.nn.utils.parametrize: start, gradients, switch, both removals, misuse."""

import copy

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


def test_state_dict_round_trips_and_only_the_factors_move(case):
    module, name, shape = case
    lora_parametrize(module, name, r=2)
    base = getattr(module.parametrizations, name).original.detach().clone()
    optimizer = torch.optim.AdamW(lora_parameters(module), lr=0.1)
    for _ in range(2):
        run(module, shape).square().sum().backward()
        optimizer.step()
    assert torch.equal(getattr(module.parametrizations, name).original, base)
    state, wanted = copy.deepcopy(module.state_dict()), run(module, shape)
    for p in lora_parameters(module):
        nn.init.zeros_(p)
    assert not torch.equal(run(module, shape), wanted)
    assert module.load_state_dict(state) == ([], [])
    assert torch.equal(run(module, shape), wanted)


def test_a_tied_weight_keeps_its_base_elsewhere():
    embed, head = nn.Embedding(11, 5), nn.Linear(5, 11, bias=False)
    head.weight = embed.weight
    weight, x = embed.weight, torch.randn(2, 5)
    before = head(x)
    nn.init.normal_(lora_parametrize(embed, r=2).parametrizations.weight[0].lora_b)
    assert torch.equal(head(x), before)
    assert embed.parametrizations.weight.original is head.weight is weight
    lora_unparametrize(embed)
    assert embed.weight is head.weight is weight


def test_weights_that_a_module_reads_itself():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = attention(x, x, x)[0]
    lora_parametrize(attention, "in_proj_weight", r=2)
    lora_parametrize(attention.out_proj, r=2)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, x, x)[0], before)
        for p in lora_parameters(attention):
            nn.init.normal_(p)
        assert not torch.allclose(attention(x, x, x)[0], before, atol=0.1)
    attention(x, x, x)[0].sum().backward()
    assert all(p.grad.any() for p in lora_parameters(attention))
    set_lora_enabled(attention, False)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, x, x)[0], before)


def test_compiles_whole():
    torch._dynamo.reset()
    module, x = lora_parametrize(nn.Linear(12, 7), r=2), torch.randn(3, 12)
    nn.init.normal_(module.parametrizations.weight[0].lora_b)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_rounds_no_weight(dtype):
    module = lora_parametrize(nn.Linear(12, 7, dtype=dtype), r=2)
    base = module.parametrizations.weight.original
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.weight, base)
    nn.init.normal_(module.parametrizations.weight[0].lora_b)
    wanted = module.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.weight, wanted)


@pytest.mark.parametrize("enabled", [True, False])
def test_merging_leaves_a_tied_weight_to_the_others(enabled):
    embed, head = nn.Embedding(11, 5), nn.Linear(5, 11, bias=False)
    head.weight = embed.weight
    weight, before = embed.weight, embed.weight.detach().clone()
    nn.init.normal_(lora_parametrize(head, r=2).parametrizations.weight[0].lora_b)
    set_lora_enabled(head, enabled)
    merged = head.weight.detach().clone()
    lora_unparametrize(head, merge=True)
    assert torch.equal(head.weight, merged)
    assert embed.weight is weight
    assert torch.equal(embed.weight, before)
    assert type(head.weight) is nn.Parameter
    assert not head.weight.requires_grad
    assert (head.weight is weight) != enabled


def test_a_weight_of_two_originals():
    module = nn.utils.parametrizations.weight_norm(nn.Linear(12, 7))
    x = torch.randn(3, 12)
    before = module(x)
    lora_parametrize(module, r=2)
    torch.testing.assert_close(module(x), before)
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trained == ["bias", "parametrizations.weight.1.lora_a", "parametrizations.weight.1.lora_b"]
    nn.init.normal_(module.parametrizations.weight[1].lora_b)
    assert not torch.allclose(module(x), before)
    set_lora_enabled(module, False)
    assert torch.equal(module(x), before)
