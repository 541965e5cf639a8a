"""``bench/gpu.py`` where something fails: what is kept of what was measured, what is red, and the exit code."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fused_lora import tuned

BENCH = Path(__file__).parents[1] / "bench"


def worker(bench, tmp_path, **state):
    """A worker of ``gpu.py`` on a state made for the test."""
    path = tmp_path / "state.json"
    whole = {"crashes": [], "correctness": {}, "cells": [], "date": "2026-01-01", "torch": "2", "triton": "3"}
    bench("gpu_state").write(path, {**whole, "commit": "c", **state})
    return bench("gpu_worker").Worker(Namespace(output=path, device="cpu", deadline=1e12, quick=True, tune=True))


def test_what_was_tuned_before_a_crash_can_be_installed(bench, tmp_path, monkeypatch):
    tune, one = bench("gpu_tune"), worker(bench, tmp_path)
    entry = tuned.Entry("shrink", "bfloat16", 16, 48, 64, 8, False, "torch", None, 1.0, 2.0)
    sizes = iter([[entry]])  # the second size finds none and ends the process
    monkeypatch.setattr(tune, "tune_size", lambda *arguments: next(sizes))
    with pytest.raises(StopIteration):
        tune.tune(one)
    table = tmp_path / "tuned.json"
    bench("gpu_state").write(table, {"version": tuned.VERSION, "chips": []})
    with pytest.raises(ValueError, match="stopped before its tiles were looked at; --compile does it here"):
        tune.install(one.output, table)
    assert tune.install(one.output, table, compile_here=True) == []
    (chip,) = tuned.read(table)
    assert [tuned.entry_of(fields) for fields in chip["entries"]] == [entry]


def test_programs_that_cannot_start_are_no_success(bench, tmp_path, monkeypatch, capsys):
    gpu = bench("gpu")
    for name in ("gpu_check.py", "gpu_worker.py"):
        (tmp_path / name).write_text("raise SystemExit(9)")
    monkeypatch.setattr(gpu, "_HERE", tmp_path)
    output = tmp_path / "out.json"
    assert gpu.main(["--quick", "--device=cpu", f"--output={output}"]) == 1
    state = json.loads(output.read_text())
    assert state["correctness"] == {"the check | bf16-fp32": {"red": "its process ended 6 times"}}
    shown = capsys.readouterr().out
    assert "RED the check | bf16-fp32: its process ended 6 times" in shown
    assert shown.endswith("failed: the process that measures ended 6 times and was not started again\n")
    assert "| the check | bf16-fp32 | RED |" in "\n".join(bench("gpu_sections").correctness_lines(state, "out.json"))
    case = bench("gpu_grid").cells(quick=True)[0]
    judge = worker(bench, tmp_path, correctness=state["correctness"])
    assert judge.why_not("ours", case) == "not checked against float64: its process ended 6 times"


def test_what_was_neither_checked_nor_measured_is_no_success(bench):
    shortfall = bench("gpu").shortfall
    green, crash = {"ours | bf16": {"worst": 1.0, "cases": 1, "red": ""}}, {"at": "a cell", "error": "it ended"}
    one, failed = {"id": "a", "graph": {"frozen": {"median": 1.0}}}, {"id": "b", "failed": "out of memory"}
    state = {"correctness": green, "crashes": [crash] * 5, "cells": [failed, one]}
    assert shortfall(state, check_only=False) == ""
    assert shortfall(state | {"correctness": {}}, check_only=True) == "nothing was checked against float64"
    assert shortfall(state | {"crashes": [crash] * 6}, check_only=False).startswith("the process that measures ended 6")
    for cells in ([], [failed], [one | {"graph": {}}]):
        assert shortfall(state | {"cells": cells}, check_only=False) == "nothing was measured"
        assert shortfall(state | {"cells": cells}, check_only=True) == ""
        assert shortfall(state | {"cells": cells, "entries": [{"piece": "shrink"}]}, check_only=False) == ""


@pytest.mark.parametrize(
    "error", [ValueError("Pointer argument (at 0) cannot be accessed"), TypeError("int64"), KeyError()]
)
@pytest.mark.parametrize("name", ["shrink triton", "ours-beta1"])
def test_whatever_a_launch_raises_is_red(bench, monkeypatch, name, error):
    from fused_lora.kernels import skinny

    def launch(*arguments, **options):
        raise error

    monkeypatch.setattr(type(skinny._shrink_kernel), "run", launch)
    verdict = bench("gpu_check").examine(name, "bf16", torch.device("cpu"), quick=True)
    assert verdict == {"red": f"{type(error).__name__}: {error} (M 21, N 40, K 48, rank 5, p 0.1)"}


def test_da_and_db_are_checked_over_the_rows_of_a_training_step(bench):
    check, many, gpu, cpu = bench("gpu_check"), (8192, 4096, 4096, 16, 0.1), torch.device("cuda"), torch.device("cpu")
    names = [*bench("gpu_grid").STRATEGIES, *bench("gpu_grid").PIECES]
    assert {*check._SUMS} <= {*names}
    at = {
        (name, regime) for name in names for regime in check.REGIMES if many in check.cases_of(name, regime, gpu, False)
    }
    assert {
        (name, regime) for name in ("ours", "grad_a triton", "grad_b triton") for regime in ("bf16", "bf16-fp32")
    } <= at
    assert not any(many in check.cases_of("ours", "bf16", *rest) for rest in ((gpu, True), (cpu, True), (cpu, False)))


def test_what_the_plan_refuses_is_not_red(bench):
    verdict = bench("gpu_check").examine("ours-descriptor", "fp32", torch.device("cpu"), quick=True)
    assert verdict.keys() == {"refused"}
    assert verdict["refused"].endswith("(M 21, N 40, K 48, rank 5, p 0.1)")


class Exited(BaseException):
    """In place of ``os._exit``, which no ``except Exception`` sees either."""


@pytest.mark.parametrize("fails", ["synchronize", "empty_cache"])
def test_a_device_that_is_lost_ends_the_process_in_the_name_of_its_provider(bench, tmp_path, monkeypatch, fails):
    module, one, case = bench("gpu_worker"), worker(bench, tmp_path), bench("gpu_grid").cells(quick=True)[0]
    one.device = SimpleNamespace(type="cuda", index=0)

    def raises():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def ended(code):
        raise Exited(code)

    def capture(*arguments):
        one.lost(f"{case.id} | peft", RuntimeError("operation not permitted when stream is capturing\nmore"))

    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, raises if name == fails else lambda: None)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, device: ones(size))
    monkeypatch.setattr(module.os, "_exit", ended)
    monkeypatch.setattr(module, "measure_cell", capture)
    with pytest.raises(Exited, match="3"):
        module.table(one)
    at, _, error = one.output.with_suffix(".attempt").read_text().partition("\n")
    assert (at, error) == (f"{case.id} | peft", "RuntimeError: operation not permitted when stream is capturing")
    assert not module._of_all({"at": at})
