"""The pieces that read one long tensor once and are R wide: shrink, grad_b, grad_a.

t (M, C) the long tensor, x or dy    f (R, C) a factor, a or bᵀ    u (M, R) fp32, s or ds    g (C, R) a gradient

    shrink:  u = scale · drop(t) fᵀ       outer:  g = scale · drop(t)ᵀ u       both:  u and g from one read of t

Where blocks of the output underfill the chip the contraction is split: each part stores fp32 partial sums in a
workspace and one reduction adds them in a fixed order. No atomics: same inputs, same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import (
    Drop,
    add_apart,
    dot,
    factor_precision,
    keep_mask,
    load_scale,
    narrow,
    row_factor,
    scale_argument,
    seed_keys,
    to_ptx,
)
from .tiles import GradBTile, SkinnyTile, cdiv, divide

_REDUCE_BLOCK = 512


@triton.jit
def _finished_dot(lhs, rhs, acc, PRECISION: tl.constexpr):
    """acc + lhs rhs, the dot finished before the sum.

    Left in flight, the registers of its operands and sums are those of what follows it, such as the next step's mask,
    and ptxas serializes wgmma (C7515). :func:`dot` finishes a split one itself.
    """
    if PRECISION == "split":
        return dot(lhs, rhs, acc, PRECISION)
    return add_apart(dot(lhs, rhs, tl.zeros(acc.shape, tl.float32), PRECISION), acc)


@triton.jit(do_not_specialize=["M", "threshold"])
def _shrink_kernel(
    # tensors
    t_ptr, f_ptr, u_ptr, seed_ptr,
    # sizes
    M, C, R, c_per_part,
    # strides
    stride_tm, stride_tc, stride_fr, stride_fc,
    # scalars
    scale, threshold,
    # tile
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """u = scale · drop(t) fᵀ. A program owns (BLOCK_M, BLOCK_R) of u over one part of C."""
    chunks = tl.cdiv(R, BLOCK_R)
    blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    rows = (pid // chunks) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = pid % chunks * BLOCK_R + tl.arange(0, BLOCK_R)  # fastest: the chunks of one row block share t in L2
    part = pid // (chunks * blocks)

    mask_m = rows[:, None] < M
    mask_r = ranks[None, :] < R
    t_rows = t_ptr + rows.to(tl.int64)[:, None] * stride_tm
    f_ranks = f_ptr + ranks.to(tl.int64)[None, :] * stride_fr
    if seed_ptr is not None:
        key0, key1 = seed_keys(seed_ptr)
        factor = row_factor(rows[:, None])

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    begin = part * c_per_part
    for c in range(begin, min(begin + c_per_part, C), BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        cols_wide = cols.to(tl.int64)
        t = tl.load(t_rows + cols_wide[None, :] * stride_tc, mask_m & (cols[None, :] < C), 0.0)  # (BLOCK_M, BLOCK_C)
        f = tl.load(f_ranks + cols_wide[:, None] * stride_fc, mask_r & (cols[:, None] < C), 0.0)  # (BLOCK_C, BLOCK_R)
        if seed_ptr is not None:
            keep = keep_mask(key0, key1, rows[:, None], factor, cols[None, :], threshold, PTX)
            t = tl.where(keep, t, 0.0)
        if seed_ptr is not None:
            acc = _finished_dot(t, f, acc, PRECISION)
        else:
            acc = dot(t, f, acc, PRECISION)

    u_rows = u_ptr + (part.to(tl.int64) * M + rows)[:, None] * R
    tl.store(u_rows + ranks[None, :], acc * load_scale(scale), mask_m & mask_r)


@triton.jit(do_not_specialize=["M", "threshold", "m_per_part"])
def _outer_kernel(
    # tensors
    t_ptr, u_ptr, g_ptr, seed_ptr,
    # sizes
    M, C, R, m_per_part,
    # strides
    stride_tm, stride_tc, stride_gc, stride_gr,
    # scalars
    scale, threshold,
    # tile
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """g = scale · drop(t)ᵀ u. A program owns (BLOCK_C, BLOCK_R) of g over one part of M."""
    chunks = tl.cdiv(R, BLOCK_R)
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    cols = (pid // chunks) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    ranks = pid % chunks * BLOCK_R + tl.arange(0, BLOCK_R)
    part = pid // (chunks * blocks)

    mask_c = cols[:, None] < C
    mask_r = ranks[None, :] < R
    t_cols = t_ptr + cols.to(tl.int64)[:, None] * stride_tc
    if seed_ptr is not None:
        key0, key1 = seed_keys(seed_ptr)
        tl.static_assert(BLOCK_M % 8 == 0)
        factor = row_factor(tl.arange(0, BLOCK_M)[None, :])  # every step begins at a multiple of BLOCK_M, and of 8

    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    begin = part * m_per_part
    for m in range(begin, min(begin + m_per_part, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        rows_wide = rows.to(tl.int64)
        # Loaded transposed, (BLOCK_C, BLOCK_M): the pipeliner keeps no tl.trans of a tile in flight on sm_80.
        t = tl.load(t_cols + rows_wide[None, :] * stride_tm, mask_c & (rows[None, :] < M), 0.0)
        u = tl.load(u_ptr + rows_wide[:, None] * R + ranks[None, :], (rows[:, None] < M) & mask_r, 0.0)
        if seed_ptr is not None:
            keep = keep_mask(key0, key1, rows[None, :], factor, cols[:, None], threshold, PTX)
            t = tl.where(keep, t, 0.0)
        if seed_ptr is not None and PRECISION == "tf32":  # serialized else (sm_90)
            acc = _finished_dot(t, u, acc, PRECISION)
        else:
            acc = dot(t, u, acc, PRECISION)

    g_part = g_ptr + part.to(tl.int64) * C * R
    g_tile = g_part + cols.to(tl.int64)[:, None] * stride_gc + ranks.to(tl.int64)[None, :] * stride_gr
    tl.store(g_tile, narrow(acc * load_scale(scale), g_ptr.dtype.element_ty), mask_c & mask_r)


@triton.jit(do_not_specialize=["M", "m_per_part"])
def _both_kernel(
    # tensors
    t_ptr, f_ptr, u_ptr, v_ptr, g_ptr,
    # sizes
    M, C, R, m_per_part,
    # strides
    stride_tm, stride_tc, stride_fr, stride_fc,
    # scalars
    scale,
    # tile
    SHRINK_PRECISION: tl.constexpr, OUTER_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """v = scale · t fᵀ and g = scale · tᵀ u from one read of t.

    A program keeps f and g at (BLOCK_C, BLOCK_R) and walks one part of M: it stores its columns' share of v
    for every row block it passes and its rows' share of g at the end.
    """
    chunks = tl.cdiv(R, BLOCK_R)
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    block = (pid // chunks) % blocks
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    ranks = pid % chunks * BLOCK_R + tl.arange(0, BLOCK_R)
    part = pid // (chunks * blocks)

    mask_c = cols[None, :] < C
    mask_r = ranks[None, :] < R
    mask_cr = (cols[:, None] < C) & mask_r
    cols_wide = cols.to(tl.int64)
    t_cols = t_ptr + cols_wide[None, :] * stride_tc
    v_block = v_ptr + block.to(tl.int64) * M * R
    scale = load_scale(scale)
    f_tile = f_ptr + cols_wide[:, None] * stride_fc + ranks.to(tl.int64)[None, :] * stride_fr
    f = tl.load(f_tile, mask_cr, 0.0)  # (BLOCK_C, BLOCK_R)

    g = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    begin = part * m_per_part
    for m in range(begin, min(begin + m_per_part, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        mask_m = rows[:, None] < M
        rows_wide = rows.to(tl.int64)[:, None]
        offs_mr = rows_wide * R + ranks[None, :]
        t = tl.load(t_cols + rows_wide * stride_tm, mask_m & mask_c, 0.0)  # (BLOCK_M, BLOCK_C)
        u = tl.load(u_ptr + offs_mr, mask_m & mask_r, 0.0)  # (BLOCK_M, BLOCK_R)
        v = dot(t, f, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), SHRINK_PRECISION)
        tl.store(v_block + offs_mr, v * scale, mask_m & mask_r)
        if OUTER_PRECISION == "tf32":  # float16: serialized where g is stored in several parts (sm_90)
            g = _finished_dot(tl.trans(t), u, g, OUTER_PRECISION)
        else:
            g = dot(tl.trans(t), u, g, OUTER_PRECISION)

    g_tile = g_ptr + (part.to(tl.int64) * C + cols)[:, None] * R + ranks[None, :]
    tl.store(g_tile, narrow(g * scale, g_ptr.dtype.element_ty), mask_cr)


@triton.jit(do_not_specialize=["parts0", "parts1"])
def _reduce_kernel(
    # tensors
    parts0_ptr, out0_ptr, parts1_ptr, out1_ptr,
    # sizes
    numel0, parts0, numel1, parts1,
    # tile
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = Σ parts in ascending order, for two workspaces (the second may be empty) in one launch."""
    pid = tl.program_id(0)
    blocks0 = tl.cdiv(numel0, BLOCK)
    if pid < blocks0:
        _reduce_block(parts0_ptr, out0_ptr, numel0, parts0, pid, BLOCK)
    else:
        _reduce_block(parts1_ptr, out1_ptr, numel1, parts1, pid - blocks0, BLOCK)


