"""The keep mask: the documented function, its statistics, and that the operator applies exactly it.

x (M, K)   lora_a (R, K)   lora_b (N, R)   s = drop(x) Aᵀ (M, R)
"""

import math

import numpy as np
import pytest
import torch
from accuracy import STRATEGIES, Case, block_sizes, make_inputs, run
from torch import nn

from fused_lora import blocks, lora_linear, reference
from fused_lora.dropout import GOLDEN, GROUP, MIX1, MIX2, STEP, keep_mask, keep_scale

WORD = 0xFFFFFFFF
PS = [0.1, 0.5, 0.9]


def mix(h: int) -> int:
    h = (h ^ h >> 16) * MIX1 & WORD
    h = (h ^ h >> 15) * MIX2 & WORD
    return h ^ h >> 16


def keeps(seed: int, row: int, col: int, p: float) -> bool:
    """The function of the docstring of fused_lora/dropout.py, one element at a time, on Python integers."""
    low, high = seed & WORD, seed >> 32 & WORD
    key0 = mix(low ^ mix(high ^ GOLDEN))
    key1 = mix(key0 ^ high)
    r0 = mix(row // 8 ^ key0)
    r1 = mix(r0 + key1 & WORD) | 1
    u = col * GOLDEN + r0 & WORD
    u = (u ^ u >> 16) * r1 & WORD
    h = (u ^ u >> 15) * MIX2 * STEP ** (row % 8) & WORD
    signed = h - 2**32 if h >= 2**31 else h
    return signed > round(p * 2**32) - 2**31 - 1


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 + 5, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.999])
def test_the_mask_is_the_documented_function(seed, p):
    expected = [[keeps(seed, row, col, p) for col in range(37)] for row in range(23)]
    assert keep_mask(seed, 23, 37, p).tolist() == expected


@pytest.mark.parametrize("p", PS)
def test_a_row_depends_on_nothing_but_seed_index_and_p(p):
    whole = keep_mask(9, 200, 64, p)
    assert torch.equal(whole[:70], keep_mask(9, 70, 64, p))
    assert torch.equal(whole[:, :13], keep_mask(9, 200, 13, p))


def test_the_ends_of_p():
    assert keep_mask(3, 50, 60, 0.0).all()
    assert not keep_mask(3, 50, 60, 1.0).any()
    assert keep_scale(0.0) == 1.0
    assert keep_scale(1.0) == 0.0
    assert keep_scale(0.75) == 4.0
    assert keep_mask(3, 0, 60, 0.5).shape == (0, 60)
    assert keep_mask(3, 50, 0, 0.5).shape == (50, 0)


def test_an_int_and_a_tensor_are_the_same_seed():
    for seed in (7, -3, 2**40):
        expected = keep_mask(seed, 20, 30, 0.5)
        assert torch.equal(keep_mask(torch.tensor(seed), 20, 30, 0.5), expected)
        assert torch.equal(keep_mask(torch.tensor([seed]), 20, 30, 0.5), expected)


def within(observed, expected, deviation):
    """4 standard deviations: an ideal mask strays as far once in 16 000 times; these masks are the same in each run."""
    assert np.all(np.abs(np.asarray(observed) - expected) <= 4 * deviation), (observed, expected, deviation)


ROWS, COLS = 768, 512


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("seed", [0, 1, 2, 3, -1, 12345, 2**31, 2**32, 2**33, 2**62])
def test_the_kept_share_of_a_seed(seed, p):
    share = keep_mask(seed, ROWS, COLS, p).double().mean()
    within(share, 1 - p, math.sqrt(p * (1 - p) / (ROWS * COLS)))


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("dim", [0, 1], ids=["columns", "rows"])
def test_the_kept_share_of_each_row_and_column(dim, p):
    keep = keep_mask(77, ROWS, COLS, p).double()
    length, lines = keep.shape[dim], keep.shape[1 - dim]
    z = (keep.mean(dim) - (1 - p)) / math.sqrt(p * (1 - p) / length)
    within(z, 0, 1)
    # And they stray as much as they should: shares that are too even are no more random than those that are not.
    within(z.square().mean(), 1, math.sqrt(2 / lines))


def test_the_kept_share_of_one_element_over_seeds():
    kept = [keep_mask(seed, 3, 5, 0.5).double() for seed in range(4000)]
    within(torch.stack(kept).mean(0), 0.5, math.sqrt(0.25 / 4000))


def correlation(first, second, p):
    return ((first.double() - (1 - p)) * (second.double() - (1 - p))).mean() / (p * (1 - p))


