"""Ratios that hold on a machine whose speed drifts: all providers of a cell take turns, round after round.

    python bench/paired.py --output bench/results/paired-cpu.json

A cell is a shape, mode, dtype, dropout and rank. In every round each provider does one pass, in an order drawn anew for
the round; a ratio is formed within a round, and its median and quartiles over the rounds are reported:

    tax       provider / frozen nn.Linear
    vs_peft   provider / PEFT
    self      ours / ours, a second instance

``self`` is the spread of two runs of the same version: a ratio that is closer to 1 than that says nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
from pathlib import Path
from time import perf_counter

import torch
from measure import Pass, environment, kept_bytes
from providers import PROVIDERS, available, check, make_inputs, planned
from shapes import Case, add_grid_options, cases, device_of

KIND = "fused-lora paired benchmark"
AGAIN = "ours-again"  # the second instance of ours
# A CPU without bfloat16 instructions needs up to a minute for one backward of a layer that leaves the product to torch.
_SLOW_FLOOR = 0.5  # seconds of one frozen pass above which only ours and PEFT are timed
_ONCE = 5.0  # seconds above which a pass is not repeated


def rounds_for(first: float, budget: float, limit: int) -> int:
    """How many rounds a provider takes part in, from the seconds of its first pass."""
    if first > _ONCE:
        return 1
    return min(limit, max(5 if first < 1.0 else 2, int(budget / first)))


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles; of a single value, that value three times."""
    if len(values) == 1:
        q1 = median = q3 = values[0]
    else:
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 5), "q1": round(q1, 5), "q3": round(q3, 5), "rounds": len(values)}


def ratios(times: dict[str, list[float]], name: str, other: str) -> dict[str, float]:
    """name / other in the rounds both took part in; a provider that stops early was in the first ones."""
    return quartiles([one / two for one, two in zip(times[name], times[other], strict=False)])


def take_turns(passes: dict[str, Pass], budget: float, limit: int) -> tuple[dict[str, list[float]], bool]:
    """Seconds per provider and round, and whether the first round was thrown away as warm-up.

    It is kept where a pass is too slow to be repeated: next to that, warming up takes no time.
    """
    shuffle = random.Random(0).shuffle
    times = {name: [run.seconds()] for name, run in passes.items()}
    rounds = {name: rounds_for(seconds[0], budget, limit) for name, seconds in times.items()}
    warm_up = max(seconds[0] for seconds in times.values()) <= _ONCE
    if warm_up:
        times = {name: [] for name in passes}
    for _ in range(max(rounds.values())):
        names = [name for name in passes if len(times[name]) < rounds[name]]
        shuffle(names)
        for name in names:
            times[name].append(passes[name].seconds())
    for run in passes.values():
        run.prepare()
    return times, warm_up


def frozen_seconds(case: Case, device: torch.device, known: dict[str, float]) -> float:
    """One pass of the frozen layer, which depends on neither dropout, rank nor adapter dtype: timed once for all."""
    key = f"{case.shape} | {case.mode} | {str(case.dtype).removeprefix('torch.')}"
    if key not in known:
        inputs = make_inputs(case.M, case.K, case.N, case.rank, case.regime, device)
        known[key] = round(Pass(PROVIDERS["frozen"].build(inputs, 0.0), inputs, case.mode).seconds(), 6)
    return known[key]


def measure_cell(case: Case, names: list[str], device: torch.device, budget: float, limit: int) -> dict[str, object]:
    """One cell of the grid, as it stands in the JSON."""
    for name in names:
        check(name, case.regime, device)
    inputs = make_inputs(case.M, case.K, case.N, case.rank, case.regime, device)
    passes = {name: Pass(PROVIDERS[name].build(inputs, case.p), inputs, case.mode) for name in names}
    kept = {name: kept_bytes(run.layer, inputs.x) for name, run in passes.items() if name != "frozen"}
    passes[AGAIN] = Pass(PROVIDERS["ours"].build(inputs, case.p), inputs, case.mode)
    gc.collect()
    gc.disable()  # a collection in the middle of a pass would be timed
    try:
        times, warm_up = take_turns(passes, budget, limit)
    finally:
        gc.enable()
    cell: dict[str, object] = {
        **case.as_dict(),
        "strategy": planned(case, device),
        "warm_up_discarded": warm_up,
        "seconds": {name: quartiles(seconds) for name, seconds in times.items()},
        "self": ratios(times, AGAIN, "ours"),
        "kept_bytes": kept,
    }
    if "frozen" in times:
        cell["tax"] = {name: ratios(times, name, "frozen") for name in names if name != "frozen"}
    if "peft" in times:
        cell["vs_peft"] = {name: ratios(times, name, "peft") for name in names if name not in ("frozen", "peft")}
    return cell


def describe(cell: dict) -> str:
    """One line on a finished cell."""
    text = cell["group"]
    for name, ratio in cell.get("vs_peft", {}).items():
        if name.startswith("ours"):
            text += f" | {name}/PEFT {ratio['median']:.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]"
    own = cell["self"]
    return f"{text} | self [{own['q1']:.3f}, {own['q3']:.3f}] | {own['rounds']} rounds"


def run(options: argparse.Namespace) -> dict[str, object]:
    """Measure the grid; the result so far is written after every cell, so that an interrupted run leaves it."""
    device = device_of(options)
    budget = options.budget or (0.02 if options.quick else 2.0)
    grid = cases(options)
    left_out: dict[str, str] = {}
    probes: dict[str, float] = {}
    result: dict[str, object] = {
        "kind": KIND,
        **environment(device),
        "budget_seconds": budget,
        "left_out": left_out,
        "frozen_probe_seconds": probes,
        "cells": [],
    }
    start = perf_counter()
    for number, case in enumerate(grid, 1):
        names = [provider.name for provider in available(case, device, left_out)]
        if (probe := frozen_seconds(case, device, probes)) > _SLOW_FLOOR:
            names = [name for name in names if name.startswith("ours") or name == "peft"]
        cell = measure_cell(case, names, device, budget, options.max_rounds)
        if "frozen" not in names:
            cell["left_out"] = f"frozen, plain, addmm: one frozen pass takes {probe:.1f} s here"
        result["cells"].append(cell)
        result["elapsed_seconds"] = round(perf_counter() - start, 1)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"[{number}/{len(grid)}, {result['elapsed_seconds']} s] {describe(cell)}", file=sys.stderr)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Paired benchmark of LoRA linear layers.")
    add_grid_options(parser.add_argument)
    parser.add_argument("--budget", type=float, help="seconds per provider and cell (default: 2, quick: 0.02)")
    parser.add_argument("--max-rounds", type=int, default=60, help="rounds at most (default: 60)")
    default = Path(__file__).parent / "results" / "paired.json"
    parser.add_argument(
        "--output", type=Path, default=default, help="the JSON to write (default: bench/results/paired.json)"
    )
    options = parser.parse_args(arguments)
    try:
        cases(options)
    except ValueError as error:
        parser.error(str(error))
    result = run(options)
    for name, reason in result["left_out"].items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    print(f"wrote {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
