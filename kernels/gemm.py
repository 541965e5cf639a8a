"""The pieces that are M×N or M×K large: expand, grad_x, and their low-rank halves.

x (M, Q) the left operand, x or dy    w (Q, P) the weight as the product sees it    f (R, P) the factor likewise
s (M, R) fp32, s or ds    out (M, P)

    out = x w + drop'((scale · s) f) + bias + scale · lora_bias

    expand:  Q = K, P = N, w = Wᵀ, f = bᵀ        grad_x:  Q = N, P = K, w = W, f = a, no bias

Where blocks of out underfill the chip the contraction is split into a workspace; the low-rank kernel, which
writes out without x and w, then adds the parts in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import (
    Drop,
    base_precision,
    dot,
    grouped,
    load_scale,
    lowrank_precision,
    lowrank_tile,
    narrow,
    scale_argument,
)
from .tiles import GemmTile, LowrankTile, cdiv, descriptor_reason, divide


@triton.jit
def _add_bias(acc, bias_ptr, lora_bias_ptr, cols, P, scale):
    """acc + bias + scale · lora_bias; each may be None."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, cols < P, 0.0).to(tl.float32)[None, :]
    if lora_bias_ptr is not None:
        acc += scale * tl.load(lora_bias_ptr + cols, cols < P, 0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["M", "threshold", "parts"])