@triton.jit
def _reduce_block(parts_ptr, out_ptr, numel, parts, pid, BLOCK: tl.constexpr):
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        acc += tl.load(parts_ptr + offs, mask, 0.0)
        parts_ptr += numel
    tl.store(out_ptr + offs, narrow(acc, out_ptr.dtype.element_ty), mask)


def shrink(x: Tensor, a: Tensor, drop: Drop | None, tile: SkinnyTile, *, allow_tf32: bool = False) -> Tensor:
    """s = drop(x) aᵀ, fp32.    x (M, K)   a (R, K)   s (M, R)"""
    precision = factor_precision(x.dtype, a.dtype, rank_wide=False, allow_tf32=allow_tf32)
    return _shrink(x, a, drop, 1.0 if drop is None else drop.inv_keep, tile, precision)


def grad_a(
    x: Tensor, ds: Tensor, drop: Drop | None, tile: SkinnyTile, out_dtype: torch.dtype, *, allow_tf32: bool = False
) -> Tensor:
    """da = dsᵀ drop(x), in out_dtype.    x (M, K)   ds (M, R) fp32   da (R, K)"""
    da = x.new_empty((ds.shape[1], x.shape[1]), dtype=out_dtype)
    precision = factor_precision(x.dtype, out_dtype, rank_wide=True, allow_tf32=allow_tf32)
    _outer(x, ds, drop, 1.0 if drop is None else drop.inv_keep, da.t(), tile, precision)
    return da


