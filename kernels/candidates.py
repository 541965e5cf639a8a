"""The tiles that are worth measuring for a kernel on a chip, beside the one ``tiles.py`` picks. Pure Python.

Variations of the picked tile in one or two of its numbers: larger or smaller blocks, more or fewer warps, stages and
parts of the contraction. All fit the chip's shared memory and its registers; whether they compile clean is for
``bench/kernel_health.py`` to say, of those that win.
"""

from collections.abc import Iterator
from dataclasses import replace

from . import tiles
from .tiles import Chip, GemmTile, GradBTile, LowrankTile, Problem, SkinnyTile

# (rows, columns) as factors of the picked block, warps, change of the stages
_SKINNY = ((1, 1, 1, 1), (1, 1, 1, -1), (0.5, 1, 0.5, 1), (0.5, 2, 1, 0), (1, 2, 1, -1), (2, 0.5, 1, 0), (1, 1, 0.5, 0))
_POINTER = ((1, 1, 1, 1), (1, 2, 1, 0), (0.5, 1, 0.5, 1), (0.5, 2, 1, 0), (1, 1, 0.5, 0))
_DESCRIPTOR = ((1, 0.5, 1, 0), (1, 0.5, 0.5, 0), (1, 1, 1, -1), (2, 0.5, 1, 0))
_BANDS = (4, 16)
_SPLITS = (0.5, 2.0)


def candidates(piece: str, form: str, problem: Problem, chip: Chip) -> list[object]:
    """Tiles for a piece in a form, the picked one first.

    Raises:
        ValueError: the form has no kernel of this piece.
    """
    if form == "triton" and piece in ("shrink", "grad_a", "grad_b"):
        picked = getattr(tiles, f"pick_{piece}")(problem, chip)
        if piece == "grad_b":
            return _unique(_grad_b(picked, problem, chip))
        return _unique(_skinny(picked, "shrink" if piece == "shrink" else "outer", problem, chip))
    if piece in ("expand", "grad_x") and form == "beta1":
        return _unique(_lowrank(tiles.pick_lowrank_y(problem, chip)))
    if piece in ("expand", "grad_x") and form in ("pointer", "descriptor"):
        picked = getattr(tiles, f"pick_{piece}")(problem, chip, descriptor=form == "descriptor")
        return _unique(_gemm(picked, problem, chip))
    raise ValueError(f"{piece} has no kernel of the form {form!r}")


def _unique(found: Iterator[object]) -> list[object]:
    return list(dict.fromkeys(found))


def _skinny(picked: SkinnyTile, kernel: str, problem: Problem, chip: Chip) -> Iterator[SkinnyTile]:
    yield picked
    varied = [replace(picked, split=max(1, round(picked.split * factor))) for factor in _SPLITS]
    for rows, columns, warps, stages in _SKINNY:
        tile = replace(
            picked,
            block_m=int(picked.block_m * rows),
            block_c=int(picked.block_c * columns),
            num_warps=int(picked.num_warps * warps),
            num_stages=picked.num_stages + stages,
            # as many programs as before
            split=max(1, round(picked.split * (rows if kernel == "shrink" else columns))),
        )
        varied.append(tile)
    for tile in varied:
        if kernel == "outer" and tile.block_m > tile.block_c:
            continue  # it takes more shared memory than tiles.py reckons (sm_90, triton 3.7.1)
        held = tile.block_r * (tile.block_m if kernel == "shrink" else tile.block_c)
        small = min(tile.block_m, tile.block_c) < 16 or tile.num_warps < 2 or tile.num_stages < 1
        fits = held <= 64 * 32 * tile.num_warps and not small
        if fits and tiles.skinny_shared_bytes(tile, problem, kernel, chip) <= chip.shared_limit:
            yield tile


def _grad_b(picked: GradBTile, problem: Problem, chip: Chip) -> Iterator[GradBTile]:
    """One pass over dy in each variation, then two passes in each variation of their halves."""
    yield picked
    if picked.both is not None:
        for both in _skinny(picked.both, "both", problem, chip):
            yield replace(picked, both=both)
    for ds in _skinny(picked.ds, "shrink", problem, chip):
        yield GradBTile(None, ds, picked.db)
    for db in _skinny(picked.db, "outer", problem, chip):
        yield GradBTile(None, picked.ds, db)


def _lowrank(picked: LowrankTile) -> Iterator[LowrankTile]:
    yield picked
    for rows, columns, warps in ((2, 1, 2), (1, 2, 2), (0.5, 2, 1), (2, 0.5, 1)):
        yield replace(
            picked,
            block_m=int(picked.block_m * rows),
            block_p=int(picked.block_p * columns),
            num_warps=picked.num_warps * warps,
        )


def _gemm(picked: GemmTile, problem: Problem, chip: Chip) -> Iterator[GemmTile]:
    yield picked
    varied = [replace(picked, group_m=band) for band in _BANDS]
    for rows, columns, warps, stages in _DESCRIPTOR if picked.form == "descriptor" else _POINTER:
        tile = replace(
            picked,
            block_m=int(picked.block_m * rows),
            block_p=int(picked.block_p * columns),
            num_warps=int(picked.num_warps * warps),
            num_stages=picked.num_stages + stages,
        )
        varied.append(tile)
    if picked.split > 1:
        varied += [replace(picked, split=max(1, round(picked.split * factor))) for factor in _SPLITS]
    # fp32 sums a thread may hold of its 255 registers. The pointer form also keeps addresses and masks of operands:
    # with 128 sums it spills 1296 to 3000 bytes and wgmma is serialized (sm_90, bf16, triton 3.7.1).
    most = 128 if picked.form == "descriptor" else 64
    for tile in varied:
        sums = tile.block_m * tile.block_p <= most * 32 * tile.num_warps
        small = tile.block_m < 16 or tile.num_warps < 2 or tile.num_stages < 1
        if sums and not small and tiles.gemm_shared_bytes(tile, problem) <= chip.shared_limit:
            yield tile