def _lowrank_kernel(
    # tensors
    s_ptr, f_ptr, bias_ptr, lora_bias_ptr, parts_ptr, out_ptr, seed_ptr,
    # sizes
    M, P, R, parts,
    # strides
    stride_fr, stride_fp,
    # scalars
    scale, threshold, inv_keep,
    # tile
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = drop'((scale · s) f) + bias + scale · lora_bias + Σ parts. A program owns (BLOCK_M, BLOCK_P) of out."""
    blocks_p = tl.cdiv(P, BLOCK_P)
    pid = tl.program_id(0)
    rows = pid // blocks_p * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    scale = load_scale(scale)
    acc = lowrank_tile(
        s_ptr, f_ptr, seed_ptr, rows, cols, M, P, R, stride_fr, stride_fp, scale, threshold, inv_keep,
        PRECISION, BLOCK_M, BLOCK_P, BLOCK_R,
    )  # fmt: skip
    acc = _add_bias(acc, bias_ptr, lora_bias_ptr, cols, P, scale)

    mask = (rows[:, None] < M) & (cols[None, :] < P)
    offs = rows.to(tl.int64)[:, None] * P + cols[None, :]
    if parts_ptr is not None:
        for _ in range(parts):
            acc += tl.load(parts_ptr + offs, mask, 0.0)
            parts_ptr += M.to(tl.int64) * P
    tl.store(out_ptr + offs, narrow(acc, out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M", "threshold"])
def _gemm_kernel(
    # tensors
    x_ptr, w_ptr, s_ptr, f_ptr, bias_ptr, lora_bias_ptr, out_ptr, seed_ptr,
    # sizes
    M, P, Q, R, q_per_part,
    # strides
    stride_xm, stride_xq, stride_wq, stride_wp, stride_fr, stride_fp,
    # scalars
    scale, threshold, inv_keep,
    # tile
    PRECISION: tl.constexpr, LOWRANK_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """One part of out, (BLOCK_M, BLOCK_P) per program. s_ptr None: the bare partial product, fp32."""
    blocks_m, blocks_p = tl.cdiv(M, BLOCK_M), tl.cdiv(P, BLOCK_P)
    pid = tl.program_id(0)
    part = pid // (blocks_m * blocks_p)
    pid_m, pid_p = grouped(pid % (blocks_m * blocks_p), blocks_m, blocks_p, GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_m, mask_p = rows[:, None] < M, cols[None, :] < P

    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xm
    w_cols = w_ptr + cols.to(tl.int64)[None, :] * stride_wp
    begin = part * q_per_part
    for q in range(begin, min(begin + q_per_part, Q), BLOCK_Q):
        depth = q + tl.arange(0, BLOCK_Q)
        depth_wide = depth.to(tl.int64)
        x = tl.load(x_rows + depth_wide[None, :] * stride_xq, mask_m & (depth[None, :] < Q), 0.0)
        w = tl.load(w_cols + depth_wide[:, None] * stride_wq, (depth[:, None] < Q) & mask_p, 0.0)
        acc = dot(x, w, acc, PRECISION)

    # After the loop: with an accumulator that starts from it ptxas serialized wgmma in 4 of 9 tiles (triton 3.7.1).
    if s_ptr is not None:
        scale = load_scale(scale)
        acc += lowrank_tile(
            s_ptr, f_ptr, seed_ptr, rows, cols, M, P, R, stride_fr, stride_fp, scale, threshold, inv_keep,
            LOWRANK_PRECISION, BLOCK_M, BLOCK_P, BLOCK_R,
        )  # fmt: skip
    acc = _add_bias(acc, bias_ptr, lora_bias_ptr, cols, P, scale)
    offs = (part.to(tl.int64) * M + rows)[:, None] * P + cols[None, :]
    tl.store(out_ptr + offs, narrow(acc, out_ptr.dtype.element_ty), mask_m & mask_p)


@triton.jit(do_not_specialize=["M", "threshold"])
def _gemm_descriptor_kernel(
    # tensors: x (M, Q), w stored (P, Q) or (Q, P), out (M, P), each behind a descriptor
    x_desc, w_desc, out_desc, s_ptr, f_ptr, bias_ptr, lora_bias_ptr, seed_ptr,
    # sizes
    M, P, Q, R,
    # strides
    stride_fr, stride_fp,
    # scalars
    scale, threshold, inv_keep,
    # tile
    PRECISION: tl.constexpr, LOWRANK_PRECISION: tl.constexpr, W_STORES_P_BY_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """out by persistent programs: each owns every num_programs-th (BLOCK_M, BLOCK_P) block.

    The low-rank product comes first: at 128 x 256 x 64 with 8 warps that takes 184 to 254 registers and no spill, where
    as an epilogue, with a second accumulator, it took 255 and 1616 to 2176 bytes of spills, and ptxas serialized wgmma.
    The block is stored in halves: with 3 stages 180248 bytes of shared memory instead of 213016, and so 4 stages fit
    with 229408. (sm_90, triton 3.7.1)
    """
    blocks_m, blocks_p = tl.cdiv(M, BLOCK_M), tl.cdiv(P, BLOCK_P)
    scale = load_scale(scale)
    for block in tl.range(tl.program_id(0), blocks_m * blocks_p, tl.num_programs(0)):
        pid_m, pid_p = grouped(block, blocks_m, blocks_p, GROUP_M)
        row, col = pid_m * BLOCK_M, pid_p * BLOCK_P
        cols = col + tl.arange(0, BLOCK_P)
        if s_ptr is not None:
            acc = lowrank_tile(
                s_ptr, f_ptr, seed_ptr, row + tl.arange(0, BLOCK_M), cols, M, P, R, stride_fr, stride_fp,
                scale, threshold, inv_keep, LOWRANK_PRECISION, BLOCK_M, BLOCK_P, BLOCK_R,
            )  # fmt: skip
        else:  # the frozen product alone, which bench/kernel_health.py measures the loop against
            acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        for q in range(0, Q, BLOCK_Q):
            x = x_desc.load([row, q])  # (BLOCK_M, BLOCK_Q)
            if W_STORES_P_BY_Q:
                w = w_desc.load([col, q]).T
            else:
                w = w_desc.load([q, col])
            acc = dot(x, w, acc, PRECISION)
        acc = _add_bias(acc, bias_ptr, lora_bias_ptr, cols, P, scale)
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_P // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        out_desc.store([row, col], narrow(left, out_desc.dtype))
        out_desc.store([row, col + BLOCK_P // 2], narrow(right, out_desc.dtype))


def expand(
    x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, lora_bias: Tensor | None,
    scale: float | Tensor, tile: GemmTile, *, allow_tf32: bool = False,
) -> Tensor:  # fmt: skip
    """y = x wᵀ + bias + scale · (s bᵀ + lora_bias).    x (M, K)   w (N, K)   s (M, R) fp32   b (N, R)   y (M, N)"""
    return _gemm(x, w.t(), s, b.t(), _dense(bias), _dense(lora_bias), scale, None, tile, allow_tf32)


def grad_x(
    dy: Tensor, w: Tensor, ds: Tensor, a: Tensor, drop: Drop | None, tile: GemmTile, *, allow_tf32: bool = False
) -> Tensor:
    """dx = dy w + drop'(ds a).    dy (M, N)   w (N, K)   ds (M, R) fp32   a (R, K)   dx (M, K)"""
    return _gemm(dy, w, ds, a, None, None, 1.0, drop, tile, allow_tf32)


def lowrank_y(
    s: Tensor, b: Tensor, bias: Tensor | None, lora_bias: Tensor | None, scale: float | Tensor,
    out_dtype: torch.dtype, tile: LowrankTile, *, allow_tf32: bool = False,
) -> Tensor:  # fmt: skip
    """scale · (s bᵀ + lora_bias) + bias.    s (M, R) fp32   b (N, R)   (M, N)"""
    out = s.new_empty((s.shape[0], b.shape[0]), dtype=out_dtype)
    return _lowrank(s, b.t(), _dense(bias), _dense(lora_bias), None, scale, None, out, tile, allow_tf32)


def lowrank_x(
    ds: Tensor, a: Tensor, drop: Drop | None, out_dtype: torch.dtype, tile: LowrankTile, *, allow_tf32: bool = False
) -> Tensor:
    """drop'(ds a).    ds (M, R) fp32   a (R, K)   (M, K)"""
    out = ds.new_empty((ds.shape[0], a.shape[1]), dtype=out_dtype)
    return _lowrank(ds, a, None, None, None, 1.0, drop, out, tile, allow_tf32)


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _lowrank(
    s: Tensor, f: Tensor, bias: Tensor | None, lora_bias: Tensor | None, parts: Tensor | None, scale: float | Tensor,
    drop: Drop | None, out: Tensor, tile: LowrankTile, allow_tf32: bool,
) -> Tensor:  # fmt: skip
    """Fill and return out (M, P) from s (M, R) and f (R, P), and from fp32 parts (parts, M, P) if given."""
    m, p = out.shape
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(s):
        _lowrank_kernel[(cdiv(m, tile.block_m) * cdiv(p, tile.block_p),)](
            s, f, bias, lora_bias, parts, out, None if drop is None else drop.seed,
            m, p, f.shape[0], 0 if parts is None else parts.shape[0],
            f.stride(0), f.stride(1),
            scale_argument(scale, s.device), *(0, 1.0) if drop is None else drop[1:],
            lowrank_precision(out.dtype, f.dtype, allow_tf32, alone=parts is None),
            tile.block_m, tile.block_p, tile.block_r,
            num_warps=tile.num_warps, num_stages=1,
        )  # fmt: skip
    return out


def _gemm(
    x: Tensor, w: Tensor, s: Tensor, f: Tensor, bias: Tensor | None, lora_bias: Tensor | None, scale: float | Tensor,
    drop: Drop | None, tile: GemmTile, allow_tf32: bool,
) -> Tensor:  # fmt: skip
    """out = x w + drop'((scale · s) f) + bias + scale · lora_bias.    x (M, Q)   w (Q, P)   s (M, R)   f (R, P)"""
    (m, q), p = x.shape, w.shape[1]
    out = x.new_empty((m, p))
    if out.numel() == 0:
        return out
    if tile.form == "descriptor":
        _descriptor(x, w, s, f, bias, lora_bias, out, scale, drop, tile, allow_tf32)
        return out
    q_per_part, parts = divide(q, tile.block_q, tile.split)
    if parts > 1:
        target = x.new_empty((parts, m, p), dtype=torch.float32)
        _pointer(x, w, None, f, None, None, target, 1.0, None, q_per_part, parts, tile, allow_tf32)
        finish = LowrankTile(tile.block_m, tile.block_p, tile.block_r, tile.num_warps)
        return _lowrank(s, f, bias, lora_bias, target, scale, drop, out, finish, allow_tf32)
    _pointer(x, w, s, f, bias, lora_bias, out, scale, drop, q_per_part, 1, tile, allow_tf32)
    return out


def _pointer(
    x: Tensor, w: Tensor, s: Tensor | None, f: Tensor, bias: Tensor | None, lora_bias: Tensor | None, out: Tensor,
    scale: float | Tensor, drop: Drop | None, q_per_part: int, parts: int, tile: GemmTile, allow_tf32: bool,
) -> None:  # fmt: skip
    """The pointer form: any strides, any chip."""
    (m, q), (r, p) = x.shape, f.shape
    with torch.cuda.device_of(x):
        _gemm_kernel[(cdiv(m, tile.block_m) * cdiv(p, tile.block_p) * parts,)](
            x, w, s, f, bias, lora_bias, out, None if drop is None else drop.seed,
            m, p, q, r, q_per_part,
            x.stride(0), x.stride(1), w.stride(0), w.stride(1), f.stride(0), f.stride(1),
            scale_argument(scale, x.device), *(0, 1.0) if drop is None else drop[1:],
            base_precision(x.dtype, allow_tf32), lowrank_precision(x.dtype, f.dtype, allow_tf32),
            tile.block_m, tile.block_p, tile.block_q, tile.block_r, tile.group_m,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def _descriptor(
    x: Tensor, w: Tensor, s: Tensor, f: Tensor, bias: Tensor | None, lora_bias: Tensor | None, out: Tensor,
    scale: float | Tensor, drop: Drop | None, tile: GemmTile, allow_tf32: bool,
) -> None:  # fmt: skip
    """The descriptor form. Raises ValueError for tensors that a descriptor cannot address."""
    (m, q), (r, p) = x.shape, f.shape
    stored = w.t() if w.stride(0) == 1 else w
    for name, tensor in (("x", x), ("w", stored), ("out", out)):
        reason = descriptor_reason(name, tensor.shape, tensor.stride(), tensor.element_size(), tensor.data_ptr())
        if reason:
            raise ValueError(f"no descriptor form: {reason}; pass a tile of the pointer form")
    w_block = [tile.block_q, tile.block_p] if stored is w else [tile.block_p, tile.block_q]
    blocks = cdiv(m, tile.block_m) * cdiv(p, tile.block_p)
    with torch.cuda.device_of(x):
        _gemm_descriptor_kernel[(min(blocks, tile.programs),)](
            TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_q]),
            TensorDescriptor.from_tensor(stored, w_block),
            TensorDescriptor.from_tensor(out, [tile.block_m, tile.block_p // 2]),
            s, f, bias, lora_bias, None if drop is None else drop.seed,
            m, p, q, r,
            f.stride(0), f.stride(1),
            scale_argument(scale, x.device), *(0, 1.0) if drop is None else drop[1:],
            base_precision(x.dtype, allow_tf32), lowrank_precision(x.dtype, f.dtype, allow_tf32), stored is not w,
            tile.block_m, tile.block_p, tile.block_q, tile.block_r, tile.group_m,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
