"""bench/apply_step.py: its quick path, what it refuses to time, and what it renders."""

import json

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture
def module(bench):
    return bench("apply_step")


def test_quick_run_and_report(module, tmp_path, capsys):
    path = tmp_path / "apply-step.json"
    module.main(["--quick", "--output", str(path)])
    content = json.loads(path.read_text())
    assert content["kind"] == module.KIND
    assert [(c["regime"], c["dropout"]) for c in content["cells"]] == [
        ("R4", 0.0), ("R4", 0.05), ("R1", 0.0), ("R1", 0.05)
    ]  # fmt: skip
    for cell in content["cells"]:
        assert cell["errors"]["apply_lora"] <= 2 * cell["errors"]["peft"]
        assert cell["vs_peft"]["rounds"] == cell["self"]["rounds"] >= 2
        assert set(cell["seconds"]) == {"peft", "apply_lora", "again"}
    assert "its times mean nothing" in capsys.readouterr().out
    text = "\n".join(module.sections(content | {"quick": False}, "apply-step.json"))
    assert text.count("from apply-step.json") == text.count("###") == 1
    assert text.count("\n| ") == 2 + len(content["cells"])
    assert "not measured" in module.summary(content, "apply-step.json")[1]


def test_what_is_wrong_is_not_timed(module, bench, monkeypatch):
    shared = bench("llama_step")
    gradients = shared.gradients

    def off(model):
        found = gradients(model)
        return found * 1.1 if model.optimizer is not None and type(model.model).__name__ != "PeftModel" else found

    monkeypatch.setattr(shared, "gradients", off)
    cell = module.step_cell("R4", 0.0, *shared.TINY, seconds=0.05)
    assert "it is not timed: errors of the gradients" in module.describe(cell)
    assert "seconds" not in cell
    content = {"quick": False, "llama": shared.TINY[0], "rank": 16, "cells": [cell]}
    assert "left out" in "\n".join(module.sections(content, "x.json"))