@pytest.mark.parametrize("p", PS)
def test_neighbouring_seeds_are_uncorrelated(p):
    for seed in (0, 1, 41, -1, 2**31 - 1):
        for step in (1, 2, 2**16, 2**32, -(2**40)):
            value = correlation(keep_mask(seed, ROWS, COLS, p), keep_mask(seed + step, ROWS, COLS, p), p)
            within(value, 0, 1 / math.sqrt(ROWS * COLS))


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("lag", [1, 2, 3, 8, 16, 32, 64, 128, 256])
def test_neighbouring_columns_and_rows_are_uncorrelated(lag, p):
    keep = keep_mask(5, ROWS, COLS, p)
    for first, second in (
        (keep[:, lag:], keep[:, :-lag]),
        (keep[lag:], keep[:-lag]),
        (keep[lag:, lag:], keep[:-lag, :-lag]),
    ):
        within(correlation(first, second, p), 0, 1 / math.sqrt(first.numel()))


@pytest.mark.parametrize("p", [0.05, *PS])
@pytest.mark.parametrize("seed", [0, 77])
def test_the_rows_of_a_group_are_independent_together(seed, p):
    """They come of one hash: each of the 256 ways in which eight elements drop must be as frequent as chance has it."""
    groups = 256
    dropped = ~keep_mask(seed, groups * GROUP, 2048, p).view(groups, GROUP, -1)
    pattern = (dropped.long() << torch.arange(GROUP)[:, None]).sum(1)
    found = torch.bincount(pattern.flatten(), minlength=2**GROUP).double().numpy()
    drops = np.array([value.bit_count() for value in range(2**GROUP)])
    expected = pattern.numel() * p**drops * (1 - p) ** (GROUP - drops)
    often = expected >= 8
    chi = ((found - expected) ** 2 / expected)[often].sum()
    within(chi, often.sum(), math.sqrt(2 * often.sum()))
    rare = (found[~often].sum(), expected[~often].sum())
    within(rare[0], rare[1], math.sqrt(max(rare[1], 1)))


def test_no_seed_repeats_anothers_rows():
    """A row of one seed must not turn up as some row of another, as it would if seed and row were only added."""
    masks = torch.cat([keep_mask(seed, 256, 128, 0.5) for seed in range(8)])
    assert len({row.numpy().tobytes() for row in masks}) == len(masks)


def identity_operator(M, K, p, seed, strategy, dtype=torch.float32):
    """y, dx and da of the operator made of identities: each is the scaled mask the strategy really applied."""
    x = torch.ones(M, K, dtype=dtype, requires_grad=True)
    a = torch.eye(K, dtype=dtype, requires_grad=True)
    b = torch.eye(K, dtype=dtype)
    y = lora_linear(x, torch.zeros(K, K, dtype=dtype), a, b, 1.0, dropout_p=p, seed=seed, strategy=strategy)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    dy = torch.zeros(M, K, dtype=dtype)
    row = M // 2
    dy[row] = 1.0
    (da,) = torch.autograd.grad(y, a, dy)
    return y.detach(), dx, da, row


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (7, 5), (33, 31)])
def test_forward_dx_and_da_apply_the_same_mask(M, K, p, dtype, strategy):
    y, dx, da, row = identity_operator(M, K, p, 2**40 + 3, strategy, dtype)
    expected = (keep_mask(2**40 + 3, M, K, p) * keep_scale(p)).to(dtype)
    assert torch.equal(y, expected)
    assert torch.equal(dx, expected)
    assert torch.equal(da, expected[row].expand(K, K))


