"""The five pieces of the operator from torch's own matrix products: the ``torch`` strategy, on every device.

Raw tensors in, raw tensors out, like ``kernels/linear.py``, whose launchers these are the twins of.

M rows, K in_features, N out_features, R rank.
x (M, K)   w (N, K)   bias (N,)   a (R, K)   b (N, R)   lora_bias (N,)   y, dy (M, N)
s = drop(x) aᵀ (M, R)   ds = scale · dy b (M, R)         both in the accumulation dtype: float32, or float64

Three forms of the big product. On a GPU the vendor's GEMM accumulates onto the low-rank product (beta = 1). On a CPU
that multiplies the dtype the frozen product comes first and a rank-wide update is added to it, which costs less there
than a large product that has to read its output. On a CPU without bfloat16/float16 arithmetic ("upcast") the operands
become float32 block by block: torch's own fallback there is many times slower. The result is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import GROUP, BlockMask, part
from .rank_products import RowSum, add_product, narrow_product, row_sum

# Elements in a block of rows that is masked or cast. On a CPU the block and its scratch stay in the caches; on a GPU
# fewer, larger launches matter more than cache.
_CPU_BLOCK = 1 << 19
_GPU_BLOCK = 1 << 24
# Ranks up to which a bfloat16 result of more than one block takes float32 factors as bfloat16 halves.
_FEW_RANKS = 32
# Elements of a float32 block in the upcast GEMMs: 64 MiB of rows, 16 MiB of weight. Bounds the temporary memory.
_UPCAST_ROWS = 1 << 24
_UPCAST_WEIGHT = 1 << 22
# Elements up to which a tensor on a CPU is tiny: a pass over it in the caches takes about as long as a dispatch.
_TINY = 1 << 13
_LEAST_SCALE = torch.finfo(torch.float32).tiny


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _in(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in ``dtype``. Where it is so already this spares the dispatch of ``to``, a third of a small product."""
    return t if t.dtype == dtype else t.to(dtype)


def on_cpu(t: Tensor) -> bool:
    """Whether ``t`` takes the forms of a CPU. Asked here alone: a test without a GPU answers for one."""
    return t.is_cpu


def _tiny(t: Tensor) -> bool:
    """Whether an operator on ``t`` takes longer to call than to compute: then the fewest operators win, not bytes."""
    return on_cpu(t) and t.numel() <= _TINY


def _native(t: Tensor, dtype: torch.dtype, upcast: bool) -> bool:
    """Whether one GEMM of t with an adapter factor of ``dtype`` is accurate as it is: no cast, no range to lose."""
    return t.dtype == dtype and (dtype == acc_dtype(dtype) or (dtype == torch.bfloat16 and not upcast))


