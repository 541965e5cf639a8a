"""Several adapters trained at once with dropout, each with a mask of its own, over one frozen product.

    y = x Wᵀ + bias + scale · (s Bᵀ + lora_bias)        s = [drop₁(x) A₁ᵀ | drop₂(x) A₂ᵀ | …]

    ds = scale · dy B    db = scale · dyᵀ s    daᵢ = dsᵢᵀ dropᵢ(x)    dx = dy W + Σ dropᵢ'(dsᵢ Aᵢ)

x (..., K)   weight W (N, K) frozen   Aᵢ (Rᵢ, K)   B (N, R), R = Σ Rᵢ   s, ds (M, R)   bias, lora_bias (N,)
M = rows of x. Kept for the backward: x (an alias), s, the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import pieces
from .blocks import acc_dtype
from .checks import without_autocast
from .derivatives import expressions_wanted
from .dropout import keep_mask, keep_scale
from .plan import Plan, plan_for
from .rank_products import scaled_product

# Elements of dx that are in the accumulation dtype at one time.
_BLOCK = 1 << 20


class Constants(NamedTuple):
    """What is not a tensor that may want a gradient."""

    scale: float
    dtype: torch.dtype  # of the frozen product
    seeds: tuple[Tensor | None, ...]  # one for each adapter, None where it has no dropout
    ps: tuple[float, ...]


def _masks(constants: Constants, rows: int, cols: int) -> list[pieces.Mask | None]:
    drops = zip(constants.seeds, constants.ps, strict=True)
    return [None if seed is None else pieces.Mask(seed, rows, cols, p) for seed, p in drops]


def _plan(rows: Tensor, weight: Tensor, rank: int, constants: Constants, adapter_dtype: torch.dtype) -> Plan:
    N, K = weight.shape
    return plan_for(rows.shape[0], N, K, rank, constants.dtype, adapter_dtype, True, rows.device, None)


class FusedSeveralLinear(torch.autograd.Function):
    """The formulas above; ``apply(x, weight, bias, b, lora_bias, constants, *a)``."""

    @staticmethod
    def forward(ctx, x, weight, bias, b, lora_bias, constants, *factors):
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        plan = _plan(rows, weight, b.shape[1], constants, b.dtype)
        with without_autocast(x.device):
            operand = pieces.operand(plan, rows)
            s = torch.cat([
                pieces.shrink(_plan(rows, weight, a.shape[0], constants, a.dtype), operand, a, mask)
                for a, mask in zip(factors, _masks(constants, *rows.shape), strict=True)
            ], dim=1)  # fmt: skip
            w = pieces.operand(plan, weight)
            y = pieces.expand(plan, operand, w, bias, s, b, lora_bias, constants.scale)
        ctx.save_for_backward(x, weight, bias, b, lora_bias, s if ctx.needs_input_grad[3] else None, *factors)
        ctx.constants = constants
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, b, lora_bias, s, *factors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with without_autocast(dy.device):
            if expressions_wanted(dy):
                inputs = (x, weight, bias, b, lora_bias, None, *factors)
                return _differentiable(dy, inputs, needs, ctx.constants)
            return _gradients(dy, x, weight, bias, b, s, factors, needs, ctx.constants)


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, s: Tensor | None, factors: Sequence[Tensor],
    needs: Sequence[bool], constants: Constants,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of :class:`FusedSeveralLinear`'s arguments, in their order; None where it is not needed."""
    rows, dy = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), dy.reshape(-1, weight.shape[0])
    plan, masks = _plan(rows, weight, b.shape[1], constants, b.dtype), _masks(constants, *rows.shape)
    ds, db = pieces.grad_b(plan, dy, b, s, constants.scale)
    assert ds is not None
    parts = ds.split([a.shape[0] for a in factors], dim=1)
    dx = dbias = dlora_bias = None
    das: list[Tensor | None] = [None] * len(factors)
    if needs[0]:
        first, w = _plan(rows, weight, factors[0].shape[0], constants, b.dtype), pieces.operand(plan, weight)
        dx, _ = pieces.grad_xa(first, dy, None, w, parts[0].contiguous(), factors[0], masks[0], x.dtype)
        add_lowrank(dx, parts[1:], factors[1:], masks[1:])
        dx = dx.reshape(x.shape)
    for i, (a, part, mask) in enumerate(zip(factors, parts, masks, strict=True)):
        if needs[6 + i]:
            own = _plan(rows, weight, a.shape[0], constants, a.dtype)
            das[i] = pieces.grad_a(own, pieces.operand(own, rows), part.contiguous(), mask)
    if needs[2] or needs[4]:
        total = dy.sum(0, dtype=acc_dtype(dy.dtype))
        dbias = total.to(bias.dtype) if needs[2] and bias is not None else None
        dlora_bias = (total * constants.scale).to(b.dtype) if needs[4] else None
    return dx, None, dbias, db, dlora_bias, None, *das


def add_lowrank(
    dx: Tensor, parts: Sequence[Tensor], factors: Sequence[Tensor], masks: Sequence[pieces.Mask | None]
) -> None:
    """dx += Σ dropᵢ'(dsᵢ Aᵢ), in place, the sum in the accumulation dtype and rounded once."""
    step = max(_BLOCK // max(dx.shape[1], 1), 16)
    wide = [a.to(part.dtype) for a, part in zip(factors, parts, strict=True)]
    for i in range(0, dx.shape[0], step):
        block = dx[i : i + step]
        total = block.to(parts[0].dtype)
        for part, a, mask in zip(parts, wide, masks, strict=True):
            lowrank = scaled_product(part[i : i + step], a, 1.0 if mask is None else mask.blocks.scale)
            if mask is not None:
                mask.blocks.zero_dropped(lowrank, mask.blocks.hashes(i, len(block)))
            total = total + lowrank
        block.copy_(total)


def _differentiable(
    dy: Tensor, inputs: Sequence[Any], needs: Sequence[bool], constants: Constants
) -> tuple[Tensor | None, ...]:
    """The same gradients, through a plain expression of the formula, so that they can be differentiated again."""
    x, weight, bias, b, lora_bias, _, *factors = inputs
    acc = acc_dtype(b.dtype)
    with torch.enable_grad():
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(acc)
        branches = []
        for a, seed, p in zip(factors, constants.seeds, constants.ps, strict=True):
            keep = None if seed is None else keep_mask(seed, rows.shape[0], rows.shape[1], p).to(acc) * keep_scale(p)
            branches.append((rows if keep is None else rows * keep) @ a.to(acc).t())
        delta = torch.cat(branches, dim=1) @ b.to(acc).t()
        delta = delta if lora_bias is None else delta + lora_bias
        y = rows @ weight.to(acc).t() + delta * constants.scale
        y = y if bias is None else y + bias
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(y, wanted, dy.reshape(y.shape).to(acc), create_graph=True))
    return tuple(next(grads) if need else None for need in needs)
