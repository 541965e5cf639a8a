"""Samples of one batch that use different adapters, over one frozen product.

    y = x Wᵀ + bias, and in the samples of adapter i  y += scaleᵢ · (sᵢ Bᵢᵀ + lora_biasᵢ)        sᵢ = x Aᵢᵀ

    dx = dy W, and in the samples of adapter i  dx += dsᵢ Aᵢ        dsᵢ = scaleᵢ · dy Bᵢ
    daᵢ = dsᵢᵀ x    dbᵢ = scaleᵢ · dyᵀ sᵢ    dlora_biasᵢ = scaleᵢ · Σ dy        over the samples of adapter i alone

x (samples, ..., K)   weight W (N, K) frozen   Aᵢ (Rᵢ, K)   Bᵢ (N, Rᵢ)   bias, lora_biasᵢ (N,)   y, dy (samples, ..., N)
``order`` (samples,) brings the samples of each adapter together; None where they are. Kept for the backward: x (an
alias), the sᵢ, (rows of adapter i, Rᵢ). A row is touched by its own adapter only, so a broken one stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import pieces
from .blocks import acc_dtype
from .checks import without_autocast
from .derivatives import expressions_wanted
from .peft_several import add_lowrank
from .plan import Plan, plan_for
from .rank_products import add_product, scale_inside, with_rank


class Span(NamedTuple):
    """The ordered samples start to stop, which use one adapter."""

    start: int
    stop: int
    scale: float


class Constants(NamedTuple):
    """What is not a tensor."""

    spans: tuple[Span, ...]
    dtype: torch.dtype  # of the frozen product


class _Group(NamedTuple):
    """One adapter, its rows of the ordered batch, and whether a, b and lora_bias want a gradient."""

    rows: slice
    scale: float
    a: Tensor
    b: Tensor
    lora_bias: Tensor | None
    needs: Sequence[bool]
    plan: Plan


def _groups(
    rows: Tensor, samples: int, weight: Tensor, constants: Constants, factors: Sequence[Any], needs: Sequence[bool]
) -> list[_Group]:
    each = rows.shape[0] // max(samples, 1)  # rows of a sample
    N, K = weight.shape
    groups = []
    for i, span in enumerate(constants.spans):
        a, b, lora_bias = factors[3 * i : 3 * i + 3]
        count = (span.stop - span.start) * each
        plan = plan_for(count, N, K, a.shape[0], constants.dtype, a.dtype, False, rows.device, None)
        where = slice(span.start * each, span.stop * each)
        groups.append(_Group(where, span.scale, a, b, lora_bias, needs[3 * i : 3 * i + 3], plan))
    return groups


def _ordered(t: Tensor, order: Tensor | None) -> Tensor:
    """The rows of t (samples, ..., width) adapter by adapter, (M, width)."""
    t = t if order is None else t.index_select(0, order)
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _put_back(rows: Tensor, lead: Sequence[int], order: Tensor | None) -> Tensor:
    """Rows (M, width) in the order of :func:`_ordered` as (*lead, width) in the batch's own."""
    # Not .view: autograd forbids in-place work on a view made inside a Function.
    t = torch.ops.aten._unsafe_view(rows, (*lead, rows.shape[-1]))
    return t if order is None else torch.empty_like(t).index_copy_(0, order, t)


