"""The choice of tiles: legal on every chip, listed in ``shipped``, and made without torch, triton or a GPU."""

import random
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from fused_lora.kernels import tiles
from fused_lora.kernels.tiles import Chip, GemmTile, GradBTile, Problem, SkinnyTile

CHIPS = {
    "A100": Chip(108, (8, 0)), "A10": Chip(72, (8, 6)), "L40": Chip(142, (8, 9)),
    "H100": Chip(132, (9, 0)), "B200": Chip(148, (10, 0)), "RTX 5090": Chip(170, (12, 0)),
    "MI300X": Chip(304, (9, 4), hip=True), "unknown": Chip(64, (13, 7)),
}  # fmt: skip
EVEN = list(product((True, False), repeat=2))  # whether 16 divides N, and K
PIECES = ("shrink", "grad_a", "grad_b", "expand", "grad_x", "lowrank_y", "lowrank_x")

chips = pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)


def problems(count: int):
    """Random layers, from one row and rank 1 to a vocabulary and rank 512."""
    draw = random.Random(0)
    for _ in range(count):
        M = draw.choice([1, 15, 16, 17, 64, 65, 500, 4096, 8192, 131072, draw.randint(1, 300000)])
        N, K = (draw.choice([1, 64, 1024, 4096, 14336, 128256, draw.randint(1, 20000)]) for _ in range(2))
        rank = draw.choice([1, 8, 16, 17, 32, 64, 128, 512])
        yield Problem(M, N, K, rank, *draw.choice(list(tiles.REGIMES.values())), draw.random() < 0.5)


def pick(piece: str, problem: Problem, chip: Chip, **form):
    return getattr(tiles, f"pick_{piece}")(problem, chip, **form)


def picked(problem: Problem, chip: Chip):
    yield from ((piece, pick(piece, problem, chip)) for piece in PIECES)
    if chip.descriptors and problem.itemsize == 2:
        yield from ((piece, pick(piece, problem, chip, descriptor=True)) for piece in ("expand", "grad_x"))


@chips
def test_whatever_is_picked_is_shipped(chip):
    """``shipped`` is what the compile test compiles, so nothing outside it may ever run."""
    sizes = {(n_even, k_even): [4096 if even else 4088 for even in (n_even, k_even)] for n_even, k_even in EVEN}
    ranks = {True: (16, 32, 64), False: (8, 24, 56)}
    shipped = {
        (regime, even, whole): set(tiles.shipped(chip, regime, *sizes[even], ranks[whole]))
        for regime in tiles.REGIMES
        for even in EVEN
        for whole in ranks
    }
    for problem in problems(200):
        its = shipped[problem.regime, (problem.N % 16 == 0, problem.K % 16 == 0), problem.R % 16 == 0]
        for piece, tile in picked(problem, chip):
            masked = problem.dropout and piece in ("shrink", "grad_a", "grad_x", "lowrank_x")
            assert (piece, tiles.one_part(tile), masked) in its


@chips
def test_whatever_is_picked_fits(chip):
    for problem in problems(200):
        for _, tile in picked(problem, chip):
            if isinstance(tile, GradBTile):
                kernels = {"both": tile.both, "shrink": tile.ds, "outer": tile.db}
                for kernel, part in kernels.items():
                    if part is not None:
                        assert tiles.skinny_shared_bytes(part, problem, kernel, chip) <= chip.shared_limit
            elif isinstance(tile, GemmTile):
                assert tiles.gemm_shared_bytes(tile, problem) <= chip.shared_limit
                # fp32 sums a thread holds: half of its 255 registers
                assert tile.block_m * tile.block_p <= 128 * 32 * tile.num_warps


@chips
def test_the_workspace_stays_small(chip):
    """Splits are there to fill the chip: they stop at four programs per multiprocessor."""
    for problem in problems(200):
        shrink = pick("shrink", problem, chip)
        blocks = tiles.cdiv(problem.M, shrink.block_m) * tiles.cdiv(problem.R, shrink.block_r)
        assert shrink.split == 1 or blocks * shrink.split <= 4 * chip.num_sms
        expand = pick("expand", problem, chip)
        assert expand.split == 1 or problem.M <= 64


def test_one_pass_over_dy_where_it_pays():
    """R < BLOCK_C / 4: below it the partial ds cost less than reading dy a second time."""
    chip = CHIPS["H100"]
    for problem in problems(200):
        both = pick("grad_b", problem, chip).both
        if both is not None:
            assert both.block_r >= problem.R
            assert both.block_c > 4 * problem.R
    assert pick("grad_b", Problem(8192, 4096, 4096, 16, "bfloat16", "bfloat16"), chip).both.block_c == 512
    assert pick("grad_b", Problem(8192, 4096, 4096, 128, "bfloat16", "bfloat16"), chip).both is None


