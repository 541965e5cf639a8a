"""Device helpers shared by the kernels: program order, scale, keep mask, the one dot, the low-rank tile.

M rows, P columns of an output, R rank.   s (M, R)   f (R, P)   BLOCK_* the tile a program owns.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Under the interpreter tl.dot multiplies the raw bits of bf16 operands, so `dot` rounds and then upcasts there.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

HIP = torch.version.hip is not None

GOLDEN = tl.constexpr(0x9E3779B1)
MIX1 = tl.constexpr(0x7FEB352D)
MIX2 = tl.constexpr(0x846CA68B)
STEP = tl.constexpr(1597334677)
STEP_2 = tl.constexpr(1597334677**2 % 2**32)
STEP_4 = tl.constexpr(1597334677**4 % 2**32)


class Drop(NamedTuple):
    """One dropout mask: all that x needs besides its own rows and columns."""

    seed: Tensor  # int64, one element, on the device
    threshold: int  # signed 32-bit; an element is dropped when its hash is no larger
    inv_keep: float  # 1 / (1 - p)


@triton.jit
def grouped(pid, blocks_m, blocks_p, GROUP_M: tl.constexpr):
    """Program ``pid`` of a (blocks_m, blocks_p) grid, walked in bands of GROUP_M rows so that a wave reuses L2."""
    band = pid // (GROUP_M * blocks_p)
    first = band * GROUP_M
    height = min(blocks_m - first, GROUP_M)
    within = pid % (GROUP_M * blocks_p)
    return first + within % height, within // height


@triton.jit
def load_scale(scale):
    """A runtime scalar that arrives as a float or as a pointer to one fp32 or fp64 element."""
    if isinstance(scale, tl.tensor):  # the interpreter passes a float as it is
        if scale.dtype.is_ptr():
            scale = tl.load(scale)
        scale = scale.to(tl.float32)
    return scale


@triton.jit
def mix(h):
    """lowbias32 on uint32."""
    h = (h ^ (h >> 16)) * MIX1
    h = (h ^ (h >> 15)) * MIX2
    return h ^ (h >> 16)


@triton.jit
def seed_keys(seed_ptr):
    """The two words of a seed: scalar work, once per program."""
    seed = tl.load(seed_ptr)
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    key0 = mix(low ^ mix(high ^ GOLDEN))
    return key0, mix(key0 ^ high)


@triton.jit
def row_factor(rows):
    """MIX2 * STEP ** (row % 8), what a row multiplies the hash of its group by."""
    rows = rows.to(tl.uint32)
    factor = tl.full(rows.shape, MIX2, tl.uint32)
    factor = tl.where((rows & 1) != 0, factor * STEP, factor)
    factor = tl.where((rows & 2) != 0, factor * STEP_2, factor)
    return tl.where((rows & 4) != 0, factor * STEP_4, factor)


@triton.jit
def keep_mask(key0, key1, rows, factor, cols, threshold, PTX: tl.constexpr):
    """Which elements stay: the arithmetic of ``fused_lora/dropout.py``. rows and cols broadcast to the tile.

    factor: :func:`row_factor` of the rows. PTX: whether this is compiled to PTX, and the comparisons are to be
    hidden from LLVM. It makes vectors of up to 32 of them, packs half of these into bits and unpacks the bits again:
    13 % of all instructions of a loop (sm_90, triton 3.7.1; docs/tuning-notes.md).
    """
    rows = rows.to(tl.uint32)
    r0 = mix((rows >> 3) ^ key0)
    r1 = mix(r0 + key1) | 1
    u = cols.to(tl.uint32) * GOLDEN + r0
    u = (u ^ (u >> 16)) * r1
    h = (u ^ (u >> 15)) * factor
    if PTX:
        h = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [h], dtype=tl.uint32, is_pure=True, pack=1)
    return h.to(tl.int32, bitcast=True) > threshold


@triton.jit
def narrow(t, dtype: tl.constexpr):
    """t in ``dtype``, rounded to nearest even, as the hardware does; the interpreter's own cast to bf16 truncates."""
    if INTERPRET and dtype == tl.bfloat16 and t.dtype == tl.float32:
        bits = t.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        t = tl.where(t == t, rounded.to(tl.float32, bitcast=True), t)
    return t.to(dtype)


@triton.jit
def round_to_tf32(t):
    """t with its fp32 numbers rounded to tf32's 11 bits, to nearest. Left as they are, a tensor core cuts them off:
    twice the error, all of it to one side."""
    if t.dtype == tl.float32:
        if INTERPRET:
            bits = (t.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
            t = tl.where(tl.abs(t) < float("inf"), bits.to(tl.float32, bitcast=True), t)
        else:
            t = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [t], tl.float32, is_pure=True, pack=1)
    return t


@triton.jit
def add_apart(product, acc):
    """acc + product, on the cores that round to nearest. fma: a plain sum would be folded back into the dot."""
    return tl.fma(product, tl.full(acc.shape, 1.0, tl.float32), acc)