def mixed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    constants: Constants,
    factors: Sequence[Tensor | None],
) -> Tensor:
    """y by the formulas above; ``factors``: a, b and lora_bias of each span by turns."""
    if torch.is_grad_enabled():
        return FusedMixedLinear.apply(x, weight, bias, order, constants, *factors)
    with without_autocast(x.device):
        return _forward(x, weight, bias, order, constants, factors)[0]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor | None, constants: Constants, factors: Sequence[Any]
) -> tuple[Tensor, list[Tensor]]:
    """y and the s of each span."""
    rows, dtype = _ordered(x, order), constants.dtype
    each = rows.shape[0] // max(x.shape[0], 1)  # rows of a sample
    y = F.linear(rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    kept = []
    for i, (start, stop, scale) in enumerate(constants.spans):
        a, b, lora_bias = factors[3 * i : 3 * i + 3]
        s = F.linear(rows[start * each : stop * each].to(a.dtype), a)
        _add_delta(y[start * each : stop * each], s, b, lora_bias, scale)
        kept.append(s)
    return _put_back(y, x.shape[:-1], order), kept


def _add_delta(y: Tensor, s: Tensor, b: Tensor, lora_bias: Tensor | None, scale: float) -> None:
    """y += scale · (s bᵀ + lora_bias), in place; the scale never meets a float16 s, whose range it could leave."""
    if y.dtype == b.dtype and scale_inside(scale):
        if lora_bias is not None:
            s, b = with_rank(s, b, 1.0, lora_bias)
        add_product(y, s, b.t(), alpha=scale)
        return
    acc = acc_dtype(b.dtype)
    y += F.linear(s.to(acc) * scale, b.to(acc), None if lora_bias is None else lora_bias.to(acc) * scale)


class FusedMixedLinear(torch.autograd.Function):
    """:func:`mixed_linear` with gradients; ``apply(x, weight, bias, order, constants, *factors)``."""

    @staticmethod
    def forward(ctx, x, weight, bias, order, constants, *factors):
        with without_autocast(x.device):
            y, kept = _forward(x, weight, bias, order, constants, factors)
        needed = [s if need else None for s, need in zip(kept, ctx.needs_input_grad[6::3], strict=True)]
        ctx.save_for_backward(x, weight, bias, order, *factors, *needed)
        ctx.constants = constants
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, order, *rest = ctx.saved_tensors
        count = 3 * len(ctx.constants.spans)
        factors, kept, needs = rest[:count], rest[count:], ctx.needs_input_grad
        with without_autocast(dy.device):
            if expressions_wanted(dy):
                return _differentiable(dy, (x, weight, bias, order, None, *factors), needs, ctx.constants)
            return _gradients(dy, x, weight, bias, order, factors, kept, needs, ctx.constants)


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor | None, factors: Sequence[Any],
    kept: Sequence[Tensor | None], needs: Sequence[bool], constants: Constants,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of :class:`FusedMixedLinear`'s arguments, in their order; None where it is not needed."""
    dy = _ordered(dy, order)
    rows = _ordered(x, order) if any(needs[5::3]) else None
    dx = torch.mm(dy, weight.to(dy.dtype)).to(x.dtype) if needs[0] else None
    grads: list[Tensor | None] = []
    for group, s in zip(_groups(dy, len(x), weight, constants, factors, needs[5:]), kept, strict=True):
        need_a, need_b, need_lora_bias = group.needs
        part, plan, da, db = dy[group.rows], group.plan, None, None
        if dx is not None or need_a or need_b:
            s = None if s is None else s.to(acc_dtype(s.dtype))
            ds, db = pieces.grad_b(plan, part, group.b if dx is not None or need_a else None, s, group.scale)
            if dx is not None and ds is not None:
                add_lowrank(dx[group.rows], [ds], [group.a], [None])
            if rows is not None and ds is not None and need_a:
                da = pieces.grad_a(plan, pieces.operand(plan, rows[group.rows]), ds, None)
        total = part.sum(0, dtype=acc_dtype(group.b.dtype)) * group.scale if need_lora_bias else None
        grads += [da, db, None if total is None else total.to(group.b.dtype)]
    dbias = dy.sum(0, dtype=acc_dtype(dy.dtype)).to(bias.dtype) if needs[2] and bias is not None else None
    dx = None if dx is None else _put_back(dx, x.shape[:-1], order)
    return dx, None, dbias, None, None, *grads


def _differentiable(
    dy: Tensor, inputs: Sequence[Any], needs: Sequence[bool], constants: Constants
) -> tuple[Tensor | None, ...]:
    """The same gradients, through a plain expression of the formula, so that they can be differentiated again."""
    x, weight, bias, order, _, *factors = inputs
    with torch.enable_grad():
        acc = acc_dtype(constants.dtype)
        rows = _ordered(x, order).to(acc)
        y = rows @ weight.to(acc).t()
        y = y if bias is None else y + bias
        for group in _groups(rows, len(x), weight, constants, factors, needs[5:]):
            delta = (rows[group.rows] @ group.a.to(acc).t()) @ group.b.to(acc).t()
            delta = (delta if group.lora_bias is None else delta + group.lora_bias) * group.scale
            y = y + F.pad(delta, (0, 0, group.rows.start, y.shape[0] - group.rows.stop))
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(y, wanted, _ordered(dy, order).to(acc), create_graph=True))
    return tuple(next(grads) if need else None for need in needs)