def grad_b(
    dy: Tensor, b: Tensor | None, s: Tensor | None, scale: float | Tensor, tile: GradBTile,
    *, out_dtype: torch.dtype | None = None, allow_tf32: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """ds = scale · dy b, fp32, where b is given, and db = scale · dyᵀ s where s is, in out_dtype (default: b's dtype).

    dy (M, N)   b (N, R)   s, ds (M, R) fp32   db (N, R)

    One pass over dy when both are wanted and ``tile.both`` is set; otherwise shrink and outer, each where wanted.
    """
    out_dtype = out_dtype or b.dtype
    ds_precision = factor_precision(dy.dtype, out_dtype, rank_wide=False, allow_tf32=allow_tf32)
    db_precision = factor_precision(dy.dtype, out_dtype, rank_wide=True, allow_tf32=allow_tf32)
    scale = scale_argument(scale, dy.device)
    db = None if s is None else dy.new_empty((dy.shape[1], s.shape[1]), dtype=out_dtype)
    if b is not None and s is not None and tile.both is not None:
        return _both(dy, b.t(), s, scale, db, tile.both, ds_precision, db_precision)
    ds = None if b is None else _shrink(dy, b.t(), None, scale, tile.ds, ds_precision)
    return ds, db if s is None else _outer(dy, s, None, scale, db, tile.db, db_precision)


def _shrink(t: Tensor, f: Tensor, drop: Drop | None, scale: float | Tensor, tile: SkinnyTile, precision: str) -> Tensor:
    """u = scale · drop(t) fᵀ.    t (M, C)   f (R, C)   u (M, R) fp32"""
    (m, c), r = t.shape, f.shape[0]
    u = t.new_empty((m, r), dtype=torch.float32)
    if m == 0:
        return u
    c_per_part, parts = divide(c, tile.block_c, tile.split)
    target = u if parts == 1 else u.new_empty((parts, m, r))
    programs = cdiv(m, tile.block_m) * cdiv(r, tile.block_r) * parts
    with torch.cuda.device_of(t):
        _shrink_kernel[(programs,)](
            t, f, target, None if drop is None else drop.seed,
            m, c, r, c_per_part,
            t.stride(0), t.stride(1), f.stride(0), f.stride(1),
            scale, 0 if drop is None else drop.threshold,
            precision, tile.block_m, tile.block_c, tile.block_r, drop is not None and to_ptx(),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        _reduce((target, u))
    return u


def _outer(
    t: Tensor, u: Tensor, drop: Drop | None, scale: float | Tensor, g: Tensor, tile: SkinnyTile, precision: str
) -> Tensor:
    """Fill and return g = scale · drop(t)ᵀ u.    t (M, C)   u (M, R) fp32   g (C, R), dense in either order"""
    (m, c), r = t.shape, u.shape[1]
    if m == 0 or c == 0:
        return g.zero_()
    m_per_part, parts = divide(m, tile.block_m, tile.split)
    target = g if parts == 1 else u.new_empty((parts, c * r))  # each part in the memory order of g
    programs = cdiv(c, tile.block_c) * cdiv(r, tile.block_r) * parts
    with torch.cuda.device_of(t):
        _outer_kernel[(programs,)](
            t, u, target, None if drop is None else drop.seed,
            m, c, r, m_per_part,
            t.stride(0), t.stride(1), g.stride(0), g.stride(1),
            scale, 0 if drop is None else drop.threshold,
            precision, tile.block_m, tile.block_c, tile.block_r, drop is not None and to_ptx(),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        _reduce((target, g))
    return g


def _both(
    t: Tensor, f: Tensor, u: Tensor, scale: float | Tensor, g: Tensor, tile: SkinnyTile,
    shrink_precision: str, outer_precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return v = scale · t fᵀ and the filled g = scale · tᵀ u.    t (M, C)   f (R, C)   u, v (M, R) fp32   g (C, R)"""
    (m, c), r = t.shape, f.shape[0]
    v = u.new_empty((m, r))
    if m == 0 or c == 0:
        return v.zero_(), g.zero_()
    m_per_part, parts = divide(m, tile.block_m, tile.split)
    blocks = cdiv(c, tile.block_c)
    v_target = v if blocks == 1 else v.new_empty((blocks, m, r))
    g_target = g if parts == 1 else v.new_empty((parts, c, r))
    with torch.cuda.device_of(t):
        _both_kernel[(blocks * cdiv(r, tile.block_r) * parts,)](
            t, f, u, v_target, g_target,
            m, c, r, m_per_part,
            t.stride(0), t.stride(1), f.stride(0), f.stride(1),
            scale,
            shrink_precision, outer_precision, tile.block_m, tile.block_c, tile.block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        _reduce((v_target, v), (g_target, g))
    return v, g


def _reduce(*pairs: tuple[Tensor, Tensor]) -> None:
    """out = parts summed over their first dimension for each (parts, out); nothing for a pair that is one tensor."""
    pairs = [(parts, out) for parts, out in pairs if parts is not out]
    if not pairs:
        return
    (parts0, out0), (parts1, out1) = pairs[0], pairs[-1]
    numel1 = out1.numel() if len(pairs) == 2 else 0
    programs = cdiv(out0.numel(), _REDUCE_BLOCK) + cdiv(numel1, _REDUCE_BLOCK)
    _reduce_kernel[(programs,)](
        parts0, out0, parts1, out1,
        out0.numel(), parts0.shape[0], numel1, parts1.shape[0],
        _REDUCE_BLOCK, num_warps=4,
    )  # fmt: skip
