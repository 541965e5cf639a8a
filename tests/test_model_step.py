"""``bench/model_step.py``: its quick path, what it refuses to time, and what it renders."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
BENCH = Path(__file__).parents[1] / "bench"
WAYS = {"frozen", "peft", "patched", "apply_lora", "full"}


@pytest.fixture
def step(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module("model_step")
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCH:
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_the_quick_path(step, tmp_path):
    out = tmp_path / "step.json"
    step.main(["--quick", "--device=cpu", f"--output={out}"])
    content = json.loads(out.read_text())
    assert content["left_out"] == {}
    assert {"torch", "transformers", "commit", "date", "batch", "length"} <= content.keys()
    assert [(cell["dropout"], cell["checkpointing"]) for cell in content["cells"]] == [
        (0.0, False), (0.0, True), (0.05, False), (0.05, True),
    ]  # fmt: skip
    for cell in content["cells"]:
        assert cell["seconds"].keys() == cell["tokens_per_second"].keys() == WAYS
        assert cell["vs_peft"].keys() == WAYS - {"peft"}
        assert cell["static_bytes"]["full"] == 3 * cell["static_bytes"]["frozen"] + steps(cell)
        assert cell["static_bytes"]["patched"] == cell["static_bytes"]["peft"] == cell["static_bytes"]["apply_lora"]
    assert content["checked"].keys() == {"peft", "patched", "apply_lora"}
    assert step.sections(content, "step.json") == [
        "step.json is of a --quick run: it shows that the benchmark runs, its times mean nothing."
    ]


def steps(cell: dict) -> int:
    """AdamW's step counts: 4 bytes for each of the 20 parameters of the tiny model."""
    return 4 * 20


def test_a_way_that_breaks_the_accuracy_rule_is_not_timed(step):
    peft = {"loss": 5.0, "logits": 1e-3, "gradients": 2e-3}
    assert step.disagreement({"loss": 5.0, "logits": 2e-3, "gradients": 4e-3}, peft) == ""
    off = step.disagreement({"loss": 5.0, "logits": 1e-3, "gradients": 5e-3}, peft)
    assert off == "its gradients are off by 5.0e-03 of their norm, PEFT's by 2.0e-03"
    off = step.disagreement({"loss": 5.0, "logits": float("nan"), "gradients": 1e-3}, peft)
    assert off == "its logits are off by nan of their norm, PEFT's by 1.0e-03"


def test_a_lost_scale_is_found_by_a_step(step, monkeypatch):
    base = step.llama(True, torch.device("cpu"))
    ids = torch.arange(48).reshape(2, 24)
    apply = step.BUILD["apply_lora"]

    def twice(model, dropout):
        from fused_lora import lora_layers

        for _, layer in lora_layers(apply(model, dropout)):
            layer.set_scale(2 * layer.scale)
        return model

    monkeypatch.setitem(step.BUILD, "apply_lora", twice)
    left_out: dict[str, str] = {}
    step.agree(base, ids, left_out)
    assert left_out.keys() == {"apply_lora"}
    assert left_out["apply_lora"].startswith("it is not timed: its logits are off by")


def test_a_way_that_cannot_be_built_is_named(step, monkeypatch):
    def absent(model, dropout):
        raise ImportError("no PEFT")

    monkeypatch.setitem(step.BUILD, "peft", absent)
    left_out: dict[str, str] = {}
    ways = step.build(step.llama(True, torch.device("cpu")), torch.zeros(1, 4, dtype=torch.long), 0.0, left_out)
    assert ways.keys() == WAYS - {"peft"}
    assert left_out == {"peft": "ImportError: no PEFT"}