def test_the_mask_has_no_seams_between_blocks():
    """In blocks of 16 rows, in which the torch strategy then walks over x."""
    M, K = 200, 64
    with block_sizes("small"):
        assert len(list(blocks.row_blocks(torch.empty(M, K)))) > 2
        y, dx, da, row = identity_operator(M, K, 0.5, 3, "torch")
    expected = keep_mask(3, M, K, 0.5) * 2.0
    assert torch.equal(y, expected)
    assert torch.equal(dx, expected)
    assert torch.equal(da, expected[row].expand(K, K))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_rows_of_the_mask_are_the_rows_of_flattened_x(strategy):
    case = Case((2, 3, 5), N=7, K=11, R=3, p=0.5, biases="both")
    inputs = make_inputs(case)
    flat = inputs | {"x": inputs["x"].reshape(30, 11), "dy": inputs["dy"].reshape(30, 7)}
    expected = run(lora_linear, case, flat, 8, strategy)
    for name, result in run(lora_linear, case, inputs, 8, strategy).items():
        assert torch.equal(result.reshape(expected[name].shape), expected[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("regime", ["float32", "bfloat16+float32"])
def test_a_column_dropped_in_every_row_has_no_gradient_in_a(regime, strategy):
    M, K, p = 3, 40, 0.5
    dropped = ~keep_mask(6, M, K, p).any(0)
    assert 0 < dropped.sum() < K
    case = Case((M,), N=9, K=K, R=4, regime=regime, p=p)
    da = run(lora_linear, case, make_inputs(case), 6, strategy)["dlora_a"]
    assert not da[:, dropped].any()
    assert da[:, ~dropped].any(0).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_dropped_element_that_is_not_finite_is_dropped(strategy):
    """Zero times infinity is not a number: what is dropped has to be replaced, not multiplied."""
    keep = keep_mask(6, 4, 8, 0.5)
    x = torch.ones(4, 8).masked_fill(~keep, float("inf"))
    a, b = torch.ones(2, 8, requires_grad=True), torch.ones(8, 2, requires_grad=True)
    y = lora_linear(x, torch.zeros(8, 8), a, b, dropout_p=0.5, seed=6, strategy=strategy)
    y.backward(torch.ones_like(y))
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("regime", ["float32", "bfloat16", "bfloat16+float32"])
def test_p_of_one_drops_the_branch_as_nn_dropout_does(regime, strategy):
    case = Case((5,), N=9, K=7, R=3, regime=regime, p=1.0)
    inputs = make_inputs(case)
    results = run(lora_linear, case, inputs, 5, strategy)
    frozen = run(reference.lora_linear, case, inputs | {"lora_b": torch.zeros_like(inputs["lora_b"])}, 5)
    torch.testing.assert_close(results["y"], frozen["y"])
    torch.testing.assert_close(results["dx"], frozen["dx"])
    assert not results["dlora_a"].any()
    assert not results["dlora_b"].any()
    assert not nn.Dropout(1.0)(inputs["x"]).any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_false_is_no_dropout(strategy):
    inputs = make_inputs(Case((5,), N=9, K=7, R=3))
    args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    expected = lora_linear(*args, 2.0, strategy=strategy)
    state = torch.get_rng_state()
    for p in (0.1, 1.0):
        assert torch.equal(lora_linear(*args, 2.0, dropout_p=p, training=False, strategy=strategy), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_manual_seed_repeats_the_mask_and_calls_differ(strategy):
    inputs = make_inputs(Case((5,), N=9, K=7, R=3))
    args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]

    def two_calls():
        torch.manual_seed(4)
        return [lora_linear(*args, dropout_p=0.5, strategy=strategy) for _ in range(2)]

    first, second = two_calls(), two_calls()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])  # two layers, two masks


def test_only_a_mask_without_a_seed_draws_from_the_generator():
    inputs = make_inputs(Case((5,), N=9, K=7, R=3))
    args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    state = torch.get_rng_state()
    lora_linear(*args)
    lora_linear(*args, dropout_p=0.5, seed=3)
    lora_linear(*args, dropout_p=0.5, seed=torch.tensor(3))
    assert torch.equal(torch.get_rng_state(), state)
    lora_linear(*args, dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), state)


def test_the_mean_over_seeds_is_the_layer_without_dropout():
    """What 1 / (1 - p) is for."""
    inputs = make_inputs(Case((4,), N=9, K=7, R=3, regime="float64"))
    args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    draws = torch.stack([lora_linear(*args, 2.0, dropout_p=0.3, seed=seed) for seed in range(2000)])
    deviation = draws.std(0) / math.sqrt(len(draws))
    within(draws.mean(0), lora_linear(*args, 2.0).numpy(), deviation.numpy())


def test_vmap_over_masks():
    x, w, a, b = torch.randn(3, 4, 70), torch.randn(10, 70), torch.randn(4, 70), torch.randn(10, 4)
    seeds = torch.tensor([1, 2**40, -7])
    y = torch.func.vmap(lambda t, seed: lora_linear(t, w, a, b, 2.0, dropout_p=0.5, seed=seed))(x, seeds)
    for row, t, seed in zip(y, x, seeds, strict=True):
        torch.testing.assert_close(row, lora_linear(t, w, a, b, 2.0, dropout_p=0.5, seed=seed))
    draw = torch.func.vmap(lambda t: lora_linear(t, w, a, b, dropout_p=0.5), randomness="different")
    drawn = draw(x[:1].expand(3, 4, 70))
    assert not torch.equal(drawn[0], drawn[1])
