"""``bench/gpu.py`` where something fails: what is kept of what was measured, what is red, and the exit code."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from fused_lora import tuned

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Import a module of ``bench/`` by name; the modules leave with the test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCH:
            del sys.modules[name]


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
