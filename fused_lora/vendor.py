"""The five pieces of the operator from torch's own matrix products: the ``torch`` strategy, on every device.

Raw tensors in, raw tensors out, like ``kernels/linear.py``, whose launchers these are the twins of.

M rows, K in_features, N out_features, R rank.
x (M, K)   w (N, K)   bias (N,)   a (R, K)   b (N, R)   lora_bias (N,)   y, dy (M, N)
s = drop(x) aᵀ (M, R)   ds = scale · dy b (M, R)
both in the accumulation dtype, float32 or float64, or in bfloat16 where a bfloat16 GEMM made them

Three forms of the big product. On a GPU the vendor's GEMM accumulates onto the low-rank product (beta = 1). On a CPU
that multiplies the dtype the frozen product comes first and a rank-wide update is added to it, which costs less there
than a large product that has to read its output. On a CPU without bfloat16/float16 arithmetic ("upcast") the operands
become float32 block by block: torch's own fallback there is many times slower. The result is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import blocks
from .blocks import acc_dtype, copied, in_dtype, memory_for, part, ranges, row_blocks, tiny
from .dropout import BlockMask
from .rank_products import (
    RowSum,
    add_product,
    narrow_product,
    rank_product,
    row_sum,
    scale_inside,
    scaled_product,
    with_rank,
)

# Elements of a float32 block in the upcast GEMMs: 64 MiB of rows, 16 MiB of weight. Bounds the temporary memory.
_UPCAST_ROWS = 1 << 24
_UPCAST_WEIGHT = 1 << 22


def _native(t: Tensor, dtype: torch.dtype, upcast: bool) -> bool:
    """Whether one GEMM of t with an adapter factor of ``dtype`` is accurate as it is: no cast, no range to lose."""
    return t.dtype == dtype and (dtype == acc_dtype(dtype) or (dtype == torch.bfloat16 and not upcast))


def _base_first(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether the frozen product is made first and the low-rank product added to it (natively, in ``dtype``)."""
    return dtype == acc_dtype(dtype) or (dtype == torch.bfloat16 and blocks.on_cpu(t))


