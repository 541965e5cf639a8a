"""The accuracy rule, and the cases it is held on.

The rule has no tuned tolerance: for y and every gradient, our error against the truth is at most twice the error of the
plain PyTorch layer in the same regime, in the max norm and in the RMS norm.

truth   reference.lora_linear on float64 copies of the regime's tensors. For float64 tensors, where that would be the
        plain layer itself, the formulas below in numpy's long double (where that is no wider than a double, its
        rounding counts against ours and against plain alike).
plain   reference.lora_linear on the regime's own tensors, under the regime's autocast.

x (*lead, K)   weight (N, K)   lora_a (R, K)   lora_b (N, R)   bias, lora_bias (N,)   y, dy (*lead, N)
"""

import contextlib
import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from fused_lora import blocks as row_blocks
from fused_lora import dropout, lora_linear, rank_products, reference, registered, vendor
from fused_lora.dropout import keep_mask

STRATEGIES = ["torch", "triton"]
GRADIENTS = ("x", "lora_a", "lora_b", "bias", "lora_bias")

# Results of fewer elements than _POOL are pooled over fresh draws, up to _MAX_DRAWS: the largest of a handful of
# rounding errors is a coin toss for either side, and the ratio of two such tosses says nothing. The pooled max norm is
# the mean of the draws' max norms (their maximum would be a single toss again), the pooled RMS norm is over all
# elements. One-element results of two implementations that only order their operations differently then stay within
# a factor of 1.5 of each other. An interpreted kernel takes too long for so many draws.
_POOL = 128
_MAX_DRAWS = 128
_MAX_INTERPRETED_DRAWS = 16


@dataclass(frozen=True)
class Regime:
    """The dtypes of a call, and autocast's where it is on."""

    name: str
    x: torch.dtype
    weight: torch.dtype
    adapters: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def output(self) -> torch.dtype:
        return self.autocast or self.x

    def active(self):
        return contextlib.nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)


_f64, _f32, _bf16, _f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
REGIMES = {
    regime.name: regime
    for regime in (
        Regime("float64", _f64, _f64, _f64),
        Regime("float32", _f32, _f32, _f32),
        Regime("bfloat16", _bf16, _bf16, _bf16),
        Regime("float16", _f16, _f16, _f16),
        Regime("bfloat16+float32", _bf16, _bf16, _f32),  # PEFT's default: float32 adapters
        Regime("float16+float32", _f16, _f16, _f32),
        Regime("autocast", _f32, _f32, _f32, _bf16),
        Regime("autocast-x16", _bf16, _f32, _f32, _bf16),  # x comes from a layer that autocast already ran
        Regime("autocast-base16", _bf16, _bf16, _f32, _bf16),
    )
}


@dataclass(frozen=True)
class Case:
    """One call of the operator, up to the numbers in its tensors."""

    lead: tuple[int, ...] = (17,)
    N: int = 45
    K: int = 61
    R: int = 8
    regime: str = "float32"
    p: float = 0.0
    layout: str = "contiguous"
    biases: str = "none"
    scale: str = "float"
    strategy: str | None = "torch"
    blocks: str = "shipped"  # see block_sizes
    wanted: tuple[str, ...] = GRADIENTS

    def __str__(self) -> str:
        lead = "x".join(map(str, self.lead)) or "vector"
        parts = (lead, f"N{self.N}", f"K{self.K}", f"R{self.R}", self.regime, f"p{self.p}")
        return "-".join((str(self.strategy), *parts, self.layout, self.biases, self.scale, self.blocks))

    @property
    def rows(self) -> int:
        return math.prod(self.lead)


