"""The fused LoRA linear over a base weight that is stored quantised (torchao's NF4) and frozen.

x (..., K)   weight W (N, K), quantised   bias (N,)   a (R, K)   b (N, R)   y, dy (..., N)   s = drop(x) aᵀ (M, R)

The weight becomes dense in the dtype of x for the forward and again for the backward, and is kept quantised between
them, as torchao's own product does; everything else is the operator's: kept are x (an alias), s and the seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dropout import draw_seed
from ..registered import run_backward, run_forward


class QuantisedLoRALinear(torch.autograd.Function):
    """``apply(x, weight, bias, a, b, scale, seed, p, dtype)``; no gradient for the weight, none of second order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Any,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        seed: Tensor | None,
        p: float,
        dtype: torch.dtype,
    ) -> Tensor:
        y, s = run_forward(x, weight.to(x.dtype), bias, a, b, None, scale, None, seed, p, dtype, None)
        need_x, _, _, need_a, need_b = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_a else None,
            weight if need_x else None,
            a if need_x else None,
            b if need_x or need_a else None,
            s if need_b else None,
            seed,
        )
        R, K = a.shape
        ctx.constants = scale, p, x.dtype, a.dtype, a.dtype if bias is None else bias.dtype, K, R, x.dtype != dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, s, seed = ctx.saved_tensors
        scale, p, *rest = ctx.constants
        need_x, _, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        need = [need_x, need_bias, need_a, need_b, False]
        dense = weight.to(rest[0]) if need_x else None
        dx, dbias, da, db, _ = run_backward(dy, x, dense, a, b, s, scale, None, seed, p, *rest, need, None)
        return dx, None, dbias, da, db, None, None, None, None


def quantised_linear(
    x: Tensor, weight: Any, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float, dtype: torch.dtype
) -> Tensor:
    """``y = x Wᵀ + bias + scale · (drop(x) aᵀ) bᵀ`` in ``dtype``; p is what the dropout does now, 0 in evaluation."""
    seed = draw_seed(x.device) if p else None
    return QuantisedLoRALinear.apply(x, weight, bias, a, b, scale, seed, p, dtype)
