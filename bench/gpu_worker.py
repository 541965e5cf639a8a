"""The process of ``gpu.py`` that measures: reads the JSON, goes on where it ends, writes it after every cell.

Before each provider it writes down what it is at, in a file beside the JSON, so that a crash has a name.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

import gpu_state
import torch
from gpu_grid import CHECK, PIECES, STRATEGIES, add_providers, cells, in_time, penalty, plan_of
from gpu_timing import Subject, ceilings, eager_rounds, graph_rounds, marked_inside, paired, spread
from providers import PROVIDERS, available, check, make_inputs
from shapes import Case

from fused_lora.plan import PIECES as PLAN_PIECES

_SECONDS = 0.6  # of rounds, for all providers of a cell together, once as graphs and once eagerly
_QUICK_SECONDS = 0.02
_EAGER_ROWS = 2048  # above, the host is far ahead of the GPU, and eager times say what graph times say
_GATE = 3e-2  # relative, against the addmm style: for mistakes of wiring, not a statement on accuracy


class Worker:
    """The state on disk and what is known to be red."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device(options.device)
        self.output: Path = options.output
        self.state = json.loads(self.output.read_text())
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device.index or 0)

    def at(self, what: str, error: str = "") -> None:
        """A sign of life, and who is to blame if there is none after it."""
        self.output.with_suffix(".attempt").write_text(f"{what}\n{error}")

    def write(self) -> None:
        gpu_state.write(self.output, self.state)

    def late(self) -> bool:
        return time.time() > self.options.deadline

    def why_not(self, name: str, case: Case) -> str:
        """Why a provider is not timed in this case because of what went wrong before; "" where nothing did."""
        for crash in self.state["crashes"]:
            cell, _, provider = crash["at"].partition(" | ")
            if provider == name and f"-{case.regime}-p" in cell:
                return f"it ended the process before, at {cell}: {crash['error']}"
        if name not in STRATEGIES:
            return ""
        verdicts = self.state["correctness"]
        own = verdicts.get(f"{name} | {case.regime}")
        if own is None:
            given_up = verdicts.get(f"{CHECK} | {case.regime}", {}).get("red", "for want of time")
            return f"not checked against float64: {given_up}"
        plan = plan_of(case, self.device, STRATEGIES[name])
        used = [f"{piece} {getattr(plan, piece)}" for piece in PLAN_PIECES] if plan.strategy == "triton" else []
        for key in (name, *(piece for piece in used if piece in PIECES)):
            if red := verdicts.get(f"{key} | {case.regime}", {}).get("red"):
                return f"red: {key}: {red}"
        return ""

    def lost(self, what: str, error: Exception) -> str:
        """One line on an exception; ends this process where the device is gone."""
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self.at(what, text)
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.ones(8, device=self.device).sum().item()
                torch.cuda.empty_cache()  # raises where the allocator is left in the middle of a capture that failed
            except Exception:
                os._exit(3)  # the device is lost, and tearing down what is on it may hang
        return text


def subjects_of(worker: Worker, case: Case, left_out: dict[str, str]) -> dict[str, Subject]:
    """The providers that can be timed on a case, warm and captured; why the others cannot goes into ``left_out``."""
    inputs = make_inputs(case.M, case.K, case.N, case.rank, case.regime, worker.device)
    pool = torch.cuda.graph_pool_handle() if worker.device.type == "cuda" else None
    subjects: dict[str, Subject] = {}
    for provider in available(case, worker.device, left_out):
        name = provider.name
        if reason := ("" if worker.options.quick else in_time(name, case)) or worker.why_not(name, case):
            left_out[name] = reason
            continue
        worker.at(f"{case.id} | {name}")
        try:
            # Ours were held to float64 before; compiled PEFT is PEFT, and would take two more compilations.
            if name not in STRATEGIES and name != "peft-compile":
                check(name, case.regime, worker.device)
            subject = Subject(provider.build(inputs, case.p), inputs, case.mode)
            if pool is not None:
                subject.capture(pool)
            subjects[name] = subject
        except Exception as error:  # one provider's failure is a finding, not the end of the table
            left_out[name] = worker.lost(f"{case.id} | {name}", error)
    return subjects