def _base_first(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether the frozen product is made first and the low-rank product added to it (natively, in ``dtype``)."""
    return dtype == acc_dtype(dtype) or (dtype == torch.bfloat16 and on_cpu(t))


def _blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive ranges of at most ``size`` that cover ``total``."""
    size = max(size, 1)
    for start in range(0, total, size):
        yield start, min(start + size, total)


def _row_blocks(t: Tensor) -> Iterator[tuple[int, int]]:
    elements = _CPU_BLOCK if on_cpu(t) else _GPU_BLOCK
    rows = elements // max(t.shape[1], 1)
    return _blocks(t.shape[0], max(rows - rows % GROUP, 2 * GROUP))  # whole groups: the mask hashes no row for nothing


def _memory(block: Tensor, dtype: torch.dtype) -> Tensor:
    """For one block after another: fresh memory costs a CPU more than the operator that fills it."""
    return torch.empty(block.shape, dtype=dtype, device=block.device)


def _dropped(block: Tensor, mask: BlockMask, hashes: Tensor, out: Tensor) -> Tensor:
    """The block in ``out``, its dropped elements zero; the rank-wide side carries 1/(1-p)."""
    if block.dtype != out.dtype or not block.is_contiguous():
        block = out.copy_(block)
    return mask.zero_dropped(block, hashes, out=out)


def _in_blocks(x: Tensor, dtype: torch.dtype, mask: BlockMask | None = None) -> Iterator[tuple[int, int, Tensor]]:
    """(i, j, rows i..j of drop(x) in ``dtype``) of block after block, each in the same memory where one is made."""
    memory: Tensor | None = None
    for i, j in _row_blocks(x):
        block = part(x, i, j)
        if mask is not None or block.dtype != dtype:
            memory = _memory(block, dtype) if memory is None else memory  # the first is the largest
            out = part(memory, 0, j - i)
            block = out.copy_(block) if mask is None else _dropped(block, mask, mask.hashes(i, j - i), out)
        yield i, j, block


def shrink(x: Tensor, a: Tensor, mask: BlockMask | None, upcast: bool) -> Tensor:
    """s = drop(x) aᵀ, (M, R) in the accumulation dtype, or as its one GEMM rounded it: to cast it tells no more."""
    acc = acc_dtype(a.dtype)
    native = _native(x, a.dtype, upcast)
    if mask is None and native:
        return narrow_product(x, a.t())
    work = a.dtype if native else acc
    a_t = _in(a, work).t()
    if _tiny(x):
        block = _in(x, work)
        if mask is not None:
            block = mask.zero_dropped(block.contiguous(), mask.hashes(0, x.shape[0]))
        s = _in(torch.mm(block, a_t), acc)
        return s if mask is None else s.mul_(mask.scale)
    s = x.new_empty(x.shape[0], a.shape[0], dtype=work)
    for i, j, block in _in_blocks(x, work, mask):
        if mask is None or work == acc:
            torch.mm(block, a_t, out=part(s, i, j))
        else:
            part(s, i, j).copy_(_scaled_product(block, a_t, mask.scale))
    return s if mask is None or work != acc else s.mul_(mask.scale)


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
        x, w = _in(x, dtype), _in(w, dtype)
        if lora_bias is None and scale_inside(scale):
            # The forms below with the scale inside the low-rank product: fewer operators, which small layers feel.
            if not _base_first(x, dtype):
                if bias is None and s.dtype == b.dtype == dtype:
                    return _scaled_product(s, b.t(), scale).addmm_(x, w.t())
            else:
                y = F.linear(x, w, None if bias is None else _in(bias, dtype))
                if b.dtype != dtype and _tiny(x) and y.numel() <= _TINY:
                    return y.add_(torch.mm(s, b.t()), alpha=scale)
                return _add_product(y, _in(s, b.dtype if b.dtype == dtype else acc_dtype(dtype)), b.t(), scale)
    t = _in(s, acc_dtype(dtype)) * scale
    if lora_bias is not None:
        t, b = with_rank(t, b, scale, lora_bias)
    if upcast:
        return _expand_upcast(x, w, bias, t, b, dtype)
    if _base_first(x, dtype):
        # Where b and lora_bias are zero, y is the frozen layer's output bit for bit.
        return _add_product(F.linear(x, w, None if bias is None else bias.to(dtype)), t, b.t())
    if bias is not None:
        t, b = with_rank(t, b, 1.0, bias)
    return _rank_product(t, b.t(), dtype).addmm_(x, w.t())


def scale_inside(scale: float | Tensor) -> TypeGuard[float]:
    """Whether a product may multiply by the scale itself. Not at NaN, nor where float32 makes it 0: BLAS then skips the
    product, where Inf in it makes NaN."""
    return not isinstance(scale, Tensor) and abs(scale) >= _LEAST_SCALE


def _scaled_product(t: Tensor, f: Tensor, scale: float | Tensor) -> Tensor:
    """scale · t f in the dtype of both; rounded once where the scale goes inside."""
    return narrow_product(t, f, scale) if scale_inside(scale) else narrow_product(t, f).mul_(scale)


def with_rank(t: Tensor, b: Tensor, factor: float | Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """t and b with one more rank, which adds factor · vector to every row of t bᵀ: no pass over y, no rounding of y."""
    return torch.cat([t, torch.ones_like(t[:, :1]) * factor], dim=1), torch.cat([b, vector[:, None]], dim=1)


def _rank_product(t: Tensor, f: Tensor, dtype: torch.dtype) -> Tensor:
    """t f, (M, R) x (R, P), rounded once to ``dtype``; t is float32. float16 cannot hold t's range."""
    if dtype != torch.bfloat16:
        return torch.mm(t, f.to(t.dtype)).to(dtype)
    return torch.mm(*_rank_factors(t, f, dtype))


def _rank_factors(t: Tensor, f: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors in ``dtype`` whose product is t f, (M, R) x (R, P).

    bfloat16: t and a float32 f are split into high and low halves that stand side by side along R, so one bfloat16 GEMM
    loses nothing of them and no float32 (M, P) tensor exists. On a CPU, where each rank of that GEMM counts, a t that
    goes with a bfloat16 f is rounded, as the plain layer rounds s.
    """
    if dtype != torch.bfloat16:
        return t, _in(f, dtype)
    t_high = _in(t, dtype)
    if f.dtype == dtype and (t.dtype == dtype or on_cpu(t)):
        return t_high, f
    turned = f.stride(0) == 1  # a transposed factor stays one: copying it row by row would take longer than the product
    f = f.t() if turned else f
    f_high = _in(f, dtype)
    left, right = [t_high, (t - t_high).to(dtype)], [f_high, f_high]
    if f.dtype != dtype:
        left.append(t_high)
        right.append((f - f_high).to(dtype))
    factor = torch.cat(right, dim=1 if turned else 0)
    return torch.cat(left, dim=1), factor.t() if turned else factor


def _add_product(y: Tensor, t: Tensor, f: Tensor, alpha: float = 1.0) -> Tensor:
    """y += alpha · t f, in place; y (M, P) contiguous, t (M, R), f (R, P)."""
    wide = y.dtype == torch.bfloat16 and t.dtype == f.dtype == torch.float32 and on_cpu(y)
    if not wide or (y.numel() > _CPU_BLOCK and len(f) <= _FEW_RANKS):
        return add_product(y, *_rank_factors(t, f, y.dtype), alpha=alpha)
    # y itself becomes float32, block by block: two casts in the caches cost less than splitting two factors into
    # halves, and each rank a third of what three halves do.
    memory: Tensor | None = None
    for i, j in _row_blocks(y):
        block = part(y, i, j)
        memory = _memory(block, torch.float32) if memory is None else memory
        block.copy_(add_product(part(memory, 0, j - i).copy_(block), part(t, i, j), f, alpha=alpha))
    return y


def _expand_upcast(x: Tensor, w: Tensor, bias: Tensor | None, t: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    (rows, features), out = x.shape, w.shape[0]
    if rows * features <= _UPCAST_ROWS and out * features <= _UPCAST_WEIGHT:  # one block, its result y itself
        block = torch.mm(_in(x, torch.float32), _in(w, torch.float32).t())
        block = block if bias is None else block.add_(bias)
        return add_product(block, t, _in(b, torch.float32).t()).to(dtype)
    y = x.new_empty(rows, out, dtype=dtype)
    for i, j in _blocks(rows, _UPCAST_ROWS // max(features, 1)):
        x_block = x[i:j].float()
        for n, o in _blocks(out, _UPCAST_WEIGHT // max(features, 1)):
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
    return b.t().contiguous().t() if b.shape[1] <= 8 and on_cpu(dy) else b


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
    if _tiny(dy) and not isinstance(scale, Tensor):
        return _tiny_grad_b(dy, b, s, scale, dtype, native)
    if native and (scale_inside(scale) if dtype != acc else not on_cpu(dy)):
        ds = None if b is None else _scaled_product(dy, b, scale)
        return ds, None if s is None else _scaled_product(dy.t(), _in(s, dtype), scale)
    if native and dtype != acc:
        ds = None if b is None else torch.mm(dy, b).to(acc).mul_(scale)
        return ds, None if s is None else torch.mm(dy.t(), _in(s * scale, dtype))
    b = None if b is None else _in(_easy_columns(b, dy), acc)
    if native:
        ds = None if b is None else torch.mm(dy, b).mul_(scale)
        # Transposed: on a CPU dyᵀ s takes up to ten times as long as sᵀ dy (AMD EPYC, torch 2.13, 2026-11-25).
        return ds, None if s is None else row_sum(s, dy).turned().mul_(scale)
    if b is not None:
        ds = dy.new_empty(dy.shape[0], b.shape[1], dtype=acc)
    total = None if s is None else RowSum(s.shape[1], dy, acc, acc)
    for i, j, block in _in_blocks(dy, acc):
        if b is not None and ds is not None:
            torch.mm(block, b, out=part(ds, i, j))
        if s is not None and total is not None:
            total.add(part(s, i, j), block)
    ds = None if ds is None else ds.mul_(scale)
    return ds, None if total is None else _in(total.turned().mul_(scale), dtype)


def _tiny_grad_b(
    dy: Tensor, b: Tensor | None, s: Tensor | None, scale: float, dtype: torch.dtype, native: bool
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`grad_b` in the fewest operators: no blocks, no layout."""
    acc = acc_dtype(dtype)
    work = dtype if native else acc
    dy, ds, db = _in(dy, work), None, None
    if b is not None:
        ds = _in(torch.mm(dy, _in(b, work)), acc).mul_(scale)
    if s is not None:
        db = _in(torch.mm(dy.t(), _in(s, work)).mul_(scale), dtype)
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
    t = _kept_ds(ds, mask)
    da = None
    if x is not None and mask is not None:
        acc = acc_dtype(ds.dtype)
        native = _native(x, a.dtype, upcast) and _base_first(dy, dtype)
        da = RowSum(a.shape[0], x, acc, a.dtype if native else acc)
    if upcast:
        dx = _grad_x_upcast(dy, w, t, a, mask, x_dtype, x, da)
    elif _base_first(dy, dtype):
        dx = torch.mm(dy, _in(w, dtype))
        _add_lowrank(dx, t, a, mask, 0, x, da)
    elif mask is None:
        dx = _rank_product(t, a, dtype).addmm_(dy, w.to(dtype))
    else:
        dx = dy.new_zeros(dy.shape[0], w.shape[1])
        _add_lowrank(dx, t, a.to(t.dtype), mask, 0, x, da)
        dx.addmm_(dy, w.to(dtype))
    return _in(dx, x_dtype), None if da is None else _in(da.total(), a.dtype)


def _kept_ds(ds: Tensor, mask: BlockMask | None) -> Tensor:
    """ds / (1 - p); on a CPU, where passes cost, a bfloat16 ds is rounded again."""
    wide = ds if mask is None or on_cpu(ds) else _in(ds, acc_dtype(ds.dtype))
    return wide if mask is None else wide * mask.scale


def _add_lowrank(
    dx: Tensor, t: Tensor, a: Tensor, mask: BlockMask | None, start: int, x: Tensor | None, da: RowSum | None
) -> None:
    """dx += drop'(t a) and, where da is given, da += tᵀ drop(x), in place; row 0 of dx is row ``start`` of the mask."""
    if mask is None and _tiny(dx) and a.dtype == t.dtype:
        dx.add_(torch.mm(t, a)) if dx.dtype != t.dtype else dx.addmm_(t, a)
        return
    if mask is None:
        _add_product(dx, t, a)
        return
    left, right = (_in(t, a.dtype), a) if dx.dtype == a.dtype else (t, _in(a, t.dtype))
    memory: Tensor | None = None
    for i, j in _row_blocks(dx):
        block = part(dx, i, j)
        hashes = mask.hashes(start + i, j - i)
        memory = _memory(block, left.dtype) if memory is None else memory
        lowrank = add_product(part(memory, 0, j - i), part(left, i, j), right, keep=False)
        lowrank = mask.zero_dropped(lowrank, hashes, out=lowrank)
        block.add_(_in(lowrank, dx.dtype) if on_cpu(dx) else lowrank)  # a CPU is slow where the dtypes differ
        if x is not None and da is not None:
            spare = lowrank if da.operands == left.dtype else _memory(block, da.operands)
            dropped = _dropped(part(x, start + i, start + j), mask, hashes, spare)
            da.add(_in(part(t, i, j), da.operands), dropped)


def _grad_x_upcast(
    dy: Tensor,
    w: Tensor,
    t: Tensor,
    a: Tensor,
    mask: BlockMask | None,
    x_dtype: torch.dtype,
    x: Tensor | None,
    da: RowSum | None,
) -> Tensor:
    (rows, out), features = dy.shape, w.shape[1]
    dx = dy.new_empty(rows, features, dtype=x_dtype)
    a = a.float()
    for i, j in _blocks(rows, _UPCAST_ROWS // max(features, out, 1)):
        block = torch.zeros(j - i, features, dtype=torch.float32, device=dy.device)
        for n, o in _blocks(out, _UPCAST_WEIGHT // max(features, 1)):
            block.addmm_(dy[i:j, n:o].float(), part(w, n, o).float())
        _add_lowrank(block, part(t, i, j), a, mask, i, x, da)
        dx[i:j] = block
    return dx


def grad_a(x: Tensor, ds: Tensor, mask: BlockMask | None, dtype: torch.dtype, upcast: bool) -> Tensor:
    """da = dsᵀ drop(x), (R, K) in ``dtype``, that of the adapters."""
    acc = acc_dtype(ds.dtype)
    if mask is None and x.dtype == acc:
        return _in(row_sum(_in(ds, acc), x).total(), dtype)
    if mask is None and _native(x, dtype, upcast):
        return torch.mm(_in(ds, dtype).t(), x)
    if mask is None and _tiny(x):
        return _in(torch.mm(_in(ds, acc).t(), _in(x, acc)), dtype)
    work = dtype if on_cpu(x) and _native(x, dtype, upcast) else acc
    t = _in(_kept_ds(ds, mask), work)
    da = RowSum(ds.shape[1], x, acc, work)
    for i, j, block in _in_blocks(x, work, mask):
        da.add(part(t, i, j), block)
    return _in(da.total(), dtype)