def _dropped(
    x: Tensor, i: int, j: int, mask: BlockMask, hashes: Tensor, dtype: torch.dtype, memory: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Rows i..j of x in ``dtype``, the dropped elements zero (the rank-wide side carries 1/(1-p)), and ``memory``, made
    where they have to be cast or laid out anew. The hashes are gone then."""
    block = part(x, i, j)
    if block.dtype == dtype and block.is_contiguous():
        return mask.dropped(block, hashes), memory
    block, memory = copied(x, i, j, dtype, memory)
    return mask.zero_dropped(block, hashes), memory


def _in_blocks(x: Tensor, dtype: torch.dtype, mask: BlockMask | None = None) -> Iterator[tuple[int, int, Tensor]]:
    """(i, j, rows i..j of drop(x) in ``dtype``) of block after block, each in the same memory where one is made."""
    memory: Tensor | None = None
    for i, j in row_blocks(x):
        if mask is not None:
            block, memory = _dropped(x, i, j, mask, mask.hashes(i, j - i), dtype, memory)
        elif x.dtype != dtype:
            block, memory = copied(x, i, j, dtype, memory)
        else:
            block = part(x, i, j)
        yield i, j, block


def shrink(x: Tensor, a: Tensor, mask: BlockMask | None, upcast: bool) -> Tensor:
    """s = drop(x) aᵀ, (M, R) in the accumulation dtype, or as its one GEMM rounded it: to cast it tells no more."""
    acc = acc_dtype(a.dtype)
    native = _native(x, a.dtype, upcast)
    if mask is None and native:
        return narrow_product(x, a.t())
    work = a.dtype if native else acc
    a_t = in_dtype(a, work).t()
    scale = 1.0 if mask is None else mask.scale
    if tiny(x):
        block = in_dtype(x, work)
        if mask is not None:
            block = mask.dropped(block.contiguous(), mask.hashes(0, x.shape[0]))
        return scaled_product(block, a_t, scale)
    s = x.new_empty(x.shape[0], a.shape[0], dtype=work)
    for i, j, block in _in_blocks(x, work, mask):
        scaled_product(block, a_t, scale, out=part(s, i, j))
    return s


def expand(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    scale: float | Tensor,
    dtype: torch.dtype,
    upcast: bool,
) -> Tensor:
    """y = x wᵀ + bias + scale · (s bᵀ + lora_bias), (M, N) in ``dtype``."""
    if not upcast:
        x, w = in_dtype(x, dtype), in_dtype(w, dtype)
        if lora_bias is None and scale_inside(scale):
            # The forms below with the scale inside the low-rank product: fewer operators, which small layers feel.
            if not _base_first(x, dtype):
                if bias is None and s.dtype == b.dtype == dtype:
                    return scaled_product(s, b.t(), scale).addmm_(x, w.t())
            else:
                y = F.linear(x, w, None if bias is None else in_dtype(bias, dtype))
                if tiny(y):
                    if b.dtype == dtype:
                        return y.addmm_(in_dtype(s, dtype), b.t(), alpha=scale)
                    return y.add_(torch.mm(s, b.t()), alpha=scale)
                return add_product(y, in_dtype(s, b.dtype if b.dtype == dtype else acc_dtype(dtype)), b.t(), scale)
    t = in_dtype(s, acc_dtype(dtype)) * scale
    if lora_bias is not None:
        t, b = with_rank(t, b, scale, lora_bias)
    if upcast:
        return _expand_upcast(x, w, bias, t, b, dtype)
    if _base_first(x, dtype):
        # Where b and lora_bias are zero, y is the frozen layer's output bit for bit.
        return add_product(F.linear(x, w, None if bias is None else bias.to(dtype)), t, b.t())
    if bias is not None:
        t, b = with_rank(t, b, 1.0, bias)
    return rank_product(t, b.t(), dtype).addmm_(x, w.t())


def _expand_upcast(x: Tensor, w: Tensor, bias: Tensor | None, t: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    (rows, features), out = x.shape, w.shape[0]
    if rows * features <= _UPCAST_ROWS and out * features <= _UPCAST_WEIGHT:  # one block, its result y itself
        block = torch.mm(in_dtype(x, torch.float32), in_dtype(w, torch.float32).t())
        block = block if bias is None else block.add_(bias)
        return add_product(block, t, in_dtype(b, torch.float32).t()).to(dtype)
    y = x.new_empty(rows, out, dtype=dtype)
    for i, j in ranges(rows, _UPCAST_ROWS // max(features, 1)):
        x_block = x[i:j].float()
        for n, o in ranges(out, _UPCAST_WEIGHT // max(features, 1)):
            block = torch.mm(x_block, w[n:o].float().t())
            if bias is not None:
                block += bias[n:o]
            y[i:j, n:o] = block.addmm_(t[i:j], b[n:o].float().t())
    return y


def _easy_columns(b: Tensor, dy: Tensor) -> Tensor:
    """``b``, laid out so that dy b is fast.

    On a CPU a float32 product with at most 8 columns takes two to four times as long over contiguous rows as over
    contiguous columns (AMD EPYC, torch 2.13, 2026-11-25).
    """
    return b.t().contiguous().t() if b.shape[1] <= 8 and blocks.on_cpu(dy) else b


def grad_b(
    dy: Tensor,
    b: Tensor | None,
    s: Tensor | None,
    scale: float | Tensor,
    dtype: torch.dtype,
    upcast: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """ds = scale · dy b, (M, R) in the accumulation dtype, and db = scale · dyᵀ s, (N, R) in ``dtype``, the adapters'.

    ds is computed where b is given, db where s is; the other is None. ds is bfloat16 where all factors are.
    """
    acc = acc_dtype(dtype)
    ds = None
    native = _native(dy, dtype, upcast)
    if tiny(dy) and not isinstance(scale, Tensor):
        return _tiny_grad_b(dy, b, s, scale, dtype, native)
    if native and (scale_inside(scale) if dtype != acc else not blocks.on_cpu(dy)):
        ds = None if b is None else scaled_product(dy, b, scale)
        return ds, None if s is None else scaled_product(dy.t(), in_dtype(s, dtype), scale)
    if native and dtype != acc:
        ds = None if b is None else torch.mm(dy, b).to(acc).mul_(scale)
        return ds, None if s is None else torch.mm(dy.t(), in_dtype(s * scale, dtype))
    b = None if b is None else in_dtype(_easy_columns(b, dy), acc)
    if native:
        ds = None if b is None else scaled_product(dy, b, scale)
        # Transposed: on a CPU dyᵀ s takes up to ten times as long as sᵀ dy (AMD EPYC, torch 2.13, 2026-11-25).
        return ds, None if s is None else row_sum(s, dy, scale).turned()
    if b is not None:
        ds = dy.new_empty(dy.shape[0], b.shape[1], dtype=acc)
    total = None if s is None else RowSum(s.shape[1], dy, acc, acc, scale)
    for i, j, block in _in_blocks(dy, acc):
        if b is not None and ds is not None:
            scaled_product(block, b, scale, out=part(ds, i, j))
        if s is not None and total is not None:
            total.add(part(s, i, j), block)
    return ds, None if total is None else in_dtype(total.turned(), dtype)


def _tiny_grad_b(
    dy: Tensor, b: Tensor | None, s: Tensor | None, scale: float, dtype: torch.dtype, native: bool
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`grad_b` in the fewest operators: no blocks, no layout."""
    work = dtype if native else acc_dtype(dtype)
    dy, ds, db = in_dtype(dy, work), None, None
    if b is not None:
        ds = scaled_product(dy, in_dtype(b, work), scale)
    if s is not None:
        db = in_dtype(scaled_product(dy.t(), in_dtype(s, work), scale), dtype)
    return ds, db


def grad_x(
    dy: Tensor,
    w: Tensor,
    ds: Tensor,
    a: Tensor,
    mask: BlockMask | None,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    upcast: bool,
    x: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx = dy w + drop'(ds a), (M, K) in ``x_dtype``; ``dtype`` is that of the frozen layer's arithmetic.

    With ``x``, and a mask, also da = dsᵀ drop(x) in the dtype of a: both need the same blocks of the mask.
    """
    da = None
    if x is not None and mask is not None:
        acc = acc_dtype(ds.dtype)
        native = _native(x, a.dtype, upcast) and _base_first(dy, dtype)
        da = RowSum(a.shape[0], x, acc, a.dtype if native else acc, mask.scale)
    if upcast:
        dx = _grad_x_upcast(dy, w, ds, a, mask, x_dtype, x, da)
    elif _base_first(dy, dtype) and not (mask is not None and dtype == torch.bfloat16 and _small(dy, w)):
        dx = torch.mm(dy, in_dtype(w, dtype))
        _add_lowrank(dx, ds, a, mask, 0, x, da)
    elif mask is None:
        dx = rank_product(ds, a, dtype).addmm_(dy, w.to(dtype))
    else:  # on a CPU a small bfloat16 dx: masked in its own memory it needs neither another nor a pass that adds
        dx = dy.new_empty(dy.shape[0], w.shape[1])
        _add_lowrank(dx, ds, a, mask, 0, x, da, keep=False)
        dx.addmm_(dy, in_dtype(w, dtype))
    return in_dtype(dx, x_dtype), None if da is None else in_dtype(da.total(), a.dtype)


def _small(dy: Tensor, w: Tensor) -> bool:
    """Whether dx has no more elements than a block, but is not tiny."""
    return blocks.TINY < dy.shape[0] * w.shape[1] <= blocks.CPU_BLOCK


def _add_lowrank(
    dx: Tensor,
    ds: Tensor,
    a: Tensor,
    mask: BlockMask | None,
    start: int,
    x: Tensor | None,
    da: RowSum | None,
    keep: bool = True,
) -> None:
    """dx += drop'(ds a) and, where da is given, da += dsᵀ drop(x), in place; row 0 of dx is row ``start`` of the mask.

    Without ``keep``, which needs a mask, what dx held is not read.
    """
    if mask is None and tiny(dx) and a.dtype == ds.dtype:
        dx.add_(torch.mm(ds, a)) if dx.dtype != ds.dtype else dx.addmm_(ds, a)
        return
    if mask is None:
        add_product(dx, ds, a)
        return
    if blocks.on_cpu(dx):
        work = a.dtype if dx.dtype == a.dtype else ds.dtype
    else:
        work = acc_dtype(ds.dtype)
    left, right = in_dtype(ds, work), in_dtype(a, work)
    in_place = not keep and left.dtype == dx.dtype
    if keep and tiny(dx):
        hashes = mask.hashes(start, dx.shape[0])
        lowrank = scaled_product(left, right, mask.scale)
        dx.add_(mask.zero_dropped(lowrank, hashes))
        if x is not None and da is not None:
            rows = in_dtype(part(x, start, start + dx.shape[0]), da.operands)
            da.add(in_dtype(ds, da.operands), mask.dropped(rows.contiguous(), hashes))
        return
    memory: Tensor | None = None
    spare: Tensor | None = None
    for i, j in row_blocks(dx):
        block = part(dx, i, j)
        hashes = mask.hashes(start + i, j - i)
        if not in_place:
            memory = memory_for(dx, left.dtype) if memory is None else memory
        lowrank = block if memory is None else part(memory, 0, j - i)
        add_product(lowrank, part(left, i, j), right, mask.scale, keep=False)
        mask.zero_dropped(lowrank, hashes)
        if keep:  # in one dtype: where they differ, a CPU is slow
            block.add_(in_dtype(lowrank, dx.dtype) if blocks.on_cpu(dx) else lowrank)
        elif not in_place:
            block.copy_(lowrank)
        if x is not None and da is not None:
            if spare is None and memory is not None and memory.dtype == da.operands:
                spare = memory
            dropped, spare = _dropped(x, start + i, start + j, mask, hashes, da.operands, spare)
            da.add(in_dtype(part(ds, i, j), da.operands), dropped)


def _grad_x_upcast(
    dy: Tensor,
    w: Tensor,
    ds: Tensor,
    a: Tensor,
    mask: BlockMask | None,
    x_dtype: torch.dtype,
    x: Tensor | None,
    da: RowSum | None,
) -> Tensor:
    (rows, out), features = dy.shape, w.shape[1]
    dx = dy.new_empty(rows, features, dtype=x_dtype)
    a = a.float()
    for i, j in ranges(rows, _UPCAST_ROWS // max(features, out, 1)):
        block = torch.zeros(j - i, features, dtype=torch.float32, device=dy.device)
        for n, o in ranges(out, _UPCAST_WEIGHT // max(features, 1)):
            block.addmm_(dy[i:j, n:o].float(), part(w, n, o).float())
        _add_lowrank(block, part(ds, i, j), a, mask, i, x, da)
        dx[i:j] = block
    return dx


def grad_a(x: Tensor, ds: Tensor, mask: BlockMask | None, dtype: torch.dtype, upcast: bool) -> Tensor:
    """da = dsᵀ drop(x), (R, K) in ``dtype``, that of the adapters."""
    acc = acc_dtype(ds.dtype)
    if mask is None and x.dtype == acc and not tiny(x):
        return in_dtype(row_sum(in_dtype(ds, acc), x).total(), dtype)
    if mask is None and _native(x, dtype, upcast):
        return torch.mm(in_dtype(ds, dtype).t(), x)
    if mask is None and tiny(x):
        return in_dtype(torch.mm(in_dtype(ds, acc).t(), in_dtype(x, acc)), dtype)
    work = dtype if blocks.on_cpu(x) and _native(x, dtype, upcast) else acc
    ds = in_dtype(ds, work)
    da = RowSum(ds.shape[1], x, acc, work, 1.0 if mask is None else mask.scale)
    for i, j, block in _in_blocks(x, work, mask):
        da.add(part(ds, i, j), block)
    return in_dtype(da.total(), dtype)
