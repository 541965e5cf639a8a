"""Bad input is refused before any work, by an error that names the value and the fix."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from accuracy import Case, make_inputs

import fused_lora
from fused_lora import LoRALinear, lora_linear, reference
from fused_lora.dropout import keep_mask
from fused_lora.parametrize import lora_parametrize
from fused_lora.plan import MAX_TRITON_RANK

N, K, R = 5, 7, 3
f16, f32, f64, bf16 = torch.float16, torch.float32, torch.float64, torch.bfloat16


def arguments(**replaced):
    inputs = make_inputs(Case((4,), N=N, K=K, R=R, biases="both"))
    del inputs["dy"]
    return inputs | {"scale": 2.0} | replaced


def zeros(*shape, dtype=f32):
    return torch.zeros(shape, dtype=dtype)


SHAPES = {
    "x of another width": ({"x": zeros(4, 8)}, r"x of shape \(4, 8\) does not fit weight of shape \(5, 7\)"),
    "x a scalar": ({"x": zeros()}, r"x of shape \(\) does not fit.*last dimension of x in_features"),
    "weight a vector": ({"weight": zeros(7)}, r"weight of shape \(7,\): weight must be \(out_features, in_features\)"),
    "weight of three dimensions": ({"weight": zeros(1, 5, 7)}, r"weight of shape \(1, 5, 7\): weight must be"),
    "lora_a of another width": (
        {"lora_a": zeros(3, 8)},
        r"lora_a of shape \(3, 8\).*must be \(rank, 7\) and \(5, rank\)",
    ),
    "lora_a transposed": ({"lora_a": zeros(7, 3)}, r"lora_a of shape \(7, 3\)"),
    "lora_a a vector": ({"lora_a": zeros(7)}, r"lora_a of shape \(7,\)"),
    "lora_b of another height": ({"lora_b": zeros(6, 3)}, r"lora_b of shape \(6, 3\)"),
    "lora_b transposed": ({"lora_b": zeros(3, 5)}, r"lora_b of shape \(3, 5\)"),
    "ranks that differ": ({"lora_b": zeros(5, 2)}, r"lora_a of shape \(3, 7\) and lora_b of shape \(5, 2\)"),
    "rank zero": ({"lora_a": zeros(0, 7), "lora_b": zeros(5, 0)}, r"lora_a of shape \(0, 7\).*rank at least 1"),
    "bias of another length": ({"bias": zeros(7)}, r"bias must be torch.float32 of shape \(5,\), got .*\(7,\)"),
    "bias a matrix": ({"bias": zeros(1, 5)}, r"bias must be torch.float32 of shape \(5,\), got .*\(1, 5\)"),
    "bias of another dtype": ({"bias": zeros(5, dtype=f64)}, r"bias must be torch.float32 .*got torch.float64"),
    "lora_bias of another length": (
        {"lora_bias": zeros(3)},
        r"lora_bias must be torch.float32 of shape \(5,\), got .*\(3,\)",
    ),
    "lora_bias of another dtype": (
        {"lora_bias": zeros(5, dtype=bf16)},
        r"lora_bias must be torch.float32 .*got torch.bfloat16",
    ),
}
DTYPES = {
    "integer x": (
        {"x": zeros(4, 7, dtype=torch.int64)},
        "x is torch.int64 and weight is torch.float32.*same floating dtype",
    ),
    "complex x": ({"x": zeros(4, 7, dtype=torch.complex64)}, "x is torch.complex64"),
    "integer base": ({"x": zeros(4, 7, dtype=torch.int8), "weight": zeros(5, 7, dtype=torch.int8)}, "x is torch.int8"),
    "x and weight that differ": (
        {"x": zeros(4, 7, dtype=bf16)},
        "x is torch.bfloat16 and weight is torch.float32.*autocast",
    ),
    "float64 x over float32": ({"x": zeros(4, 7, dtype=f64)}, "x is torch.float64 and weight is torch.float32"),
    "float16 factors over float32": (
        {"lora_a": zeros(3, 7, dtype=f16), "lora_b": zeros(5, 3, dtype=f16)},
        r"lora_a is torch.float16 and lora_b is torch.float16 .*both must be torch.float32; cast the adapters with .to",
    ),
    "factors that differ": (
        {"lora_b": zeros(5, 3, dtype=bf16)},
        "lora_a is torch.float32 and lora_b is torch.bfloat16",
    ),
    "float64 factors over bfloat16": (
        {
            "x": zeros(4, 7, dtype=bf16),
            "weight": zeros(5, 7, dtype=bf16),
            "lora_a": zeros(3, 7, dtype=f64),
            "lora_b": zeros(5, 3, dtype=f64),
        },
        "lora_a is torch.float64 .*both must be torch.bfloat16, or both float32",
    ),
    "a list for x": ({"x": [[0.0] * 7]}, "x must be a tensor, got list"),
    "None for lora_a": ({"lora_a": None}, "lora_a must be a tensor, got NoneType"),
    "a number for bias": ({"bias": 1.0}, "bias must be a tensor, got float"),
    "a string for scale": ({"scale": "2"}, "scale must be a float or a 0-d tensor, got str"),
    "None for scale": ({"scale": None}, "scale must be a float or a 0-d tensor, got NoneType"),
}
DTYPES |= {
    f"dropout a {type(p).__name__}": (
        {"dropout_p": p},
        rf"dropout_p must be a number, got {type(p).__name__} .*use float\(\)",
    )
    for p in ("0.5", None, [0.5], 0.5j, torch.zeros(2))
}
VALUES = {
    "dropout below 0": ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\], got -0.1; pass 0.0 for no dropout"),
    "dropout above 1": ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\], got 1.5"),
    "dropout not a number": ({"dropout_p": float("nan")}, r"dropout_p must be in \[0, 1\], got nan"),
    "dropout above 1 in evaluation": ({"dropout_p": 1.5, "training": False}, r"dropout_p must be in \[0, 1\], got 1.5"),
    "scale not a number": ({"scale": float("nan")}, "scale must be finite, got nan: check lora_alpha and the rank"),
    "scale infinite": ({"scale": float("-inf")}, "scale must be finite, got -inf"),
    "scale of two elements": (
        {"scale": zeros(2)},
        r"scale must be a 0-d floating tensor, got torch.float32 of shape \(2,\)",
    ),
    "scale an integer tensor": ({"scale": torch.tensor(2)}, "scale must be a 0-d floating tensor, got torch.int64"),
    "scale that requires grad": (
        {"scale": torch.tensor(2.0, requires_grad=True)},
        r"scale requires grad.*scale.detach\(\)",
    ),
    "weight that requires grad": (
        {"weight": zeros(5, 7).requires_grad_()},
        r"weight requires grad.*requires_grad_\(False\)",
    ),
    "weight elsewhere": (
        {"weight": torch.zeros(5, 7, device="meta")},
        "weight is on meta and x is on cpu: move them to one",
    ),
    "lora_b elsewhere": ({"lora_b": torch.zeros(5, 3, device="meta")}, "lora_b is on meta and x is on cpu"),
    "bias elsewhere": ({"bias": torch.zeros(5, device="meta")}, "bias is on meta and x is on cpu"),
    "scale elsewhere": (
        {"scale": torch.zeros((), device="meta")},
        "scale is on meta and x is on cpu: move it there, or pass a Python float",
    ),
    "an unknown strategy": (
        {"strategy": "cuda"},
        "strategy must be None or one of torch, triton, reference, got 'cuda'",
    ),
    "a strategy that is no string": (
        {"strategy": 3},
        "strategy must be None or one of torch, triton, reference, got 3",
    ),
    "an unknown piece": (
        {"strategy": "triton:shrug=torch"},
        "cannot force 'shrug=torch'.* pieces shrink, expand, grad_b",
    ),
    "an unknown form": ({"strategy": "triton:expand=fast"}, "expand has no form 'fast'; it has torch, beta1, pointer"),
    "a form of another strategy": ({"strategy": "torch:expand=beta1"}, "only 'triton' takes forms"),
}
SEEDS = {
    "a float": (TypeError, 1.5, "seed must be an int or an int64 tensor, got float"),
    "a bool": (TypeError, True, "seed must be an int or an int64 tensor, got bool"),
    "a string": (TypeError, "1", "seed must be an int or an int64 tensor, got str"),
    "an int32 tensor": (
        TypeError,
        torch.tensor(1, dtype=torch.int32),
        r"int64 tensor with one element, got torch.int32",
    ),
    "two elements": (
        TypeError,
        torch.tensor([1, 2]),
        r"int64 tensor with one element, got torch.int64 of shape \(2,\)",
    ),
    "65 bits": (ValueError, 2**63, "seed must fit in a signed 64-bit integer, got 9223372036854775808"),
}


def refused(error, function, tensors, message):
    """``function`` raises, with this message, having drawn nothing from the generator."""
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        function(**tensors)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("function", [lora_linear, fused_lora.explain])
@pytest.mark.parametrize("name", [*SHAPES, *VALUES])
def test_bad_shapes_and_values(name, function):
    replaced, message = (SHAPES | VALUES)[name]
    refused(ValueError, function, arguments(**({"dropout_p": 0.5} | replaced)), message)


@pytest.mark.parametrize("function", [lora_linear, fused_lora.explain])
@pytest.mark.parametrize("name", list(DTYPES))
def test_bad_dtypes(name, function):
    replaced, message = DTYPES[name]
    refused(TypeError, function, arguments(bias=None, lora_bias=None, dropout_p=0.5) | replaced, message)


@pytest.mark.parametrize("name", list(SEEDS))
def test_bad_seeds(name):
    error, seed, message = SEEDS[name]
    for p in (0.0, 0.5):
        refused(error, lora_linear, arguments(seed=seed, dropout_p=p), message)
        refused(error, fused_lora.explain, arguments(seed=seed, dropout_p=p), message)
    refused(error, keep_mask, {"seed": seed, "rows": 2, "cols": 2, "p": 0.5, "device": "cpu"}, message)
    refused(error, reference.lora_linear, arguments(seed=seed, dropout_p=0.5), message)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_a_mask_of_an_impossible_p(p):
    refused(ValueError, keep_mask, {"seed": 1, "rows": 2, "cols": 2, "p": p}, "dropout_p must be in")
    refused(ValueError, reference.lora_linear, arguments(dropout_p=p), "dropout_p must be in")


@pytest.mark.parametrize("size", [-1, 3.0])
@pytest.mark.parametrize("name", ["rows", "cols"])
def test_a_mask_of_an_impossible_size(name, size):
    arguments = {"seed": 1, "rows": 2, "cols": 2, "p": 0.5} | {name: size}
    refused(ValueError, keep_mask, arguments, f"{name} must be a whole number from 0 up, got {size}")


@pytest.mark.parametrize("function", [lora_linear, fused_lora.explain])
@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"training": "no"}, "training must be True or False, got str 'no'"),
        ({"training": None}, "training must be True or False, got NoneType"),
        ({"training": torch.tensor([1, 0])}, "training must be True or False, got Tensor"),
        ({"dropout_p": True}, "dropout_p must be a number, got bool True"),
    ],
)
def test_switches_and_numbers(replaced, message, function):
    refused(TypeError, function, arguments(**replaced), message)


@pytest.mark.parametrize("function", [lora_linear, fused_lora.explain])
def test_a_strategy_that_is_no_string(function):
    refused(ValueError, function, arguments(strategy=["torch"]), r"strategy must be None or one of .*got \['torch'\]")


LAYERS = {
    "rslora": ({"use_rslora": "no"}, TypeError, "use_rslora must be True or False, got str 'no'"),
    "dora": ({"use_dora": "no"}, TypeError, "use_dora must be True or False, got str 'no'"),
    "p": ({"lora_dropout": True}, TypeError, "lora_dropout must be a number, got bool True"),
    "alpha": ({"lora_alpha": np.float32("inf")}, ValueError, "lora_alpha must be finite, got inf"),
    "alpha of 400 digits": ({"lora_alpha": 10**400}, ValueError, "lora_alpha must be finite, got 1000"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_arguments_of_a_layer(name):
    settings, error, message = LAYERS[name]
    base = torch.nn.Linear(K, N)
    for make in (lambda: LoRALinear(K, N, **settings), lambda: LoRALinear.from_linear(base, **settings)):
        with pytest.raises(error, match=message):
            make()
    assert base.weight.requires_grad


@pytest.mark.parametrize("value", [torch.tensor([1, 0]), np.array([1, 0]), "no", 2])
def test_a_switch_of_a_layer(value):
    with pytest.raises(TypeError, match="enabled must be True or False, got"):
        LoRALinear(K, N).enabled = value


@pytest.mark.parametrize("alpha", [np.float32(3), np.float64(3), np.int64(3), Fraction(3), 3])
def test_lora_alpha_of_any_real_type(alpha):
    layer = LoRALinear(K, N, r=2, lora_alpha=alpha)
    assert type(layer.scale) is float
    assert layer.scale == 1.5
    assert layer(zeros(4, K)).shape == (4, N)


def test_the_name_of_a_parametrized_tensor():
    with pytest.raises(TypeError, match="tensor_name must be a str, got int 5"):
        lora_parametrize(torch.nn.Linear(K, N), 5)


def test_autocast_takes_what_it_can_cast_and_nothing_else():
    with torch.autocast("cpu", bf16):
        for x, weight in ((f32, bf16), (bf16, f32), (f16, f32)):
            y = lora_linear(**arguments(x=zeros(4, 7, dtype=x), weight=zeros(5, 7, dtype=weight), bias=None))
            assert y.dtype == bf16
        for replaced in ({"x": zeros(4, 7, dtype=f64)}, {"weight": zeros(5, 7, dtype=f64), "bias": None}):
            refused(TypeError, lora_linear, arguments(**replaced), "must be the same floating dtype")
        for replaced in (
            {"x": zeros(4, 7, dtype=torch.int32)},
            {"weight": zeros(5, 7, dtype=torch.int8), "bias": None},
        ):
            refused(TypeError, lora_linear, arguments(**replaced), "must be the same floating dtype")
        factors = {"lora_a": zeros(3, 7, dtype=f16), "lora_b": zeros(5, 3, dtype=f16), "lora_bias": None}
        refused(TypeError, lora_linear, arguments(**factors), "over a layer that computes in torch.bfloat16")


@pytest.mark.parametrize("function", [lora_linear, fused_lora.explain])
class TestKernelsThatCannotRun:
    """A request for the kernels where they cannot run says why, and what to ask for instead."""

    def refused(self, function, message, **replaced):
        tensors = arguments(strategy="triton", dropout_p=0.5, bias=None, lora_bias=None, **replaced)
        refused(
            ValueError,
            function,
            tensors,
            rf"strategy='triton' cannot run here: {message}.*use strategy=None or 'torch'",
        )

    def test_without_a_gpu_or_the_interpreter(self, function, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET")
        self.refused(function, r"the tensors are on the CPU \(set TRITON_INTERPRET=1")

    def test_in_float64(self, function):
        tensors = {"x": zeros(4, 7), "weight": zeros(5, 7), "lora_a": zeros(3, 7), "lora_b": zeros(5, 3)}
        tensors = {name: t.double() for name, t in tensors.items()}
        self.refused(function, "the kernels accumulate in float32 and would lower float64", **tensors)

    def test_above_the_largest_rank(self, function):
        rank = MAX_TRITON_RANK + 1
        factors = {"lora_a": zeros(rank, 7), "lora_b": zeros(5, rank)}
        self.refused(function, f"the kernels take ranks up to {MAX_TRITON_RANK}, this one is {rank}", **factors)


def test_any_rank_runs_without_the_kernels():
    rank = MAX_TRITON_RANK + 1
    factors = {"lora_a": torch.randn(rank, K), "lora_b": torch.randn(N, rank) / rank}  # unit scale, for assert_close
    torch.testing.assert_close(lora_linear(**arguments(**factors)), reference.lora_linear(**arguments(**factors)))


def test_a_refusal_leaves_no_gradient_behind():
    tensors = arguments(dropout_p=1.5)
    tensors["lora_a"].requires_grad_()
    with pytest.raises(ValueError, match="dropout_p"):
        lora_linear(**tensors)
    assert tensors["lora_a"].grad is None


def test_meta_tensors_work_and_do_not_mix():
    x, weight, a, b = torch.randn(5, 16), torch.randn(12, 16), torch.randn(3, 16), torch.randn(12, 3)
    with pytest.raises(ValueError, match="weight is on cpu and x is on meta"):
        fused_lora.lora_linear(x.to("meta"), weight, a, b)
    layer = fused_lora.LoRALinear(16, 12, device="meta", lora_dropout=0.5)
    assert layer(x.to("meta")).shape == (5, 12)


@pytest.mark.parametrize("scale", [1e39, -1e39, 10**400])
def test_a_scale_outside_float32(scale):
    x, weight, a, b = torch.randn(5, 16), torch.randn(12, 16), torch.randn(3, 16), torch.randn(12, 3)
    with pytest.raises(ValueError, match="scale must be finite"):
        fused_lora.lora_linear(x, weight, a, b, scale)


def test_from_linear_refuses_what_it_would_not_run():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 100

    with pytest.raises(TypeError, match="Scaled has a forward of its own"):
        fused_lora.LoRALinear.from_linear(Scaled(4, 4))
    with pytest.raises(ValueError, match="remove_parametrizations"):
        fused_lora.LoRALinear.from_linear(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4)))


def test_a_layer_made_in_inference_mode_takes_another_scale():
    with torch.inference_mode():
        layer = fused_lora.LoRALinear(4, 4)
    layer.set_scale(0.5)
    assert layer.scale == 0.5
