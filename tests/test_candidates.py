"""The tiles that the tuner measures: the picked one first, all different, all within the chip."""

import pytest

from fused_lora import tuned
from fused_lora.kernels import tiles
from fused_lora.kernels.candidates import candidates
from fused_lora.kernels.tiles import Chip, Problem

CHIPS = {
    "A100": Chip(108, (8, 0)), "L40": Chip(142, (8, 9)), "H100": Chip(132, (9, 0)), "B200": Chip(148, (10, 0)),
    "MI300X": Chip(304, (9, 4), hip=True),
}  # fmt: skip
FORMS = {
    "shrink": ["triton"], "grad_a": ["triton"], "grad_b": ["triton"],
    "expand": ["beta1", "pointer", "descriptor"], "grad_x": ["beta1", "pointer", "descriptor"],
}  # fmt: skip


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_candidates_are_what_a_plan_may_run(chip):
    for regime in tiles.REGIMES.values():
        for M, N, R in ((16, 4096, 16), (64, 1024, 64), (8192, 4096, 16), (8192, 14336, 200)):
            problem = Problem(M, N, 4096, R, *regime, dropout=True)
            for piece, forms in FORMS.items():
                for form in forms:
                    if form == "descriptor" and not (chip.descriptors and problem.itemsize == 2):
                        continue
                    found = candidates(piece, form, problem, chip)
                    assert len(found) == len(set(found)) >= 2
                    refusals = [tuned.tile_refusal(piece, form, tile, problem, chip) for tile in found]
                    assert not any(refusals), refusals
                    assert found[0] == picked(piece, form, problem, chip)


def picked(piece, form, problem, chip):
    if form == "beta1":
        return tiles.pick_lowrank_y(problem, chip)
    keywords = {"descriptor": form == "descriptor"} if piece in ("expand", "grad_x") else {}
    return getattr(tiles, f"pick_{piece}")(problem, chip, **keywords)


@pytest.mark.parametrize(("piece", "form"), [("shrink", "beta1"), ("expand", "torch"), ("grad_x", "triton")])
def test_a_form_without_a_kernel_is_refused(piece, form):
    with pytest.raises(ValueError, match=f"{piece} has no kernel of the form '{form}'"):
        candidates(piece, form, Problem(64, 64, 64, 8, "bfloat16", "bfloat16"), CHIPS["H100"])
