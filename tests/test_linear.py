"""The operator's numbers: the accuracy rule over shapes, dtypes, strides and dropout, and what the formula implies.

x (*lead, K)   weight (N, K)   lora_a (R, K)   lora_b (N, R)   bias, lora_bias (N,)   y, dy (*lead, N)
"""

import itertools

import numpy as np
import pytest
import torch
from accuracy import (
    GRADIENTS,
    REGIMES,
    STRATEGIES,
    Case,
    assert_as_accurate_as_plain,
    block_sizes,
    covering,
    formulas,
    make_inputs,
    run,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import fused_lora
from fused_lora import FusedLoRALinear, lora_linear, reference
from fused_lora.dropout import keep_mask

# The full product of the values below is some eight million calls. What goes wrong in this operator goes wrong at one
# value (a rank that no tile divides) or where two meet (a ragged row count and a mask), so every pair of values of two
# factors occurs in some case. Left out everywhere:
#   float64 under autocast (it is never lowered), ranks above 130 (no other path on "torch"; test_kernels.py has the
#   tiles), sizes in the thousands except for rows (only time; LARGE has them once).
_LAYOUTS = ["contiguous", "transposed", "permuted", "strided", "offset", "expanded-x", "expanded-dy"]
_BIASES = ["none", "bias", "lora_bias", "both"]
COVERING = {
    "torch": covering(
        lead=[(), (0,), (1,), (3,), (17,), (129,), (1000,), (3, 43), (2, 3, 7), (4, 0)],
        NK=[(1, 1), (1, 31), (37, 1), (61, 127), (64, 128), (128, 32), (97, 45)],
        R=[1, 3, 8, 17, 64, 130],
        regime=list(REGIMES),
        p=[0.0, 0.1, 0.5],
        layout=_LAYOUTS,
        biases=_BIASES,
        scale=["float", "tensor"],
        blocks=["shipped", "small", "native", "small-native"],
    ),
    # Interpreted, a program of a kernel takes milliseconds, so rows end at 129 and N = 1 and K = 1, whose small results
    # would need many draws, are in TRITON_EDGES alone. The kernels do not take float64. The blocks of the torch
    # strategy do not exist here.
    "triton": covering(
        lead=[(), (0,), (1,), (3,), (17,), (129,), (3, 11), (2, 3, 7)],
        NK=[(61, 31), (64, 32), (45, 39), (37, 67)],
        R=[1, 3, 8, 17, 64, 130],
        regime=[name for name in REGIMES if name != "float64"],
        p=[0.0, 0.1, 0.5],
        layout=_LAYOUTS,
        biases=_BIASES,
        scale=["float", "tensor"],
        strategy=["triton", "triton:expand=beta1,grad_x=beta1", "triton:shrink=torch,grad_b=torch,grad_a=torch"],
    ),
}
TRITON_EDGES = [
    Case((33,), N=N, K=K, R=17, regime=regime, p=0.5, biases="both", strategy="triton", wanted=GRADIENTS[:3])
    for N, K, regime in ((1, 1, "float32"), (1, 31, "bfloat16"), (37, 1, "bfloat16+float32"))
] + [  # the s that a vendor's GEMM rounded, read by kernels
    Case((33,), N=45, K=39, R=8, regime="bfloat16", biases="both", strategy="triton:shrink=torch,expand=torch")
]
# The TMA forms take 16-bit dtypes and N, K that are multiples of 8, so they have a list of their own.
DESCRIPTORS = "triton:expand=descriptor,grad_x=descriptor"
TRITON_DESCRIPTORS = [
    Case(lead, N=48, K=72, R=9, regime=regime, p=p, layout=layout, biases="both", strategy=DESCRIPTORS)
    for lead, regime, p, layout in (
        ((0,), "bfloat16", 0.1, "contiguous"),
        ((1,), "bfloat16", 0.0, "contiguous"),
        ((17,), "bfloat16", 0.5, "transposed"),
        ((70,), "bfloat16+float32", 0.1, "contiguous"),
        ((3, 11), "float16", 0.1, "permuted"),
        ((17,), "float16+float32", 0.0, "offset"),
        ((17,), "autocast", 0.5, "strided"),
        ((17,), "autocast-base16", 0.1, "expanded-dy"),
    )
]
# The torch strategy as a GPU has it, computed by a CPU.
COVERING["torch on a GPU"] = covering(
    lead=[(1,), (17,), (129,), (2, 3, 7)],
    NK=[(37, 1), (61, 127), (64, 128)],
    R=[1, 8, 17, 64],
    regime=list(REGIMES),
    p=[0.0, 0.1],
    layout=_LAYOUTS,
    biases=_BIASES,
    scale=["float", "tensor"],
    strategy=["torch"],
    blocks=["gpu"],
)
CASES = [
    Case(N=NK[0], K=NK[1], **{"strategy": strategy, **row})
    for strategy in COVERING
    for NK, row in ((row.pop("NK"), row) for row in COVERING[strategy])
]


@pytest.mark.parametrize("case", CASES + TRITON_EDGES + TRITON_DESCRIPTORS, ids=str)
def test_accuracy(case):
    assert_as_accurate_as_plain(case)


# A regime decides which of the paths runs, dropout adds its own to most of them, and the blocks meet both: all three at
# once, which pairs alone would not promise.
REGIME_CASES = (
    [
        Case((5, 7), N=45, K=61, R=5, regime=regime, p=p, biases="both", blocks=blocks)
        for regime, p, blocks in itertools.product(
            REGIMES, (0.0, 0.1, 0.5), ("shipped", "small", "native", "small-native", "tiny", "gpu")
        )
        if "native" not in blocks or "float32" != regime != "float64"  # those two are native on every device
    ]
    + [
        # Without biases, where a GPU's forms have the scale inside the products.
        Case((33,), N=37, K=35, R=R, regime=regime, p=p, scale=scale, blocks="gpu")
        for regime, p, (R, scale) in itertools.product(REGIMES, (0.0, 0.1), ((1, "float"), (9, "float"), (9, "tensor")))
    ]
    + [
        Case((33,), N=37, K=35, R=5, regime=regime, p=p, biases="both", strategy="triton")
        for regime, p in itertools.product((name for name in REGIMES if name != "float64"), (0.0, 0.1))
    ]
)


@pytest.mark.parametrize("case", REGIME_CASES, ids=str)
def test_accuracy_of_every_regime_and_dropout(case):
    assert_as_accurate_as_plain(case)


LARGE = [
    Case((1000,), N=257, K=1009, R=17, regime="float32", p=0.1, biases="both"),
    Case((4, 250), N=509, K=512, R=130, regime="bfloat16+float32", p=0.5, biases="both"),
    # bfloat16 products made R high, a dx masked in its own memory; float32 factors as halves, a result made float32.
    Case((1030,), N=1021, K=1024, R=8, regime="bfloat16", p=0.1),
    Case((250,), N=509, K=512, R=8, regime="bfloat16", p=0.1),
    Case((1030,), N=1021, K=1024, R=2, regime="bfloat16+float32"),
    Case((250,), N=509, K=512, R=16, regime="bfloat16+float32"),
    # One row more than a block, which alone would be summed less accurately over so long a contraction.
    Case((17,), N=40000, K=64, R=31, regime="bfloat16+float32", p=0.5),
    # Few columns, which MKL sums over all rows in one run.
    Case((4100,), N=5, K=64, R=16),
    Case((4100,), N=5, K=8, R=17, regime="bfloat16+float32", p=0.5),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_accuracy_where_the_shipped_blocks_have_seams(case):
    assert_as_accurate_as_plain(case)


@pytest.mark.parametrize("regime", ["float32", "bfloat16+float32"])
def test_accuracy_where_blocks_are_cut_for_threads(regime):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_as_accurate_as_plain(Case((531,), N=1021, K=1024, R=8, regime=regime, p=0.1))  # 512 and 19 rows
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("wanted", [w for n in range(1, 6) for w in itertools.combinations(GRADIENTS, n)], ids="-".join)
def test_accuracy_of_every_subset_of_gradients(wanted, strategy):
    assert_as_accurate_as_plain(Case((5,), N=13, K=11, R=3, p=0.1, biases="both", wanted=wanted, strategy=strategy))


def test_the_reference_is_the_formula():
    """The oracle itself, and autograd's derivatives of it, against the formulas written out."""
    case = Case((3, 4), N=7, K=5, R=2, regime="float64", p=0.5, biases="both")
    inputs = make_inputs(case)
    expected = formulas(case, inputs, seed=3)
    for name, result in run(reference.lora_linear, case, inputs, seed=3).items():
        np.testing.assert_allclose(
            result.numpy(), expected[name].astype(np.float64), rtol=1e-13, atol=1e-14, err_msg=name
        )


def _fuzzed_case(draw, strategy: str, sizes: tuple[int, ...], regimes: list[str], most_rows: int) -> Case:
    size = st.sampled_from(sizes)
    row = st.sampled_from([0, 1, 2, 3, 5, 8, 13, 29, 47, 64])
    return Case(
        lead=tuple(draw(st.lists(row, max_size=3).filter(lambda lead: np.prod(lead) <= most_rows), label="lead")),
        N=draw(size, label="N"),
        K=draw(size, label="K"),
        R=draw(st.sampled_from([1, 2, 3, 5, 8, 13, 16, 29, 64]), label="R"),
        regime=draw(st.sampled_from(regimes), label="regime"),
        p=draw(st.sampled_from([0.0, 0.1, 0.5]), label="p"),
        layout=draw(st.sampled_from(_LAYOUTS), label="layout"),
        biases=draw(st.sampled_from(_BIASES), label="biases"),
        scale=draw(st.sampled_from(["float", "tensor"]), label="scale"),
        blocks=draw(st.sampled_from(["shipped", "small", "native", "small-native", "tiny", "gpu"]), label="blocks"),
        wanted=tuple(sorted(draw(st.sets(st.sampled_from(GRADIENTS)), label="wanted"))),
        strategy=strategy,
    )


NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
# Always the same examples. A failing one is not shrunk: the accuracy of smaller sizes takes more draws to judge.
FUZZ = {"deadline": None, "derandomize": True, "database": None, "phases": [Phase.generate]}
SIZES = (1, 2, 3, 5, 8, 13, 16, 29, 47, 64)


@settings(max_examples=50, **FUZZ)
@given(data=st.data())
def test_accuracy_fuzzed(data):
    assert_as_accurate_as_plain(_fuzzed_case(data.draw, "torch", SIZES, list(REGIMES), 256))


@settings(max_examples=15, **FUZZ)
@given(data=st.data())
def test_accuracy_fuzzed_on_triton(data):
    regimes = [name for name in REGIMES if name != "float64"]
    assert_as_accurate_as_plain(_fuzzed_case(data.draw, "triton", (23, 29, 32, 47), regimes, 64))


@settings(max_examples=40, **FUZZ)
@given(data=st.data())
def test_a_value_that_is_not_finite_reaches_only_its_own_row_fuzzed(data):
    case = _fuzzed_case(data.draw, "torch", SIZES, list(REGIMES), 256)
    inputs = make_inputs(case)
    factors = [inputs[name] for name in ("weight", "lora_a", "lora_b")]
    x = inputs["x"].clone()
    struck_x = x.clone()
    struck = data.draw(st.sets(st.integers(0, max(case.rows - 1, 0)), max_size=min(case.rows, 9)), label="struck")
    for row in struck:
        column = data.draw(st.integers(0, case.K - 1))
        struck_x[(*np.unravel_index(row, case.lead), column)] = data.draw(st.sampled_from(NOT_FINITE))
    with REGIMES[case.regime].active(), block_sizes(case.blocks):
        clean = lora_linear(x, *factors, dropout_p=case.p, seed=2).reshape(-1, case.N)
        y = lora_linear(struck_x, *factors, dropout_p=case.p, seed=2).reshape(-1, case.N)
    for row, (ours, expected) in enumerate(zip(y, clean, strict=True)):
        assert torch.equal(ours, expected) if row not in struck else not ours.isfinite().any()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("regime", ["float32", "bfloat16", "float16+float32"])
def test_a_value_that_is_not_finite_reaches_only_its_own_row(regime, p, value, strategy):
    case = Case((19,), N=13, K=11, R=3, regime=regime, p=p, biases="both", strategy=strategy)
    inputs = make_inputs(case)
    clean = run(lora_linear, case, inputs, 5, strategy)
    struck = inputs | {"x": inputs["x"].clone()}
    struck["x"][[4, 17], [0, 10]] = value
    results = run(lora_linear, case, struck, 5, strategy)
    rows = [row for row in range(19) if row not in (4, 17)]
    assert torch.equal(results["y"][rows], clean["y"][rows])
    assert not results["y"][[4, 17]].isfinite().any()
    assert torch.equal(results["dx"], clean["dx"])  # dx does not depend on x


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_upstream_gradient_that_is_not_finite_reaches_only_its_own_row(value, strategy):
    case = Case((19,), N=13, K=11, R=3, p=0.5, strategy=strategy)
    inputs = make_inputs(case)
    clean = run(lora_linear, case, inputs, 5, strategy)
    struck = inputs | {"dy": inputs["dy"].clone()}
    struck["dy"][4, 6] = value
    dx = run(lora_linear, case, struck, 5, strategy)["dx"]
    rows = [row for row in range(19) if row != 4]
    assert torch.equal(dx[rows], clean["dx"][rows])
    assert not dx[4].isfinite().any()


@pytest.mark.parametrize("blocks", ["native", "gpu"])
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-46, 0.5])
@pytest.mark.parametrize("regime", ["float32", "bfloat16"])
def test_infinite_factors_show_at_every_scale(regime, scale, blocks):
    """0 times Inf is NaN, also where a product with the scale inside would be skipped: 1e-46 is 0 in float32."""
    inputs = make_inputs(Case((700,), N=23, K=31, R=3, regime=regime))  # more than a tiny input
    a, b = inputs["lora_a"], inputs["lora_b"].clone()
    b[2, 1] = float("inf")
    x = inputs["x"].detach().requires_grad_()
    with block_sizes(blocks):
        y = lora_linear(x, inputs["weight"], a, b, scale)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not y[:, 2].isfinite().any()
    assert y[:, :2].isfinite().all()
    assert not dx.isfinite().any()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "float64"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_two_runs_give_the_same_bits(regime, p, strategy):
    # Two threads: their order of arrival must not show.
    case = Case((67,), N=45, K=61, R=9, regime=regime, p=p, biases="both", strategy=strategy)
    inputs = make_inputs(case)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with REGIMES[regime].active():
            first, second = (run(lora_linear, case, inputs, 5, strategy) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bias", [False, True])
def test_zero_b_gives_the_frozen_layer_to_the_last_bit(bias, strategy):
    inputs = make_inputs(Case((33,), N=45, K=61, R=9, biases="both"))
    x, weight, a = inputs["x"], inputs["weight"], inputs["lora_a"]
    bias = inputs["bias"] if bias else None
    zero = torch.zeros(45, 9)
    frozen = torch.nn.functional.linear(x, weight, bias)
    request = strategy if strategy == "torch" else "triton:expand=beta1"
    for lora_bias in (None, torch.zeros(45)):
        y = lora_linear(x, weight, a, zero, 2.0, bias, dropout_p=0.1, lora_bias=lora_bias, strategy=request)
        torch.testing.assert_close(
            y, frozen, rtol=0 if strategy == "torch" else None, atol=0 if strategy == "torch" else None
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("scale", [0.0, -3.0, 1e-30, 1e20])
def test_scale_takes_any_finite_value(scale, strategy):
    inputs = make_inputs(Case((9,), N=5, K=7, R=3))
    x, weight, a, b = (inputs[name] for name in ("x", "weight", "lora_a", "lora_b"))
    y = lora_linear(x, weight, a, b, scale, strategy=strategy)
    expected = x.double() @ weight.double().t() + scale * (x.double() @ a.double().t()) @ b.double().t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_in_a_tensor_that_is_not_finite_shows(dtype, strategy):
    """Also of many elements, where BLAS takes a factor NaN for 0."""
    inputs = make_inputs(Case((30,), N=40, K=48, R=4))
    args = [inputs[name].to(dtype) for name in ("x", "weight", "lora_a", "lora_b")]
    assert lora_linear(*args, torch.tensor(float("nan")), strategy=strategy).isnan().all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scale_as_a_tensor_of_any_float_dtype_is_the_float(strategy):
    inputs = make_inputs(Case((9,), N=5, K=7, R=3))
    args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    expected = lora_linear(*args, 0.5, strategy=strategy)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for shape in ((), (1,)):
            assert torch.equal(lora_linear(*args, torch.full(shape, 0.5, dtype=dtype), strategy=strategy), expected)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "triton:expand=beta1,grad_x=beta1"])