@triton.jit
def dot(lhs, rhs, acc, PRECISION: tl.constexpr):
    """acc + lhs rhs, accumulated in fp32.

    PRECISION: "bf16" or "fp16" round both operands to that type; "split" (lhs bf16, rhs fp32) writes rhs as a
    sum of three bf16 terms, which is exact, so nothing of the fp32 operand is lost and lhs is not touched;
    "tf32", "tf32x3" and "ieee" are Triton's own names, on fp32 operands.

    Tensor cores round their accumulator towards zero in every step (Fasi et al., 2021, doi:10.7717/peerj-cs.330), so
    "split", which is to be as good as fp32, sums a step's products alone and adds them apart, as "tf32x3" does itself.
    """
    if PRECISION == "split":
        high = rhs.to(tl.bfloat16)
        rest = rhs - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        products = dot(lhs, low, tl.zeros(acc.shape, tl.float32), "bf16")
        products = dot(lhs, middle, products, "bf16")
        return add_apart(dot(lhs, high, products, "bf16"), acc)
    elif PRECISION == "bf16" or PRECISION == "fp16":
        operand: tl.constexpr = tl.bfloat16 if PRECISION == "bf16" else tl.float16
        lhs = narrow(lhs, operand)
        rhs = narrow(rhs, operand)
        if INTERPRET:
            return tl.dot(lhs.to(tl.float32), rhs.to(tl.float32), acc)
        return tl.dot(lhs, rhs, acc)
    else:
        if PRECISION == "tf32":
            lhs = round_to_tf32(lhs)
            rhs = round_to_tf32(rhs)
        return tl.dot(lhs.to(tl.float32), rhs.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def lowrank_tile(
    # tensors: s (M, R) contiguous, f (R, P)
    s_ptr, f_ptr, seed_ptr,
    # place and sizes
    rows, cols, M, P, R,
    # strides
    stride_fr, stride_fp,
    # scalars
    scale, threshold, inv_keep,
    # tile
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """drop'((scale s) f) at (rows, cols), fp32 (BLOCK_M, BLOCK_P). No seed, no mask."""
    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    s_rows = s_ptr + rows.to(tl.int64)[:, None] * R
    f_cols = f_ptr + cols.to(tl.int64)[None, :] * stride_fp
    for r in tl.range(0, R, BLOCK_R, num_stages=1):  # one pass for most ranks: stages would only cost memory
        ranks = r + tl.arange(0, BLOCK_R)
        s = tl.load(s_rows + ranks[None, :], (rows[:, None] < M) & (ranks[None, :] < R), 0.0)
        f_mask = (ranks[:, None] < R) & (cols[None, :] < P)
        f = tl.load(f_cols + ranks.to(tl.int64)[:, None] * stride_fr, f_mask, 0.0)  # (BLOCK_R, BLOCK_P)
        acc = dot(s * scale, f, acc, PRECISION)
    if seed_ptr is not None:
        key0, key1 = seed_keys(seed_ptr)
        # Not PTX: here comparisons are vectors without harm, and their scalars took 40 registers more.
        keep = keep_mask(key0, key1, rows[:, None], row_factor(rows[:, None]), cols[None, :], threshold, False)
        acc = tl.where(keep, acc * inv_keep, 0.0)
    return acc


def to_ptx() -> bool:
    """Whether kernels are compiled to PTX: neither interpreted nor for AMD's chips."""
    return not (HIP or INTERPRET.value)


def scale_argument(scale: float | Tensor, device: torch.device) -> float | Tensor:
    """A scale as the kernels take it: a tensor on their device as it is (no synchronisation), else a float."""
    return scale if isinstance(scale, Tensor) and scale.device == device else float(scale)


# Which dot. T is the dtype of x, w and y; the adapters have T too, or another ("mixed": fp32 over a bf16 or fp16 T).


def base_precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """For x w: T on both sides."""
    if dtype == torch.float32:
        return _fp32_dot("tf32") if allow_tf32 else "ieee"
    return "bf16" if dtype == torch.bfloat16 else "fp16"


def factor_precision(dtype: torch.dtype, adapter: torch.dtype, rank_wide: bool, allow_tf32: bool) -> str:
    """For s, ds, da and db: T on the left; on the right a factor, or (rank_wide) the fp32 s or ds.

    Mixed keeps all of the fp32 side, for da and db are gradients of fp32 parameters. fp16 rounds a rank-wide
    tensor to tf32 (as many bits as fp16) because its range, above all that of ds, does not fit fp16.
    """
    if dtype != torch.float32 and adapter != dtype:
        return "split" if dtype == torch.bfloat16 else _fp32_dot("tf32x3")
    if dtype == torch.float16 and rank_wide:
        return _fp32_dot("tf32")
    return base_precision(dtype, allow_tf32)


def lowrank_precision(dtype: torch.dtype, adapter: torch.dtype, allow_tf32: bool, alone: bool = False) -> str:
    """For s bᵀ and ds a, rank-wide fp32 times a factor, rounded to T at the store.

    tf32 has fp16's bits: to round both fp32 sides to it are two errors of the result's own size. ``alone``, where the
    store is followed by a third, cuBLAS's, mixed fp16 keeps all of both; the sums of a GEMM leave no registers for it.
    """
    if dtype == torch.float16 and adapter != dtype and alone:
        return _fp32_dot("tf32x3")
    if dtype != torch.float32 and (adapter != dtype or dtype == torch.float16):
        return _fp32_dot("tf32")
    return base_precision(dtype, allow_tf32)


def _fp32_dot(name: str) -> str:
    """A tf32 name, where the compiler has it: Triton's AMD backend does not on every chip."""
    return "ieee" if HIP else name
