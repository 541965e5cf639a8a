"""One unattended command for a GPU: is it right, how fast can the card be, how fast are we and the others.

    python bench/gpu.py --output bench/results/gpu-h200.json     at most eight minutes, no network
    python bench/gpu.py --tune --output tuned.json               measure forms and tiles for fused_lora/tuned.json
    python bench/gpu.py --quick                                  the same path small; on a CPU, interpreted

1. Every strategy and every kernel against float64, by the accuracy rule. What is red is reported and not timed.
2. The card's own ceilings: bytes per second of a copy, flops of a bfloat16 product.
3. The table: cells in the order of ``gpu_grid.py`` until the time is up. The JSON is written after every cell and names
   the cells that were left for want of time.

The measuring is done in processes of its own. One that dies (a launch that kills its CUDA context) or hangs is
started again without what it was at, and the JSON says so under "crashes".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_state
import torch
from gpu_figures import figures
from gpu_grid import CHECK
from gpu_sections import sections, summary, terminal, way_of
from measure import environment
from shapes import REGIMES

KIND = "fused-lora gpu"
_HERE = Path(__file__).parent
_HUNG = 150.0  # seconds without a sign of life (a compile of torch.compile takes up to a minute)
_MOST_CRASHES = 6
__all__ = ["KIND", "figures", "main", "sections", "summary"]


def driver() -> dict[str, object]:
    """The driver, the card's memory and its power limit, as nvidia-smi names them."""
    query = "driver_version,memory.total,power.limit,clocks.max.sm"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {"driver": None}
    names = ("driver", "memory", "power_limit", "max_clock")
    return dict(zip(names, done.stdout.splitlines()[0].split(", "), strict=False))


def check(device: torch.device, quick: bool, folder: Path, deadline: float) -> dict[str, dict]:
    """The verdict on every (strategy or kernel, regime), each regime in a process of its own."""
    groups = [("bf16-fp32",)] if quick else [(regime,) for regime in REGIMES]
    running = {group: _start_check(group, device, quick, folder) for group in groups}
    crashes = dict.fromkeys(groups, 0)
    while running:
        time.sleep(0.05)
        for group, process in list(running.items()):
            if process.poll() is None and time.time() < deadline:
                continue
            if late := process.poll() is None:
                process.kill()
                process.wait()
            del running[group]
            died = process.returncode != 0
            if died and _blame(_check_file(group, folder), "" if late else f"its process ended: {process.returncode}"):
                crashes[group] += 1
                if crashes[group] < _MOST_CRASHES and time.time() < deadline:
                    running[group] = _start_check(group, device, quick, folder)
    found: dict[str, dict] = {}
    for group in groups:
        file = _check_file(group, folder)
        found |= json.loads(file.read_text()) if file.exists() else {}
        if crashes[group] == _MOST_CRASHES:  # whatever it was at: the rest of the regime is not checked
            found[f"{CHECK} | {group[0]}"] = {"red": f"its process ended {_MOST_CRASHES} times"}
        file.unlink(missing_ok=True)
    return found


def _check_file(group: tuple[str, ...], folder: Path) -> Path:
    return folder / f"gpu-check-{os.getpid()}-{'-'.join(group)}.json"


def _start_check(group: tuple[str, ...], device: torch.device, quick: bool, folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(_HERE / "gpu_check.py"), "--regimes", ",".join(group), "--device", str(device)]
    command += ["--output", str(_check_file(group, folder)), *(["--quick"] if quick else [])]
    return subprocess.Popen(command)


def _blame(file: Path, red: str) -> bool:
    """Mark what a dead process was at as red, unless it only ran out of time: then it is not started again either."""
    found = json.loads(file.read_text()) if file.exists() else {}
    key = found.pop("attempting", None)
    if key is not None:
        gpu_state.write(file, found | ({key: {"red": red}} if red else {}))
    return bool(red)


