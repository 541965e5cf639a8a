"""The accuracy rule: an operator's error against float64 beside the plain PyTorch layer's own.

M rows, K in_features, N out_features, R rank.
x (M, K)   weight (N, K)   bias (N,)   lora_a (R, K)   lora_b (N, R)   y, dy (M, N)   da, db as lora_a, lora_b

Truth: :func:`fused_lora.reference.lora_linear` on float64 copies. Plain layer: the same function on the tensors as they
are. The rule: for every result our error is at most twice the plain layer's, in the max norm and in the RMS norm
(``docs/numerics.md``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import reference
from .ops.linear import lora_linear

RESULTS = ("y", "dx", "da", "db")
FACTOR = 2.0  # of the rule


@dataclass(frozen=True)
class Case:
    """One call of the operator and the gradient that comes back to it."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    bias: Tensor | None
    dy: Tensor
    dropout_p: float
    seed: int  # of the dropout mask

    def double(self) -> Case:
        """The same case in float64."""
        bias = None if self.bias is None else self.bias.double()
        return replace(
            self,
            x=self.x.double(),
            weight=self.weight.double(),
            lora_a=self.lora_a.double(),
            lora_b=self.lora_b.double(),
            bias=bias,
            dy=self.dy.double(),
        )


@dataclass(frozen=True)
class Error:
    """Errors of one result against float64, relative to the truth's size in the same norm."""

    ours_max: float
    plain_max: float
    ours_rms: float
    plain_rms: float

    @property
    def holds(self) -> bool:
        """Whether the accuracy rule holds; a NaN anywhere breaks it."""
        return self.ours_max <= FACTOR * self.plain_max and self.ours_rms <= FACTOR * self.plain_rms


def random_case(
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout_p: float,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """Normal inputs, factors divided by the root of what they sum over, so that y and the branch have unit scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, fan_in: int = 1, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) / fan_in**0.5).to(device, dtype)

    return Case(
        x=normal(M, K),
        weight=normal(N, K, fan_in=K),
        lora_a=normal(R, K, fan_in=K, dtype=adapter_dtype),
        lora_b=normal(N, R, fan_in=R, dtype=adapter_dtype),
        scale=2.0,
        bias=normal(N),
        dy=normal(M, N),
        dropout_p=dropout_p,
        seed=seed,
    )


def _results(linear: Callable[..., Tensor], case: Case, strategy: str | None = None) -> dict[str, Tensor]:
    """y, dx, da and db of one forward and backward, by name."""
    x, a, b = (t.detach().requires_grad_() for t in (case.x, case.lora_a, case.lora_b))
    y = linear(
        x,
        case.weight.detach(),
        a,
        b,
        case.scale,
        None if case.bias is None else case.bias.detach(),
        dropout_p=case.dropout_p,
        seed=case.seed,
        strategy=strategy,
    )
    return dict(zip(RESULTS, (y.detach(), *torch.autograd.grad(y, (x, a, b), case.dy)), strict=True))


def _relative(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """(max norm, RMS norm) of got - truth, each over the truth's own."""
    difference = got.double() - truth
    largest = difference.abs().max() / truth.abs().max()
    return largest.item(), (difference.norm() / truth.norm()).item()


def compare(case: Case, strategy: str | None = None) -> dict[str, Error]:
    """The errors of ``lora_linear`` on ``case``, for each name in ``RESULTS``.

    Raises:
        ValueError, TypeError: as :func:`fused_lora.lora_linear`.
    """
    ours = _results(lora_linear, case, strategy)
    plain = _results(reference.lora_linear, case)
    truth = _results(reference.lora_linear, case.double())
    errors = {}
    for name in RESULTS:
        ours_max, ours_rms = _relative(ours[name], truth[name])
        plain_max, plain_rms = _relative(plain[name], truth[name])
        errors[name] = Error(ours_max, plain_max, ours_rms, plain_rms)
    return errors


def worst(errors: Iterable[Error]) -> Error:
    """The largest of each number over several errors."""
    rows = [(e.ours_max, e.plain_max, e.ours_rms, e.plain_rms) for e in errors]
    return Error(*(max(column) for column in zip(*rows, strict=True)))