def gate(subjects: dict[str, Subject], case: Case, left_out: dict[str, str]) -> None:
    """At this very size, y and the gradients of ours against the addmm style; who is off leaves the cell."""
    if case.p > 0.0 or "addmm" not in subjects:
        return
    wanted = subjects["addmm"].results()
    for name in [name for name in subjects if name in STRATEGIES]:
        for tensor, got, want in zip(("y", "dx", "da", "db"), subjects[name].results(), wanted, strict=True):
            error = ((got.float() - want.float()).norm() / want.float().norm()).item()
            if not error < _GATE:
                left_out[name] = f"red at this size: {tensor} is off by {error:.1e} of its norm"
                del subjects[name]
                break


def measure_cell(worker: Worker, case: Case) -> dict:
    """One cell of the table, as it stands in the JSON."""
    left_out: dict[str, str] = {}
    gc.collect()
    if worker.device.type == "cuda" and torch.cuda.memory_reserved() > torch.cuda.mem_get_info()[1] // 2:
        torch.cuda.empty_cache()
    subjects = subjects_of(worker, case, left_out)
    gate(subjects, case, left_out)
    plan = plan_of(case, worker.device)
    cell = {**case.as_dict(), "id": case.id, "strategy": plan.strategy}
    cell["forms"] = {piece: getattr(plan, piece) for piece in PLAN_PIECES}
    seconds = _QUICK_SECONDS if worker.options.quick else _SECONDS
    gc.disable()  # a collection in the middle of a pass would be timed
    try:
        ways = {}
        if worker.device.type == "cuda":
            worker.at(f"{case.id} | graph replays")
            ways["graph"] = graph_rounds(subjects, seconds)
        if worker.device.type != "cuda" or case.M <= _EAGER_ROWS or penalty(case) == 0:
            worker.at(f"{case.id} | eager rounds")
            ways["eager"] = eager_rounds(subjects, seconds)
    finally:
        gc.enable()
    for way, times in ways.items():
        cell[way] = {name: spread(values) for name, values in times.items()}
        if "frozen" in times:
            cell[f"{way}_tax"] = {name: paired(times, name, "frozen") for name in times if name != "frozen"}
    cell["peak_bytes"] = {name: subject.peak_bytes for name, subject in subjects.items()}
    cell["kept_bytes"] = {name: subject.kept_bytes for name, subject in subjects.items() if name != "frozen"}
    return {**cell, "left_out": left_out}


def _of_all(crash: dict) -> bool:
    """Whether a crash came while all providers of a cell took turns, so that none of them can be blamed."""
    return crash["at"].partition(" | ")[2] not in PROVIDERS


def table(worker: Worker) -> None:
    """Cells until the time is up; those that are left are named."""
    add_providers()
    grid = cells(worker.options.quick)
    done = {cell["id"] for cell in worker.state["cells"]}
    fatal = {crash["at"].partition(" | ")[0]: crash for crash in worker.state["crashes"] if _of_all(crash)}
    for number, case in enumerate(grid, 1):
        if case.id in done:
            continue
        if worker.late():
            break
        try:
            cell = {**case.as_dict(), "id": case.id, "failed": fatal[case.id]["error"]} if case.id in fatal else None
            cell = cell or measure_cell(worker, case)
        except Exception as error:  # out of memory at one size must not cost the rest
            cell = {**case.as_dict(), "id": case.id, "failed": worker.lost(f"{case.id} | cell", error)}
        worker.state["cells"].append(cell)
        done.add(case.id)
        _name_left(worker, grid, done)
        tax = cell.get("graph_tax", cell.get("eager_tax", {}))
        shown = ", ".join(f"{name} {ratio['median']:.3f}" for name, ratio in tax.items())
        print(f"[{number}/{len(grid)}] {case.id}: {shown or cell.get('failed')}", file=sys.stderr, flush=True)
    _name_left(worker, grid, done)


def _name_left(worker: Worker, grid: list[Case], done: set[str]) -> None:
    """Write the JSON, the cells that are left in it: a cell that outlasts the time is stopped with its process."""
    left = [case.id for case in grid if case.id not in done]
    worker.state["skipped_for_time"] = {"count": len(left), "ids": " ".join(left)}
    worker.write()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Started by gpu.py.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--deadline", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tune", action="store_true")
    worker = Worker(parser.parse_args(arguments))
    if worker.state["ceilings"] is None:
        worker.at("ceilings")
        worker.state["ceilings"] = ceilings(worker.device, worker.options.quick)
        worker.state["events_inside_graphs"] = worker.device.type == "cuda" and marked_inside()
        worker.write()
    if worker.options.tune:
        import gpu_tune

        gpu_tune.tune(worker)
    else:
        table(worker)


if __name__ == "__main__":
    main()
