"""CPU time of one call on tiny layers: argument checks, plan look-up, dispatch, launches. Ours against PEFT's.

    python bench/host_cost.py --output bench/results/host-cost.json

Tiny layers because there the arithmetic is nothing and the host is all; it is the same host work in front of every
launch of a large layer. What is timed is CPU time of the calling thread (``time.thread_time``), so a neighbour on the
machine that takes the core away is not in it, only what it does to caches and clock. On a GPU the calls are queued and
the device is waited for between the rounds, untimed: what is timed is the launching.

In every round each layer makes a few calls, in an order drawn anew; a ratio is formed within a round. Reported are the
median and quartiles over the rounds, the ratio of the fastest rounds, and two counts without noise: the functions that
Python enters (C functions included) and the operators that reach a kernel in one pass.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from time import thread_time_ns

import torch
from measure import environment
from paired import quartiles, ratios
from providers import PROVIDERS, Inputs, available, check, make_inputs
from shapes import MODES, REGIMES, SCALE, Case, device_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import LoRALinear

KIND = "fused-lora host cost"
SHAPES = ((1, 16, 16), (16, 16, 16), (1, 64, 64), (16, 64, 64))  # M, K, N
RANK = 4
LAYERS = ("frozen", "ours", "module", "peft", "beta1", "plain")
LABELS = {"module": "fused-lora, LoRALinear", "beta1": "plain autograd.Function"}
AGAIN = "ours-again"  # a second instance of ours: what it is off from 1 is noise


def module(inputs: Inputs, p: float) -> nn.Module:
    """Our layer as users have it, around the tensors of a case."""
    N, K = inputs.weight.shape
    rank, dtype = inputs.a.shape[0], inputs.weight.dtype
    settings = {"r": rank, "lora_alpha": SCALE * rank, "lora_dropout": p}
    layer = LoRALinear(K, N, False, **settings, dtype=dtype, adapter_dtype=inputs.a.dtype, device=inputs.weight.device)
    with torch.no_grad():
        for parameter, value in ((layer.weight, inputs.weight), (layer.lora_a, inputs.a), (layer.lora_b, inputs.b)):
            parameter.copy_(value)
    return layer


class _Operators(TorchDispatchMode):
    """Counts the operators that are neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (
            func.is_view or "empty" in func.name() or func.name() in ("aten::detach", "aten::_unsafe_view")
        )
        return func(*args, **(kwargs or {}))


def entered(call: Callable[[], None]) -> int:
    """How many functions Python enters during the call, its own and those of C. The same in every run."""
    count = 0

    def note(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    call()  # what the first call builds once is not counted
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count - 1  # setprofile's own last call


def operators(call: Callable[[], None]) -> int:
    """How many operators of PyTorch with a kernel the call runs."""
    with _Operators() as found:
        call()
    return found.count


def passes(layer: nn.Module, inputs: Inputs, mode: str) -> Callable[[], None]:
    """One forward, or forward and backward with the gradients released; y is dropped as the call ends."""
    x, dy, parameters = inputs.x, inputs.dy, [p for p in layer.parameters() if p.requires_grad]

    def forward() -> None:
        layer(x)

    def both() -> None:
        layer(x).backward(dy)
        x.grad = None
        for parameter in parameters:
            parameter.grad = None

    return forward if mode == "forward" else both


def take_turns(calls: dict[str, Callable[[], None]], rounds: int, repeat: int, device: torch.device) -> dict[str, list]:
    """Microseconds of CPU time per call, layer and round; the first round warms up."""
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        names = list(calls)
        shuffle(names)
        for name in names:
            call = calls[name]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = thread_time_ns()
            for _ in range(repeat):
                call()
            times[name].append((thread_time_ns() - start) / repeat / 1e3)
    return {name: found[1:] for name, found in times.items()}


def measure_cell(case: Case, rounds: int, repeat: int, device: torch.device, left_out: dict[str, str]) -> dict:
    """One cell, as it stands in the JSON; times in microseconds."""
    inputs = make_inputs(case.M, case.K, case.N, case.rank, case.regime, device)
    usable = [provider.name for provider in available(case, device, left_out) if provider.name in LAYERS]
    for name in usable:
        check(name, case.regime, device)
    layers = {name: PROVIDERS[name].build(inputs, case.p) for name in usable}
    layers |= {"module": module(inputs, case.p).train(), AGAIN: PROVIDERS["ours"].build(inputs, case.p)}
    calls = {name: passes(layer, inputs, case.mode) for name, layer in layers.items()}
    counts = {name: {"entered": entered(call), "operators": operators(call)} for name, call in calls.items()}
    gc.collect()
    gc.disable()
    try:
        times = take_turns(calls, rounds, repeat, device)
    finally:
        gc.enable()
    cell: dict[str, object] = {
        **case.as_dict(),
        "rounds": rounds,
        "calls_per_round": repeat,
        "microseconds": {name: {**quartiles(found), "fastest": round(min(found), 3)} for name, found in times.items()},
        "counts": counts,
        "self": ratios(times, AGAIN, "ours"),
    }
    if "peft" in times:
        others = [name for name in times if name not in ("peft", AGAIN)]
        fastest = min(times["peft"])
        cell["vs_peft"] = {
            name: {**ratios(times, name, "peft"), "fastest": round(min(times[name]) / fastest, 5)} for name in others
        }
    return cell


def grid(options: argparse.Namespace) -> list[Case]:
    shapes = SHAPES[:1] if options.quick else SHAPES
    regimes = options.dtype.split(",")
    if unknown := [name for name in regimes if name not in REGIMES]:
        raise ValueError(f"--dtype has no {', '.join(unknown)}; it takes a comma list of {', '.join(REGIMES)}")
    return [
        Case("tiny", "linear", 1, M, K, N, mode, regime, p, RANK)
        for regime in regimes
        for mode in MODES
        for p in map(float, options.p.split(","))
        for M, K, N in shapes
    ]


# ---- what is said about it


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} [{found['q1']:.2f}, {found['q3']:.2f}], fastest {found['fastest']:.2f}"