def measure(options: argparse.Namespace, state: dict, deadline: float) -> None:
    """Run the worker until the table is done or the time is up; a crash costs the provider that caused it."""
    attempt = options.output.with_suffix(".attempt")
    arguments = {"--output": options.output, "--deadline": deadline, "--device": options.device}
    command = [
        sys.executable,
        str(_HERE / "gpu_worker.py"),
        *(str(word) for pair in arguments.items() for word in pair),
    ]
    command += [f"--{name}" for name in ("quick", "tune") if getattr(options, name)]
    for _ in range(_MOST_CRASHES):
        attempt.write_text("")
        process = subprocess.Popen(command)
        while process.poll() is None:
            time.sleep(0.05)
            if time.time() > deadline + 20 or time.time() - attempt.stat().st_mtime > _HUNG:
                process.kill()
                process.wait()
        state.update(json.loads(options.output.read_text()))
        if process.returncode == 0 or time.time() > deadline:
            break
        at, _, error = attempt.read_text().partition("\n")
        state["crashes"].append({"at": at, "error": error.strip() or f"ended with code {process.returncode}, or hung"})
        gpu_state.write(options.output, state)
    attempt.unlink(missing_ok=True)


def run(options: argparse.Namespace) -> dict:
    """All three parts; returns what was written."""
    start = time.time()
    device = torch.device(options.device)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    state: dict = {
        "kind": "fused-lora tuned" if options.tune else KIND,
        **environment(device),
        **(driver() if device.type == "cuda" else {}),
        "cuda": torch.version.cuda,
        "commit": environment(device)["commit"] or os.environ.get("COMMIT"),
        "quick": options.quick,
        "seconds_allowed": options.seconds,
    }
    state |= {"correctness": {}, "ceilings": None, "cells": [], "crashes": [], "skipped_for_time": None}
    deadline = start + options.seconds
    share = 0.4 * options.seconds  # the most that the check may take: it is compiles, above all
    state["correctness"] = check(device, options.quick, options.output.parent, start + share)
    state["correctness_seconds"] = round(time.time() - start, 1)
    gpu_state.write(options.output, state)
    if not options.check_only:
        measure(options, state, deadline)
    state["elapsed_seconds"] = round(time.time() - start, 1)
    gpu_state.write(options.output, state)
    return state


def shortfall(state: dict, check_only: bool) -> str:
    """Why a run without red is no success either; "" where it is one."""
    if not state["correctness"]:
        return "nothing was checked against float64"
    if len(state["crashes"]) >= _MOST_CRASHES:
        return f"the process that measures ended {_MOST_CRASHES} times and was not started again"
    if not check_only and not state.get("entries") and not any(cell.get(way_of(cell)) for cell in state["cells"]):
        return "nothing was measured"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """The exit code is 1 where something is red, nothing was checked or measured, or the measuring was given up."""
    parser = argparse.ArgumentParser(description="Correctness, ceilings and the table of LoRA taxes on one GPU.")
    parser.add_argument("--quick", action="store_true", help="the same path small: shows that it runs, times nothing")
    parser.add_argument("--tune", action="store_true", help="instead of the table, measure forms and tiles")
    parser.add_argument("--check-only", action="store_true", help="stop after the check against float64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="for all of it (default: 460, quick: 300)")
    parser.add_argument("--output", type=Path, help="the JSON to write (default: bench/results/gpu.json or tuned.json)")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type != "cuda":
        if not options.quick:
            parser.error("there is no GPU: --quick runs the same path on a CPU; bench/paired.py is the CPU's benchmark")
        os.environ.setdefault("TRITON_INTERPRET", "1")  # for the processes that measure
    else:
        os.environ["TRITON_INTERPRET"] = "0"
    options.seconds = options.seconds or (300.0 if options.quick else 460.0)
    options.output = options.output or _HERE / "results" / ("tuned.json" if options.tune else "gpu.json")
    state = run(options)
    print("\n".join(terminal(state, options.output.name)))
    if why := shortfall(state, options.check_only):
        print(f"failed: {why}")
    return 1 if why or any(verdict.get("red") for verdict in state["correctness"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
