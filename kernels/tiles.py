"""Which tile each kernel runs with: frozen configurations, what makes one legal, and how one is picked. Pure Python.

M rows   N out_features   K in_features   R rank   C the long column count of a skinny kernel (K or N)
P, Q   columns of a GEMM's output and its contraction (expand: P = N, Q = K; grad_x: P = K, Q = N)

Every number here is a choice between tiles that compile clean (``bench/kernel_health.py``: no spill, no serialized
wgmma, shared memory within the chip); none has been timed on a GPU yet. ``shipped`` lists all that can be picked.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

# Bytes of shared memory one program may use. An NVIDIA chip of unknown capability gets the smallest of its kin.
_SHARED_LIMIT = {
    (8, 0): 166912, (8, 6): 101376, (8, 7): 166912, (8, 9): 101376,
    (9, 0): 232448, (10, 0): 232448, (10, 3): 232448, (11, 0): 232448, (12, 0): 101376, (12, 1): 101376,
}  # fmt: skip
_AMD_SHARED_LIMIT = 65536

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class SkinnyTile:
    """shrink, outer and both: t (BLOCK_M, BLOCK_C) at a time, BLOCK_R ranks; ``split`` parts of the contraction."""

    block_m: int
    block_c: int
    block_r: int
    num_warps: int
    num_stages: int
    split: int = 1


@dataclass(frozen=True)
class GradBTile:
    """``both``: one pass over dy for ds and db; ``ds`` and ``db``: its halves, for when one pass does not pay."""

    both: SkinnyTile | None
    ds: SkinnyTile
    db: SkinnyTile


@dataclass(frozen=True)
class LowrankTile:
    """The low-rank product alone: (BLOCK_M, BLOCK_P) of the output, BLOCK_R ranks at a time."""

    block_m: int
    block_p: int
    block_r: int
    num_warps: int


@dataclass(frozen=True)
class GemmTile:
    """The big GEMM. ``form``: "pointer", or "descriptor" (TMA, persistent, ``programs`` of them)."""

    block_m: int
    block_p: int
    block_q: int
    block_r: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    split: int = 1
    form: str = "pointer"
    programs: int = 0


@dataclass(frozen=True)
class Problem:
    """One LoRA linear layer. dtype of x, w and y; adapter_dtype of a and b: names, or torch dtypes."""

    M: int
    N: int
    K: int
    R: int
    dtype: str
    adapter_dtype: str
    dropout: bool = False

    @property
    def regime(self) -> str:
        """Which dots it needs (see ``device.factor_precision``)."""
        dtype, adapter = (str(d).removeprefix("torch.") for d in (self.dtype, self.adapter_dtype))
        return dtype if dtype in (adapter, "float32") else f"mixed {dtype}"

    @property
    def itemsize(self) -> int:
        return _ITEMSIZE[self.regime.removeprefix("mixed ")]

    def vectors(self, *columns: int) -> bool:
        """Whether rows of these lengths load as vectors: all Triton knows of a length is whether 16 divides it."""
        return self.itemsize == 4 or not any(length % 16 for length in columns)

    @property
    def adapter_itemsize(self) -> int:
        return 4 if self.regime.startswith("mixed") else self.itemsize


@dataclass(frozen=True)
class Chip:
    num_sms: int
    capability: tuple[int, int]
    hip: bool = False

    @property
    def shared_limit(self) -> int:
        if self.hip:
            return _AMD_SHARED_LIMIT
        kin = [limit for (major, _), limit in _SHARED_LIMIT.items() if major == self.capability[0]]
        return _SHARED_LIMIT.get(self.capability, min(kin, default=101376))

    @property
    def warp_groups(self) -> bool:
        """Tensor cores that read shared memory (wgmma, tcgen05): large tiles cost them no operand registers."""
        return not self.hip and self.capability[0] in (9, 10, 11)

    @property
    def tensor_memory(self) -> bool:
        """Tensor cores that keep their sums in a memory of their own (tcgen05)."""
        return self.warp_groups and self.capability[0] >= 10

    @property
    def descriptors(self) -> bool:
        return not self.hip and self.capability[0] >= 9


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def divide(length: int, block: int, split: int) -> tuple[int, int]:
    """(length of one part, number of parts): at most ``split`` parts, none empty, each whole blocks but the last."""
    per_part = cdiv(max(cdiv(length, block), 1), split) * block
    return per_part, max(cdiv(length, per_part), 1)


# ---- legality


def skinny_shared_bytes(tile: SkinnyTile, problem: Problem, kernel: str, chip: Chip) -> int:
    """The statement of what a skinny tile may take of shared memory in "shrink", "outer" or "both".

    Each stage holds a t tile and a rank tile as loaded. t may be widened to tf32, for tf32x3 its partner too. Tensor
    cores that read shared memory want the rank tiles there once more, rounded or as the terms of a split; and t and the
    terms yet again where a split feeds two dots (both). The compile test holds the compiler to it.
    """
    t, regime = tile.block_m * tile.block_c, problem.regime
    narrow, wide = sorted((tile.block_m, tile.block_c))
    operands = 0
    if chip.warp_groups:
        terms = {"bfloat16": 2, "mixed bfloat16": 6, "float16": 4, "mixed float16": 8, "float32": 4}[regime]
        operands = terms * (narrow + wide) * tile.block_r
        if regime == "mixed bfloat16" and kernel == "both":
            operands += t * problem.itemsize + operands
    if regime == "mixed float16" or (regime == "float16" and kernel != "shrink"):
        operands += 4 * t + (0 if regime == "float16" else 12 * narrow * tile.block_r)
    return tile.num_stages * (t * problem.itemsize + 4 * narrow * tile.block_r) + operands + 1024


def gemm_shared_bytes(tile: GemmTile, problem: Problem) -> int:
    """The same for a GEMM tile: the pipelined x and w tiles, and the larger of what comes before and after them."""
    stages = tile.num_stages * tile.block_q * (tile.block_m + tile.block_p) * problem.itemsize
    lowrank = 4 * tile.block_r * (tile.block_m + tile.block_p)
    if tile.form == "descriptor":  # the store goes through shared memory, half a tile at a time, beside the stages
        return stages + tile.block_m * tile.block_p // 2 * problem.itemsize + 1024
    return max(stages, lowrank, tile.block_m * tile.block_p * problem.itemsize) + 1024


def descriptor_reason(name: str, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, address: int) -> str:
    """Why a tensor cannot be read or written through a TMA descriptor; empty when it can."""
    if itemsize != 2:
        return f"{name}: the descriptor form is for 16-bit types"
    if 0 in shape:
        return f"{name} is empty"
    if strides[-1] != 1:
        return f"{name}: inner stride {strides[-1]} is not 1"
    if address % 16:
        return f"{name}: address is not a multiple of 16 bytes"
    for stride in strides[:-1]:
        if stride <= 0 or stride * itemsize % 16:
            return f"{name}: row stride {stride} x {itemsize} bytes is not a positive multiple of 16"
    return ""


# ---- choice


def _rank_block(rank: int, largest: int) -> int:
    """The power of two from 16 to ``largest`` that covers the rank, or the largest, which then takes several rounds."""
    block = 16
    while block < min(rank, largest):
        block *= 2
    return block


def _gemm_ranks(rank: int) -> int:
    """Of ranks that 16 does not divide no more than 16 at a time: 32 spilled 12 to 492 bytes (sm_80, sm_90)."""
    return _rank_block(rank, 16 if rank % 16 else 32)


def _fit_stages(tile, chip: Chip, shared_bytes):
    """The tile with as many of its stages as the chip's shared memory holds."""
    while shared_bytes(tile) > chip.shared_limit:
        if tile.num_stages == 1:
            raise ValueError(f"{tile} needs {shared_bytes(tile)} bytes of shared memory of {chip.shared_limit}")
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile


