"""bench/host_cost.py: it runs, says what it must, and what it counts without noise stays within PEFT's."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def poison():
    """Not here: filling fresh memory would be counted as work."""


def test_quick_run_and_its_tables(tmp_path, bench):
    out = tmp_path / "host-cost.json"
    host_cost = bench("host_cost")
    host_cost.main(["--quick", "--device=cpu", "--dtype=fp32", "--rounds=2", "--calls=2", f"--output={out}"])
    content = json.loads(out.read_text())
    assert content["kind"] == host_cost.KIND
    assert len(content["cells"]) == 4  # two modes, two dropouts
    for cell in content["cells"]:
        assert {"ours", "module", "plain", "beta1", "frozen"} <= cell["microseconds"].keys()
        assert cell["microseconds"]["ours"]["fastest"] > 0
    text = "\n".join(host_cost.sections(content, "host-cost.json"))
    headings = [line for line in text.splitlines() if line.startswith("###")]
    assert headings == [f"### Host cost, {mode}, from host-cost.json" for mode in ("forward", "forward+backward")]
    assert "| 1, 16, 16 | fp32 | 0 |" in text


def test_an_unknown_dtype_is_refused(bench):
    with pytest.raises(ValueError, match="--dtype has no int8"):
        bench("host_cost").main(["--quick", "--device=cpu", "--dtype=int8"])


def test_what_is_counted(bench):
    host_cost = bench("host_cost")
    x = torch.ones(4, 4)
    assert host_cost.operators(lambda: x.t() + 1) == 1  # a view is none
    assert host_cost.entered(lambda: None) == 1
    assert host_cost.entered(lambda: x.add(1)) == 2


# Speed without a clock. An operator takes one to four microseconds of a call, a function that Python enters a tenth of
# one: the operators may not be more than PEFT's, the functions not twice as many. Dropout is left out: our mask is made
# of many operators on a CPU, and of none on a GPU.
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
@pytest.mark.parametrize("regime", ["fp32", "bf16-fp32"])
def test_a_call_runs_no_more_operators_than_peft(bench, regime):
    host_cost = bench("host_cost")
    providers = bench("providers")
    inputs = providers.make_inputs(16, 64, 64, 4, regime, torch.device("cpu"))
    counts = {}
    for name in ("ours", "peft"):
        call = host_cost.passes(providers.PROVIDERS[name].build(inputs, 0.0), inputs, "forward")
        counts[name] = host_cost.entered(call), host_cost.operators(call)
    assert counts["ours"][1] <= counts["peft"][1], counts
    assert counts["ours"][0] <= 2 * counts["peft"][0], counts