@pytest.mark.parametrize("regime", tiles.REGIMES)
@chips
def test_rows_that_load_element_by_element_get_smaller_tiles(chip, regime):
    """In 16-bit types a length that 16 does not divide leaves an address to each element, and large tiles spill."""
    dtypes = tiles.REGIMES[regime]
    for N, K, rank in ((4088, 4096, 16), (4096, 4088, 64), (4095, 50257, 512)):
        odd, even = Problem(8192, N, K, rank, *dtypes), Problem(8192, 4096, 4096, rank, *dtypes)
        grad_b, gemms = pick("grad_b", odd, chip), [pick(piece, odd, chip) for piece in ("expand", "grad_x")]
        if regime == "float32":  # four bytes are copied as one
            assert tiles.one_part(grad_b) == tiles.one_part(pick("grad_b", even, chip))
            assert gemms == [pick(piece, even, chip) for piece in ("expand", "grad_x")]
            continue
        shrink = pick("shrink", odd, chip)
        assert K % 16 == 0 or shrink.block_r <= 32
        if K % 16 and regime == "mixed float16" and not chip.warp_groups:
            assert shrink.block_m == 64
        assert N % 16 == 0 or (grad_b.both is None and grad_b.ds.block_r <= 32)
        assert N % 16 or tiles.one_part(grad_b) == tiles.one_part(pick("grad_b", even, chip))
        assert all(tile.block_m * tile.block_p <= 64 * 64 and tile.num_warps == 8 for tile in gemms)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 100, 4096])
@pytest.mark.parametrize("split", [1, 2, 3, 7, 500])
def test_divide_covers_the_length_once(length, split):
    per_part, parts = tiles.divide(length, 32, split)
    assert per_part % 32 == 0
    assert 1 <= parts <= split
    assert (parts - 1) * per_part < max(length, 1) <= parts * per_part


def test_regimes():
    assert Problem(1, 1, 1, 1, torch.bfloat16, torch.bfloat16).regime == "bfloat16"
    mixed = Problem(1, 1, 1, 1, torch.float16, torch.float32)
    assert (mixed.regime, mixed.itemsize, mixed.adapter_itemsize) == ("mixed float16", 2, 4)
    assert Problem(1, 1, 1, 1, "float32", "bfloat16").regime == "float32"


def test_a_chip_nobody_knows_gets_the_smallest_of_its_kin():
    assert Chip(1, (8, 8)).shared_limit == 101376
    assert Chip(1, (10, 1)).shared_limit == 232448
    assert Chip(1, (14, 0)).shared_limit == 101376
    assert not Chip(1, (9, 0), hip=True).warp_groups


def test_a_tile_that_no_stage_count_fits_is_an_error(monkeypatch):
    monkeypatch.setitem(tiles._SHARED_LIMIT, (8, 0), 1000)
    with pytest.raises(ValueError, match="bytes of shared memory of 1000"):
        pick("shrink", Problem(64, 64, 64, 8, "float32", "float32"), CHIPS["A100"])


@pytest.mark.parametrize(("change", "reason"), [
    ({}, ""),
    ({"itemsize": 4}, "16-bit types"),
    ({"shape": (0, 64)}, "x is empty"),
    ({"strides": (64, 2)}, "inner stride 2"),
    ({"address": 24}, "address"),
    ({"strides": (65, 1)}, "row stride 65 x 2 bytes"),
    ({"strides": (0, 1)}, "row stride 0"),
])  # fmt: skip
def test_descriptor_reason(change, reason):
    facts = {"shape": (8, 64), "strides": (64, 1), "itemsize": 2, "address": 256} | change
    found = tiles.descriptor_reason("x", **facts)
    assert reason in found
    assert bool(found) == bool(reason)


def test_tiles_do_not_change_code_with_the_split():
    tile = SkinnyTile(64, 128, 16, 8, 3, split=7)
    assert tiles.one_part(tile) == replace(tile, split=1)
    assert tiles.one_part(GradBTile(None, tile, tile)) == GradBTile(None, *[replace(tile, split=1)] * 2)


def test_tiles_need_neither_torch_nor_triton():
    code = (
        "import sys, importlib.util as u\n"
        "sys.modules['torch'] = sys.modules['triton'] = None\n"
        f"spec = u.spec_from_file_location('tiles', {str(Path(tiles.__file__))!r})\n"
        "sys.modules['tiles'] = module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "problem = module.Problem(64, 64, 64, 8, 'float32', 'float32')\n"
        "module.pick_shrink(problem, module.Chip(132, (9, 0)))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_machine_code_knows_of_a_tile():
    """Of parts only whether there are several, of programs nothing."""
    skinny, gemm = SkinnyTile(64, 64, 16, 4, 2, split=7), GemmTile(64, 64, 32, 16, 4, 2, split=1, programs=132)
    grad_b = GradBTile(None, skinny, replace(skinny, split=1))
    assert tiles.in_code(skinny) == replace(skinny, split=2)
    assert tiles.one_part(skinny) == replace(skinny, split=1)
    assert tiles.in_code(gemm) == tiles.one_part(gemm) == replace(gemm, programs=1)
    assert tiles.in_code(grad_b) == GradBTile(None, replace(skinny, split=2), replace(skinny, split=1))