def test_sections_and_summary(step):
    ratio = {"median": 0.9, "q1": 0.8, "q3": 1.0, "rounds": 7}
    cell = {"dropout": 0.05, "checkpointing": True, "seconds": {"patched": ratio}, "vs_peft": {"patched": ratio}}
    cell |= {"tokens_per_second": {"patched": 8192.0}, "peak_bytes": {"patched": 2**30}, "left_out": {"full": "memory"}}
    content = {"quick": False, "model": "Llama", "dtype": "bfloat16", "batch": 4, "length": 2048, "rank": 16}
    content |= {"device_name": "a GPU", "left_out": {}, "cells": [cell | {"static_bytes": {"patched": 2**31}}]}
    content["checked"] = {"patched": {"loss": 5.0, "logits": 1e-3, "gradients": 2e-3}}
    text = "\n".join(step.sections(content, "s.json"))
    assert "| patched | 5.00000 | 1.0e-03 | 2.0e-03 |" in text
    assert "### A training step, dropout 0.05, gradient checkpointing on, from s.json" in text
    assert "| patched | 900.00 (800.00 to 1000.00) | 8,192 | - | 0.900 | 1,024 | 2,048 |" in text
    assert "* left out: full: memory" in text
    assert step.summary(content, "s.json")[1] == "time / PEFT 0.900 to 0.900"


def failing(step, monkeypatch, method: str, name: str):
    """Every call of a method of one way raises, as a launch does that fails."""
    original = getattr(step.Way, method)

    def call(self):
        if self.name == name:
            raise RuntimeError("an illegal memory access\nat this line")
        return original(self)

    init = step.Way.__init__

    def named(self, name, *arguments):
        self.name = name
        init(self, name, *arguments)

    monkeypatch.setattr(step.Way, "__init__", named)
    monkeypatch.setattr(step.Way, method, call)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("method", ["outcome", "step", "seconds"])
def test_a_way_that_raises_costs_no_other_its_figures(step, tmp_path, monkeypatch, capsys, method):
    out = tmp_path / "step.json"
    failing(step, monkeypatch, method, "patched")
    assert step.main(["--quick", "--device=cpu", f"--output={out}"]) == 1
    content = json.loads(out.read_text())
    why = {"patched": "RuntimeError: an illegal memory access"}
    assert content["left_out"] == (why if method == "outcome" else {})
    assert content["checked"].keys() == {"peft", "apply_lora"} | ({"patched"} if method != "outcome" else set())
    assert len(content["cells"]) == 4
    for cell in content["cells"]:
        assert cell["left_out"] == ({} if method == "outcome" else why)
        assert cell["seconds"].keys() == cell["static_bytes"].keys() == cell["peak_bytes"].keys() == WAYS - {"patched"}
        assert cell["vs_peft"].keys() == WAYS - {"patched", "peft"}
    assert capsys.readouterr().out.endswith("failed: left out: patched\n")


def test_a_way_that_raises_in_the_middle_of_its_rounds(step):
    class Fake:
        def __init__(self, good: int):
            self.left = good

        def step(self):
            pass

        def peak(self):
            return 5

        def static_bytes(self):
            return 7

        def seconds(self):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("an illegal memory access")
            return 1e-3

    left_out: dict[str, str] = {}
    cell = step.measure({"frozen": Fake(99), "peft": Fake(99), "patched": Fake(3)}, 1.0, 10, left_out)
    assert left_out == {"patched": "RuntimeError: an illegal memory access"}
    assert cell["seconds"].keys() == cell["peak_bytes"].keys() == cell["static_bytes"].keys() == {"frozen", "peft"}
    assert cell["vs_peft"].keys() == {"frozen"}


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_without_a_result_of_peft_ours_is_not_timed(step, monkeypatch):
    failing(step, monkeypatch, "outcome", "peft")
    left_out: dict[str, str] = {}
    assert step.agree(step.llama(True, torch.device("cpu")), torch.arange(48).reshape(2, 24), left_out) == {}
    unjudged = "it is not timed: there is no result of PEFT beside it"
    assert left_out == {
        "the check": "RuntimeError: an illegal memory access", "patched": unjudged, "apply_lora": unjudged,
    }  # fmt: skip


def test_there_is_a_file_before_anything_is_checked(step, tmp_path, monkeypatch):
    def ended(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "agree", ended)
    out = tmp_path / "step.json"
    with pytest.raises(KeyboardInterrupt):
        step.main(["--quick", "--device=cpu", f"--output={out}"])
    assert json.loads(out.read_text())["cells"] == []
    assert step.shortfall({"cells": []}) == step.shortfall({"cells": [{"seconds": {}}]}) == "nothing was timed"