def arrange(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``t`` behind other strides; the memory between them is NaN, so that reading it shows."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "permuted" and t.dim() > 2:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    *lead, columns = t.shape
    if layout == "strided":  # no unit stride anywhere
        view = t.new_full((*lead, 2 * columns + 1), float("nan"))[..., 1::2][..., :columns]
    else:  # "offset", and what the other layouts cannot do: rows start at odd addresses
        view = t.new_full((*lead, columns + 4), float("nan"))[..., 1 : 1 + columns]
    return view.copy_(t)


def expand_rows(t: torch.Tensor) -> torch.Tensor:
    """The first row of t seen in every row: stride 0, as a broadcast or ``.sum().backward()`` makes it."""
    if t.dim() < 2 or t.numel() == 0:
        return t
    return t.reshape(-1, t.shape[-1])[0].expand(t.shape)


def make_inputs(case: Case, draw: int = 0) -> dict[str, torch.Tensor | None]:
    """Tensors of unit scale in the case's regime and layout, dy included.

    Magnitudes lie within a factor of three of each other, or one large element would decide a small result's error.
    """
    regime, (N, K, R) = REGIMES[case.regime], (case.N, case.K, case.R)
    generator = torch.Generator().manual_seed(1000 * draw + 7)

    def tensor(dtype, fan_in, *shape):
        t = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
        t *= torch.randint(0, 2, shape, generator=generator) * 2 - 1
        t /= math.sqrt(max(fan_in, 1))
        return arrange(t.to(dtype), case.layout if case.layout not in ("expanded-x", "expanded-dy") else "contiguous")

    inputs = {
        "x": tensor(regime.x, 1, *case.lead, K),
        "weight": tensor(regime.weight, K, N, K),
        "lora_a": tensor(regime.adapters, K, R, K),
        "lora_b": tensor(regime.adapters, R, N, R),
        "bias": tensor(regime.weight, 1, N) if case.biases in ("bias", "both") else None,
        "lora_bias": tensor(regime.adapters, 1, N) if case.biases in ("lora_bias", "both") else None,
        "dy": tensor(regime.output, N, *case.lead, N),
    }
    for name in ("x", "dy"):
        if case.layout == f"expanded-{name}":
            inputs[name] = expand_rows(inputs[name])
    return inputs


SCALE = 1.625  # exact in every dtype a scale tensor may have


def run(operator, case: Case, inputs: dict, seed: int, strategy: str | None = None) -> dict[str, torch.Tensor]:
    """y and the wanted gradients that exist, by name, from ``operator`` on ``inputs``; dtypes checked against x's."""
    leaves = {name: None if t is None else t.detach() for name, t in inputs.items() if name != "dy"}
    wanted = [name for name in case.wanted if leaves[name] is not None]
    for name in wanted:
        leaves[name].requires_grad_()
    scale = torch.tensor(SCALE) if case.scale == "tensor" else SCALE
    y = operator(**leaves, scale=scale, dropout_p=case.p, seed=seed, strategy=strategy)
    results = {"y": y.detach()}
    if wanted:
        gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], inputs["dy"].to(y.dtype))
        results |= dict(zip((f"d{name}" for name in wanted), gradients, strict=True))
    return results


def formulas(case: Case, inputs: dict, seed: int) -> dict[str, np.ndarray]:
    """y and all gradients by the formulas of the operator, in long double."""
    x, weight, a, b, bias, lora_bias, dy = (
        None if inputs[name] is None else inputs[name].numpy().astype(np.longdouble)
        for name in ("x", "weight", "lora_a", "lora_b", "bias", "lora_bias", "dy")
    )
    rows, scale = case.rows, np.longdouble(SCALE)
    flat, dy = x.reshape(rows, case.K), dy.reshape(rows, case.N)
    keep = keep_mask(seed, rows, case.K, case.p).numpy() / max(1 - np.longdouble(case.p), np.finfo(np.longdouble).tiny)
    dropped = flat * keep
    s, ds = dropped @ a.T, scale * (dy @ b)
    y = flat @ weight.T + scale * (s @ b.T)
    y += (0 if bias is None else bias) + (0 if lora_bias is None else scale * lora_bias)
    total = dy.sum(0)
    return {
        "y": y.reshape(*case.lead, case.N),
        "dx": (dy @ weight + keep * (ds @ a)).reshape(x.shape),
        "dlora_a": ds.T @ dropped,
        "dlora_b": scale * (dy.T @ s),
        "dbias": total,
        "dlora_bias": scale * total,
    }


def truth_of(case: Case, inputs: dict, seed: int) -> dict[str, np.ndarray]:
    """What y and the gradients are, to more digits than the regime has."""
    if case.regime == "float64":
        return formulas(case, inputs, seed)
    exact = {name: None if t is None else t.double() for name, t in inputs.items()}
    return {name: t.numpy().astype(np.longdouble) for name, t in run(reference.lora_linear, case, exact, seed).items()}


def wide(t: torch.Tensor) -> np.ndarray:
    return t.detach().double().numpy().astype(np.longdouble)


@contextlib.contextmanager
def block_sizes(blocks: str):
    """Run the ``torch`` strategy with "shipped", "small", "native", "small-native", "tiny" or "gpu" blocks.

    gpu: the forms of a GPU. small: the seams of the blocked loops and of the batched products lie inside small tensors,
    and none of those is tiny. tiny: only the blocks of float32 copies are small, and each of them is tiny. native: the
    path of a device that multiplies bfloat16 and float16, whether or not this CPU does.
    """
    with contextlib.ExitStack() as stack:
        if "small" in blocks:
            smaller: dict[Any, dict[str, Any]] = {
                row_blocks: {"CPU_BLOCK": 64, "TINY": 0},
                vendor: {"_UPCAST_ROWS": 1024, "_UPCAST_WEIGHT": 1024},
                dropout: {"_HASHED": 256},
                rank_products: {"_LEAST": 0, "_MANY": 0, "_NARROWEST": 3, "_WIDTH": 5, "_WIDEST": 16},
            }
            smaller[rank_products]["_column_parts"] = rank_products._column_parts.__wrapped__  # nothing remembered
            for module, values in smaller.items():
                stack.enter_context(mock.patch.multiple(module, **values))
        if blocks == "tiny":
            stack.enter_context(mock.patch.multiple(vendor, _UPCAST_ROWS=1024, _UPCAST_WEIGHT=1024))
        if blocks == "gpu":
            stack.enter_context(mock.patch.object(row_blocks, "on_cpu", return_value=False))
        if "native" in blocks or blocks == "gpu":
            plan_for = registered.plan_for

            def native(*facts):
                return dataclasses.replace(plan_for(*facts), upcast=False)

            stack.enter_context(mock.patch.object(registered, "plan_for", native))
        yield


