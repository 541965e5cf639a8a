"""The five pieces of the operator, each in the form its plan names: vendor GEMMs, a kernel, or both together.

x (M, K)   w (N, K)   bias (N,)   a (R, K)   b (N, R)   lora_bias (N,)   y, dy (M, N)
s = drop(x) aᵀ (M, R)   ds = scale · dy b (M, R)   in the accumulation dtype
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import vendor
from .dropout import BlockMask, keep_scale, threshold
from .plan import Plan


class Mask:
    """The dropout mask of one call as the pieces take it: block by block in torch, or as a kernel's three numbers."""

    def __init__(self, seed: Tensor, rows: int, cols: int, p: float):
        self._seed, self._rows, self._cols, self._p = seed, rows, cols, p
        self._blocks: BlockMask | None = None

    @property
    def blocks(self) -> BlockMask:
        if self._blocks is None:  # not cached_property: until Python 3.12 that takes a lock
            self._blocks = BlockMask(self._seed, self._rows, self._cols, self._p)
        return self._blocks

    @functools.cached_property
    def drop(self) -> Any:
        return _kernels().Drop(self._seed, threshold(self._p), keep_scale(self._p))


def _kernels() -> Any:
    from .kernels import linear  # imports triton: only when a kernel is wanted

    return linear


def _blocks(mask: Mask | None) -> BlockMask | None:
    return None if mask is None else mask.blocks


def _drop(mask: Mask | None) -> Any:
    return None if mask is None else mask.drop


def operand(plan: Plan, t: Tensor) -> Tensor:
    """x or w as the pieces take it: cast to autocast's dtype for kernels; the torch forms cast in passing."""
    return in_memory(t.to(plan.facts.dtype) if plan.strategy == "triton" else t)


def in_memory(t: Tensor | None) -> Any:
    """``t`` with its values in its memory, which is what kernels and masks read; only a negative view is copied."""
    return t.resolve_neg() if t is not None and t.is_neg() else t


def _addressable(t: Tensor) -> Tensor:
    """``t``, or a copy where a TMA descriptor cannot address it as it lies."""
    from .kernels.tiles import descriptor_reason

    reason = descriptor_reason("", tuple(t.shape), t.stride(), t.element_size(), t.data_ptr())
    return t.clone(memory_format=torch.contiguous_format) if reason else t


def _addressable_weight(w: Tensor) -> Tensor:
    """The same for w, which may be stored by its columns (the Conv1D of transformers)."""
    return _addressable(w.t()).t() if w.stride(0) == 1 else _addressable(w)


def _allow_tf32() -> bool:
    """Whether torch's own float32 GEMMs may use TF32 on the GPU; the kernels follow.

    Not ``allow_tf32``: reading that raises where the setting was made through ``fp32_precision``.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def summed(t: Tensor | None) -> Any:
    """``t``, a rank-wide tensor, in its accumulation dtype."""
    return t if t is None or t.dtype != torch.bfloat16 else t.float()


def shrink(plan: Plan, x: Tensor, a: Tensor, mask: Mask | None, rounded: bool = False) -> Tensor:
    """s = drop(x) aᵀ; with ``rounded`` bfloat16 where one GEMM made it so, as :func:`expand` then takes it."""
    if plan.shrink == "torch":
        s = vendor.shrink(x, a, _blocks(mask), plan.upcast)
        return s if rounded and plan.expand == "torch" else summed(s)
    return _kernels().shrink(x, in_memory(a), _drop(mask), plan.tile("shrink"), allow_tf32=_allow_tf32())


def expand(
    plan: Plan,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    scale: float | Tensor,
) -> Tensor:
    """y = x wᵀ + bias + scale · (s bᵀ + lora_bias)."""
    dtype = plan.facts.dtype
    if plan.expand == "torch":
        return vendor.expand(x, w, bias, s, b, lora_bias, scale, dtype, plan.upcast)
    kernels, tile = _kernels(), plan.tile("expand")
    b, bias, lora_bias = in_memory(b), in_memory(bias), in_memory(lora_bias)
    if plan.expand == "beta1":
        y = kernels.lowrank_y(s, b, bias, lora_bias, scale, dtype, tile, allow_tf32=_allow_tf32())
        return y.addmm_(x, w.t())
    if plan.expand == "descriptor":
        x, w = _addressable(x), _addressable_weight(w)
    return kernels.expand(x, w, bias, s, b, lora_bias, scale, tile, allow_tf32=_allow_tf32())


def grad_b(
    plan: Plan, dy: Tensor, b: Tensor | None, s: Tensor | None, scale: float | Tensor, rounded: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """ds = scale · dy b where b is given, db = scale · dyᵀ s where s is.

    With ``rounded`` ds is bfloat16 where one GEMM made it so, as :func:`grad_xa` then takes it.
    """
    if plan.grad_b == "torch":
        ds, db = vendor.grad_b(dy, b, s, scale, plan.facts.adapter_dtype, plan.upcast)
        return ds if rounded and plan.grad_x == plan.grad_a == "torch" else summed(ds), db
    dtype, dy, b = plan.facts.adapter_dtype, in_memory(dy), in_memory(b)
    return _kernels().grad_b(dy, b, summed(s), scale, plan.tile("grad_b"), out_dtype=dtype, allow_tf32=_allow_tf32())


def grad_xa(
    plan: Plan,
    dy: Tensor,
    x: Tensor | None,
    w: Tensor,
    ds: Tensor,
    a: Tensor,
    mask: Mask | None,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """dx = dy w + drop'(ds a) in ``x_dtype``; and da = dsᵀ drop(x) in the adapters' dtype where x is given."""
    # Small products in a row, before the large one, take less on a CPU; under a mask the torch forms share its blocks.
    da = None if x is None or mask is not None else grad_a(plan, x, ds, mask)
    if plan.grad_x == "torch":
        shared = x if plan.grad_a == "torch" and mask is not None else None
        dx, together = vendor.grad_x(dy, w, ds, a, _blocks(mask), plan.facts.dtype, x_dtype, plan.upcast, shared)
        da = da if together is None else together
    else:
        kernels, tile, dy, a = _kernels(), plan.tile("grad_x"), in_memory(dy), in_memory(a)
        if plan.grad_x == "beta1":
            dx = kernels.lowrank_x(ds, a, _drop(mask), dy.dtype, tile, allow_tf32=_allow_tf32()).addmm_(dy, w)
        else:
            if plan.grad_x == "descriptor":
                dy, w = _addressable(dy), _addressable_weight(w)
            dx = kernels.grad_x(dy, w, ds, a, _drop(mask), tile, allow_tf32=_allow_tf32())
        dx = dx.to(x_dtype)
    return dx, grad_a(plan, x, ds, mask) if da is None and x is not None else da


def grad_a(plan: Plan, x: Tensor, ds: Tensor, mask: Mask | None) -> Tensor:
    """da = dsᵀ drop(x), in the adapters' dtype."""
    if plan.grad_a == "torch":
        return vendor.grad_a(x, ds, _blocks(mask), plan.facts.adapter_dtype, plan.upcast)
    return _kernels().grad_a(
        x, ds, _drop(mask), plan.tile("grad_a"), plan.facts.adapter_dtype, allow_tf32=_allow_tf32()
    )