def sections(content: dict, name: str) -> list[str]:
    """Markdown from the JSON alone: one table per mode, each heading naming the file."""
    lines = [
        f"CPU time of one call on tiny layers, rank {RANK}, {content['cpu']}, torch {content['torch']}, PEFT "
        f"{content['peft']}; ratios to PEFT's call in the same round: median [quartiles] and that of the fastest "
        "rounds; `ours / ours` says how much of it is noise. How: `bench/README.md`.",
        "",
    ]
    shown = [
        key for key in ("ours", "module", "beta1") if any(key in cell.get("vs_peft", {}) for cell in content["cells"])
    ]
    for mode in MODES:
        cells = [cell for cell in content["cells"] if cell["mode"] == mode]
        if not cells:
            continue
        lines += [f"### Host cost, {mode}, from {name}", ""]
        labels = [f"{LABELS.get(key, key)} / PEFT" for key in shown]
        header = [
            "M, K, N",
            "dtype",
            "p",
            "ours, µs",
            "PEFT, µs",
            *labels,
            "ours / ours",
            "functions entered",
            "operators",
        ]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for cell in cells:
            micro, counts, own = cell["microseconds"], cell["counts"], cell["self"]
            theirs = micro["peft"]["fastest"] if "peft" in micro else None
            row = [f"{cell['M']}, {cell['K']}, {cell['N']}", cell["regime"], f"{cell['p']:g}"]
            row += [f"{micro['ours']['fastest']:.1f}", "-" if theirs is None else f"{theirs:.1f}"]
            row += [_ratio(cell["vs_peft"][key]) if key in cell.get("vs_peft", {}) else "-" for key in shown]
            row += [f"[{own['q1']:.2f}, {own['q3']:.2f}]"]
            row += [
                " / ".join(str(counts[key][what]) for key in ("ours", "peft") if key in counts)
                for what in ("entered", "operators")
            ]
            lines.append("| " + " | ".join(row) + " |")
        lines += ["", "Counts: ours / PEFT.", ""]
    return lines


def summary(content: dict, name: str) -> tuple[str, str]:
    """(what, result) for the README."""
    parts = []
    for mode in MODES:
        for p in sorted({cell["p"] for cell in content["cells"]}):
            ratios = [
                cell["vs_peft"]["ours"]["median"]
                for cell in content["cells"]
                if cell["mode"] == mode and cell["p"] == p and "ours" in cell.get("vs_peft", {})
            ]
            if ratios:
                parts.append(f"{mode}, p {p:g}: {min(ratios):.2f} to {max(ratios):.2f}")
    return "CPU time of a call on tiny layers / PEFT's", "; ".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds: shows that it runs")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    parser.add_argument("--dtype", default="fp32,bf16,bf16-fp32", help=f"comma list of {', '.join(REGIMES)}")
    parser.add_argument("--p", default="0,0.1", help="comma list of dropout probabilities (default: 0,0.1)")
    parser.add_argument("--rounds", type=int, help="rounds per cell (default: 200, quick: 5)")
    parser.add_argument("--calls", type=int, default=10, help="calls of a layer in a round (default: 10)")
    parser.add_argument("--output", type=Path, help="the JSON to write (default: none)")
    options = parser.parse_args(arguments)
    device, rounds = device_of(options), options.rounds or (5 if options.quick else 200)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread is enough for a tiny product, and it is the calling one that is timed
    left_out: dict[str, str] = {}
    try:
        result: dict[str, object] = {"kind": KIND, **environment(device), "left_out": left_out, "cells": []}
        for case in grid(options):
            cell = measure_cell(case, rounds, options.calls, device, left_out)
            result["cells"].append(cell)
            against = f"ours / PEFT {_ratio(cell['vs_peft']['ours'])}" if "vs_peft" in cell else "PEFT is not installed"
            print(f"{case.group} | ours {cell['microseconds']['ours']['fastest']:.1f} us | {against}", file=sys.stderr)
    finally:
        torch.set_num_threads(threads)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