def _draws(case: Case) -> int:
    # rows x R: da of a single row has as many elements as A, but no more independent errors than ds has.
    sizes = [case.rows * case.N, case.rows * case.K, case.R * case.K, case.N * case.R, case.rows * case.R]
    if case.biases != "none":
        sizes.append(case.N)
    smallest = min(sizes)
    most = _MAX_INTERPRETED_DRAWS if str(case.strategy).startswith("triton") else _MAX_DRAWS
    return 1 if smallest == 0 else min(math.ceil(_POOL / smallest), most)


def assert_as_accurate_as_plain(case: Case) -> None:
    """The accuracy rule, for y and every wanted gradient of ``case``, on as many draws as the sizes need."""
    errors: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    regime = REGIMES[case.regime]
    for draw in range(_draws(case)):
        inputs, seed = make_inputs(case, draw), 12345 + draw
        before = {name: None if t is None else t.clone() for name, t in inputs.items()}
        with regime.active(), block_sizes(case.blocks):
            ours = run(lora_linear, case, inputs, seed, case.strategy)
        with regime.active():
            plain = run(reference.lora_linear, case, inputs, seed)
        truth = truth_of(case, before, seed)
        _assert_unchanged(inputs, before)
        assert ours.keys() == plain.keys()
        for name, result in ours.items():
            assert result.dtype == plain[name].dtype, f"{name} is {result.dtype}, plain {plain[name].dtype}"
            assert result.shape == plain[name].shape, f"{name} is {result.shape}, plain {plain[name].shape}"
            errors.setdefault(name, []).append((wide(result), wide(plain[name]), truth[name]))
            if draw == 0:
                dtypes = {name: result.dtype for name, result in ours.items()}
    complaints = [compare(name, draws, dtypes[name]) for name, draws in errors.items()]
    if any(complaints):
        raise AssertionError(f"{case}\n" + "\n".join(filter(None, complaints)))


def _assert_unchanged(inputs: dict, before: dict) -> None:
    for name, t in inputs.items():
        assert t is None or torch.equal(t, before[name]), f"{name} was written to"


def _max_norm(errors: np.ndarray) -> np.floating:
    return errors.reshape(len(errors), -1).max(1).mean()


def _rms_norm(errors: np.ndarray) -> np.floating:
    return np.sqrt(np.square(errors).mean())


def compare(name: str, draws: list[tuple[np.ndarray, np.ndarray, np.ndarray]], dtype: torch.dtype) -> str:
    """ "" if ours obeys the rule, else a report: both errors and the first coordinates at fault."""
    ours, plain, truth = (np.stack(parts) for parts in zip(*draws, strict=True))  # (draws, *shape)
    if ours.size == 0:
        return ""
    our_error, plain_error = np.abs(ours - truth), np.abs(plain - truth)
    # Where plain is exact (dbias of one row is dy itself) twice nothing leaves no room for another order of the same
    # few additions: two units in the last place of the largest value.
    floor = 2 * torch.finfo(dtype).eps * np.abs(truth).max()
    report = ""
    for label, norm in (("max", _max_norm), ("RMS", _rms_norm)):
        mine, other = norm(our_error), norm(plain_error)
        bound = 2 * other if other > 0 else floor
        if not mine <= bound:
            report += f"  {name}: {label} error {mine:.3e}, plain {other:.3e}, truth up to {np.abs(truth).max():.3e}\n"
            at_fault = ~(our_error <= bound)
            for index in itertools.islice(zip(*np.nonzero(at_fault), strict=True), 5):
                report += f"    draw {index[0]} at {tuple(map(int, index[1:]))}: "
                report += f"{ours[index]:.9g}, plain {plain[index]:.9g}, truth {truth[index]:.9g}\n"
    return report


def covering(**factors) -> list[dict]:
    """A few combinations of ``factors`` in which any two values of two factors meet at least once."""
    names = list(factors)
    pairs = itertools.combinations(names, 2)
    missing = {((f, u), (g, v)): None for f, g in pairs for u in factors[f] for v in factors[g]}
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in sorted(set(names) - row.keys(), key=lambda name: (-len(factors[name]), names.index(name))):
            row[name] = max(factors[name], key=lambda value: _met(row | {name: value}, name, names, missing))
        for pair in itertools.combinations(((name, row[name]) for name in names), 2):
            missing.pop(pair, None)
        rows.append(row)
    return rows


def _met(row: dict, new: str, names: list[str], missing: dict) -> int:
    """How many missing pairs the new value of a row brings."""
    items = [(name, row[name]) for name in names if name in row]
    return sum(pair in missing for pair in itertools.combinations(items, 2) if new in (pair[0][0], pair[1][0]))