def _finish(tile: SkinnyTile, kernel: str, blocks: int, most: int, problem: Problem, chip: Chip) -> SkinnyTile:
    """Fit the stages, then split the contraction until programs fill every slot of the chip, into ``most`` parts."""
    shared_bytes = partial(skinny_shared_bytes, problem=problem, kernel=kernel, chip=chip)
    tile = _fit_stages(tile, chip, shared_bytes)
    resident = min(4, chip.shared_limit // shared_bytes(tile))
    return replace(tile, split=max(1, min(resident * chip.num_sms // max(blocks, 1), most)))


def _shrink_tile(problem: Problem, chip: Chip, columns: int, masked: bool = False) -> SkinnyTile:
    regime, rank = problem.regime, problem.R
    if regime == "float32":
        r = _rank_block(rank, 64)
        # sm_80, r 32, 8 warps: 8 bytes spilled with tf32; sm_100, 4 warps: 32 bytes without.
        tile = SkinnyTile(64, 32, r, 4 if r == 16 or (r == 32 and chip.capability < (10, 0)) else 8, 3)
    else:
        widest = _widest_rank(regime, chip)
        r = _rank_block(rank, widest if problem.vectors(columns) else max(widest // 2, 16))
        if r == 32 and rank % 16 and chip.warp_groups and not regime.startswith("mixed"):
            r = 64  # 32: wgmma serialized (triton 3.6.0)
        tile = SkinnyTile(64, 64, r, 4, 2) if chip.hip else SkinnyTile(128, 64, r, 8, 4 if r <= 32 else 3)
        if not (chip.hip or chip.warp_groups):
            # 128 rows: 180 bytes spilled with a mask (sm_80); 12 with a mask and r 64 (sm_80 to sm_89, triton 3.7.1)
            if (regime == "mixed float16" and not problem.vectors(columns)) or (masked and r == 64):
                tile = replace(tile, block_m=64)
            elif masked and (regime, r) == ("mixed bfloat16", 16) and chip.capability >= (12, 0):
                tile = replace(tile, block_c=32)  # 64: 16 bytes spilled (sm_120, triton 3.7.1)
    blocks = cdiv(problem.M, tile.block_m) * cdiv(rank, tile.block_r)
    return _finish(tile, "shrink", blocks, cdiv(columns, 4 * tile.block_c), problem, chip)


def _outer_tile(problem: Problem, chip: Chip, columns: int) -> SkinnyTile:
    regime, rank = problem.regime, problem.R
    r = _rank_block(rank, _widest_rank(regime, chip))
    if regime == "float32":
        tile = SkinnyTile(32, 64, r, 4, 3)
    elif regime == "float16" and chip.warp_groups:
        # tf32 operands in registers: wgmma would be serialized (C7515), and 32 columns take mma.sync instead.
        tile = SkinnyTile(64, 32, r, 4, 4)
    else:
        few = regime == "mixed bfloat16" and r == 16 and not chip.warp_groups  # 64 rows: 8 to 32 bytes spilled
        tile = SkinnyTile(64, 64, r, 4, 2) if chip.hip else SkinnyTile(32 if few else 64, 128, r, 8, 3)
    blocks = cdiv(columns, tile.block_c) * cdiv(rank, tile.block_r)
    return _finish(tile, "outer", blocks, cdiv(problem.M, 2 * tile.block_m), problem, chip)


def _widest_rank(regime: str, chip: Chip) -> int:
    """The largest BLOCK_R that leaves no spill: splitting an fp32 operand takes registers for each of its terms."""
    if regime.startswith("mixed"):
        return 64 if chip.warp_groups else 32 if regime == "mixed bfloat16" and not chip.hip else 16
    return 32 if chip.hip else 64


def _both_tile(problem: Problem, chip: Chip) -> SkinnyTile | None:
    """One pass over dy saves reading it again (2MN bytes) and costs partial ds (8 M N R / BLOCK_C): R < BLOCK_C / 4."""
    r = _rank_block(problem.R, 64)
    # Elements of dy, or of a wide f, that load one by one: 48 to 496 bytes spilled.
    if not problem.vectors(problem.N) or (r > 16 and problem.R % 16):
        return None
    if (problem.regime, r) in (("bfloat16", 16), ("bfloat16", 32), ("float16", 16)):
        tile = SkinnyTile(64, 256, r, 8, 3)
        wide = SkinnyTile(64, 512, r, 8, 3 if chip.tensor_memory else 2)  # sm_100, 2: 40 bytes spilled (triton 3.6.0)
        fills = cdiv(problem.N, wide.block_c) * cdiv(problem.M, 2 * wide.block_m) >= chip.num_sms
        if chip.warp_groups and fills and problem.regime == "bfloat16" and r == 16:
            tile = wide
        elif chip.tensor_memory and r == 32:
            tile = replace(tile, num_stages=4)  # with 3, in parts: 16 bytes spilled at 64 registers (triton 3.7.1)
    elif (problem.regime, r) == ("mixed bfloat16", 16):
        tile = SkinnyTile(64, 128, r, 4, 3)
    else:
        return None
    if skinny_shared_bytes(replace(tile, num_stages=1), problem, "both", chip) > chip.shared_limit:
        return None
    return _finish(tile, "both", cdiv(problem.N, tile.block_c), cdiv(problem.M, 2 * tile.block_m), problem, chip)


def _gemm_tile(
    problem: Problem, chip: Chip, columns: int, depth: int, descriptor: bool, masked: bool = False
) -> GemmTile:
    rows, r, shared_bytes = problem.M, _gemm_ranks(problem.R), partial(gemm_shared_bytes, problem=problem)
    if descriptor:
        block_p, r = (256, r) if chip.warp_groups else (128, 32)  # sm_120, r 16: 32 bytes spilled (triton 3.6.0)
        tile = GemmTile(128, block_p, 64, r, 8, 4, form="descriptor", programs=chip.num_sms)
        if masked and chip.capability >= (10, 0):  # the mask and 128 x 256 sums in registers: 8 to 16 bytes spilled
            tile = replace(tile, block_p=128, num_warps=4 if chip.tensor_memory else 8)
        return _fit_stages(tile, chip, shared_bytes)
    if problem.regime == "float32":
        # sm_120: with 3 stages ptxas chooses 80 registers for the split form and spills 16 bytes (triton 3.7.1).
        warps = 4 if chip.warp_groups and not chip.tensor_memory else 8  # sm_90, 8: 12 more ld.shared than plain
        tile = GemmTile(64, 64, 16, 16, warps, 2 if chip.capability >= (12, 0) else 3)
    elif not problem.vectors(problem.N, problem.K):  # the larger tiles spill 8 to 3556 bytes
        tile = GemmTile(16, 64, 64, 32, 4, 2) if rows <= 16 else GemmTile(64, 64, 64, 32, 8, 3)
    elif rows <= 64:
        warps = 8 if rows > 16 and chip.tensor_memory else 4  # 4: 32 bytes spilled in parts (sm_100, triton 3.6.0)
        tile = GemmTile(16 if rows <= 16 else 64, 64, 128, 32, warps, 4)
    else:
        tile = GemmTile(128, 128, 64 if chip.shared_limit > 131072 else 32, r, 8, 3)
    tile = _fit_stages(tile, chip, shared_bytes)
    blocks = cdiv(rows, tile.block_m) * cdiv(columns, tile.block_p)
    if rows <= 64 and blocks < chip.num_sms:
        most = cdiv(depth, 4 * tile.block_q)
        tile = replace(tile, split=max(1, min(2 * chip.num_sms // max(blocks, 1), most)))
    return tile


def pick_shrink(problem: Problem, chip: Chip) -> SkinnyTile:
    return _shrink_tile(problem, chip, problem.K, masked=problem.dropout)


def pick_grad_a(problem: Problem, chip: Chip) -> SkinnyTile:
    return _outer_tile(problem, chip, problem.K)


def pick_grad_b(problem: Problem, chip: Chip) -> GradBTile:
    n = problem.N
    return GradBTile(_both_tile(problem, chip), _shrink_tile(problem, chip, n), _outer_tile(problem, chip, n))


def pick_expand(problem: Problem, chip: Chip, descriptor: bool = False) -> GemmTile:
    return _gemm_tile(problem, chip, problem.N, problem.K, descriptor)


def pick_grad_x(problem: Problem, chip: Chip, descriptor: bool = False) -> GemmTile:
    return _gemm_tile(problem, chip, problem.K, problem.N, descriptor, masked=problem.dropout)


def pick_lowrank_y(problem: Problem, chip: Chip) -> LowrankTile:
    if problem.regime == "float32":  # 4 warps: 40 bytes spilled with tf32 on sm_80; 8: 32 bytes without on sm_100
        return LowrankTile(64, 64, 16, 8 if chip.capability < (10, 0) else 4)
    # Mixed float16, 128 columns: 12 to 52 bytes spilled (sm_80 to sm_89).
    return LowrankTile(64, 64 if problem.regime == "mixed float16" else 128, _gemm_ranks(problem.R), 4)


pick_lowrank_x = pick_lowrank_y


REGIMES = {
    "bfloat16": ("bfloat16", "bfloat16"),
    "float16": ("float16", "float16"),
    "mixed bfloat16": ("bfloat16", "float32"),
    "mixed float16": ("float16", "float32"),
    "float32": ("float32", "float32"),
}


def shipped(
    chip: Chip, regime: str, n: int = 4096, k: int = 4096, ranks: tuple[int, ...] = (16, 32, 64)
) -> Iterator[tuple[str, object, bool]]:
    """Every (piece, tile, dropout) that can be picked on a chip in a regime, up to split, which is not in the code.

    For N, K and ranks that are multiples of 16 where those given are.
    """
    seen = set()
    for rank, rows, dropout in product(ranks, (16, 64, 8192), (False, True)):
        problem = Problem(rows, n, k, rank, *REGIMES[regime], dropout)
        picked = [("shrink", pick_shrink(problem, chip)), ("grad_a", pick_grad_a(problem, chip))]
        picked += [("grad_x", pick_grad_x(problem, chip)), ("lowrank_x", pick_lowrank_x(problem, chip))]
        descriptor = chip.descriptors and problem.itemsize == 2
        if descriptor:
            picked += [("grad_x", pick_grad_x(problem, chip, descriptor=True))]
        if not dropout:  # what follows draws no mask
            picked += [("grad_b", pick_grad_b(problem, chip)), ("expand", pick_expand(problem, chip))]
            picked += [("lowrank_y", pick_lowrank_y(problem, chip))]
            if descriptor:
                picked += [("expand", pick_expand(problem, chip, descriptor=True))]
        for piece, tile in picked:
            key = (piece, one_part(tile), dropout)
            if key not in seen:
                seen.add(key)
                yield key


def one_part(tile):
    """The tile with every split (and program count) set to one."""
    return in_code(tile, most=1)


def in_code(tile, most: int = 2):
    """The tile as its machine code knows it: of parts only whether there are several, of programs nothing."""
    if isinstance(tile, GradBTile):
        return GradBTile(*(part and in_code(part, most) for part in (tile.both, tile.ds, tile.db)))
    if isinstance(tile, SkinnyTile):
        return replace(tile, split=min(tile.split, most))
    if isinstance(tile, GemmTile):
        return replace(tile, split=min(tile.split, most), programs=min(tile.programs, 1))
    return tile
