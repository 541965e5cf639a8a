"""bench/peft_step.py: what a patched PEFT model keeps for the backward, held to its bounds, and the report of a run."""

from __future__ import annotations

import json

import pytest


def test_kept_for_the_backward_is_within_its_bounds(bench):
    """Counted in every regime, with and without dropout; PEFT's own figures beside it."""
    peft_step = bench("peft_step")
    cells = peft_step.kept_cells(rows=256, width=1024)
    assert {cell["regime"] for cell in cells} == {"R1", "R2", "R3", "R3-bf16", "R4"}
    for cell in cells:
        print("\n{regime} dropout {dropout}: kept {fused} x bytes(x), PEFT {peft}".format(**cell))
        assert cell["fused"] <= (peft_step.KEPT_DROPOUT if cell["dropout"] else peft_step.KEPT)
    default = {cell["dropout"]: cell["peft"] for cell in cells if cell["regime"] == "R1"}
    assert default[0.0] > 6
    assert default[0.05] > 12  # the hooks do see what a layer keeps


@pytest.fixture
def quick(bench, tmp_path):
    peft_step = bench("peft_step")
    path = tmp_path / "peft-step.json"
    peft_step.main(["--quick", "--output", str(path)])
    return peft_step, json.loads(path.read_text())


def test_quick_run_and_report(quick):
    peft_step, content = quick
    assert content["kind"] == peft_step.KIND
    assert [cell["regime"] for cell in content["cells"]] == ["R1", "R2", "R3", "R4"] * 2
    for cell in content["cells"]:
        assert "left_out" not in cell, cell
        assert cell["errors"]["patched"] <= 2 * cell["errors"]["peft"]
        assert cell["vs_peft"]["rounds"] == cell["self"]["rounds"] >= 2
    text = "\n".join(peft_step.sections(content, "peft-step.json"))
    assert "their times mean nothing" in text
    text = "\n".join(peft_step.sections(content | {"quick": False}, "peft-step.json"))
    assert text.count("from peft-step.json") == text.count("###") == 2
    assert all(len(cell) < 300 for cell in peft_step.summary(content, "peft-step.json"))