def test_large_values_do_not_overflow_inside(strategy):
    """The float16 sums of s and ds exceed float16's range; y, dx, da and db do not."""
    x = torch.full((8, 64), 200.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(16, 64, dtype=torch.float16)
    a = torch.full((2, 64), 8.0, dtype=torch.float16, requires_grad=True)
    b = torch.full((16, 2), 1.0, dtype=torch.float16, requires_grad=True)
    y = lora_linear(x, weight, a, b, 2.0**-10, strategy=strategy)  # s = 102400 > 65504
    assert torch.equal(y, torch.full_like(y, 200.0))
    y.backward(torch.ones_like(y))
    assert torch.equal(b.grad, torch.full_like(b, 800.0))
    assert torch.equal(a.grad, torch.full_like(a, 25.0))


@pytest.mark.parametrize(("K", "N"), [(0, 5), (7, 0), (0, 0)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_layer_without_inputs_or_outputs_is_a_layer(K, N, p):
    case = Case((3,), N=N, K=K, R=2, p=p, biases="both")
    inputs = make_inputs(case)
    ours, plain = run(lora_linear, case, inputs, 5), run(reference.lora_linear, case, inputs, 5)
    for name, result in ours.items():
        torch.testing.assert_close(result, plain[name])


def test_without_gradients_nothing_is_recorded():
    inputs = make_inputs(Case((3,), N=5, K=7, R=2))
    args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    args[2].requires_grad_()
    with torch.no_grad():
        assert lora_linear(*args).grad_fn is None
    with torch.inference_mode():
        assert torch.equal(lora_linear(*args), lora_linear(*args, strategy="torch"))
    assert lora_linear(*args).grad_fn is not None


def test_the_frozen_weight_may_require_grad_where_no_gradient_flows():
    inputs = make_inputs(Case((3,), N=5, K=7, R=2))
    args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    args[1].requires_grad_()
    with torch.no_grad():
        lora_linear(*args)


def test_the_function_is_what_the_operator_runs():
    inputs = make_inputs(Case((3,), N=5, K=7, R=2, p=0.5))
    x, weight, a, b = (inputs[name] for name in ("x", "weight", "lora_a", "lora_b"))
    seed = torch.tensor(3)
    y = FusedLoRALinear.apply(x, weight, None, a, b, None, 2.0, None, seed, 0.5, torch.float32, "torch")
    assert torch.equal(y, lora_linear(x, weight, a, b, 2.0, dropout_p=0.5, seed=3))


def test_explain_runs_nothing_and_agrees_with_the_plan_of_the_call():
    inputs = make_inputs(Case((3, 4), N=5, K=7, R=2, regime="bfloat16+float32"))
    args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    state = torch.get_rng_state()
    plan = fused_lora.explain(*args, dropout_p=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (plan.facts.M, plan.facts.N, plan.facts.K, plan.facts.R) == (12, 5, 7, 2)
    assert (plan.facts.dtype, plan.facts.adapter_dtype, plan.facts.dropout) == (torch.bfloat16, torch.float32, True)
    assert not fused_lora.explain(*args, dropout_p=0.1, training=False).facts.dropout
    assert fused_lora.explain(*args, strategy="reference").strategy == "reference"
    assert "because" in str(plan)


def test_the_reference_strategy_is_the_reference():
    inputs = make_inputs(Case((3,), N=5, K=7, R=2))
    args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    arguments = {"scale": 2.0, "dropout_p": 0.5, "seed": 3}
    assert torch.equal(lora_linear(*args, **arguments, strategy="reference"), reference.lora_linear(*args, **arguments))
    assert keep_mask(3, 3, 7, 0.5).any()
