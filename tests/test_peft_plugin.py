"""The plug-in that runs PEFT's own tests runs with xdist and without, and says what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ONE_TEST = """
import torch
from peft import LoraConfig, get_peft_model

def test_forward():
    model = get_peft_model(torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}), LoraConfig(target_modules=["q"]))
    model.base_model.model["q"](torch.ones(1, 4))
"""


@pytest.mark.parametrize("xdist", [False, True], ids=["without xdist", "with xdist"])
def test_counts_and_outcomes(tmp_path, xdist):
    if xdist:
        pytest.importorskip("xdist")
    (tmp_path / "test_one.py").write_text(ONE_TEST)
    command = [sys.executable, "-m", "pytest", "-p", "peft_plugin", "-q", "--fused-outcomes", "out.json"]
    command += ["-p", "xdist", "-n", "1"] if xdist else ["-p", "no:xdist"]
    done = subprocess.run(
        [*command, "test_one.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "outcomes": {"test_one.py::test_forward": "passed"},
        "layers": {"patched": 1},
        "calls": {"fused": 1},
    }
