"""``apply_lora`` beside PEFT: CPU time of a training step of a small Llama with LoRA on all seven linears.

    python bench/apply_step.py --output bench/results/apply-step.json
    python bench/apply_step.py --quick                              shows that it runs: tiny, its times mean nothing

A step is forward, backward and AdamW, from a configuration of transformers with random weights and tokens. PEFT, ours
and ours once more take turns, in an order drawn anew for every round; a ratio is formed within a round, and ours / ours
says what the machine's noise is. CPU time is that of all threads. Before that the gradients at dropout 0, with the same
factors, are compared with a float64 copy's: where our error is more than twice PEFT's, nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gpu_state
import torch
from gpu_timing import paired, spread
from markdown import table
from measure import environment
from model_step import RANK
from peft_step import REGIMES, SMALL, TINY, Model, Regime, llama, take_turns
from torch import Tensor, nn

KIND = "fused-lora apply step"
_STEPPED = ("R4", "R1")  # float32; bfloat16 with float32 adapters


def gradients(model: Model) -> Tensor:
    """Of all factors, in float64, in the order of the layers' names: PEFT's and ours are then the same numbers."""
    return model.outcome()["gradients"].double()


def errors(regime: Regime, base: nn.Module, ids: Tensor) -> dict[str, float]:
    """Error of all gradients together against float64, relative to their norm: of PEFT and of ours."""
    exact = Model("peft", REGIMES["R4"], base, ids, 0.0)
    exact.model.double()
    truth = gradients(exact)
    found = {way: gradients(Model(way, regime, base, ids, 0.0)) for way in ("peft", "apply_lora")}
    return {way: ((found[way] - truth).norm() / truth.norm()).item() for way in found}


def step_cell(name: str, dropout: float, sizes: dict, shape: tuple[int, int], seconds: float) -> dict:
    """One regime and dropout: seconds, ours / PEFT, and ours / ours."""
    regime = REGIMES[name]
    base = llama(sizes, regime.base)
    ids = torch.randint(0, base.config.vocab_size, shape, generator=torch.Generator().manual_seed(2))
    cell: dict = {"regime": name, "title": regime.title, "dropout": dropout, "batch": shape[0], "length": shape[1]}
    cell["errors"] = errors(regime, base, ids)
    if not cell["errors"]["apply_lora"] <= 2 * cell["errors"]["peft"]:
        return cell | {"left_out": f"it is not timed: errors of the gradients are {cell['errors']}"}
    ways = {"peft": "peft", "apply_lora": "apply_lora", "again": "apply_lora"}
    times, cpu = take_turns({who: Model(way, regime, base, ids, dropout) for who, way in ways.items()}, seconds)
    cell["seconds"] = {who: spread(values) for who, values in times.items()}
    cell["cpu_vs_peft"], cell["cpu_self"] = paired(cpu, "apply_lora", "peft"), paired(cpu, "again", "apply_lora")
    return cell | {"vs_peft": paired(times, "apply_lora", "peft"), "self": paired(times, "again", "apply_lora")}


def run(options: argparse.Namespace) -> dict:
    """Measure; what is there so far is written after every cell."""
    sizes, shape = TINY if options.quick else SMALL
    state: dict = {"kind": KIND, **environment(torch.device("cpu")), "quick": options.quick}
    state |= {"rank": RANK, "llama": sizes, "cells": []}
    seconds = 0.05 if options.quick else options.seconds
    for name in _STEPPED:
        for dropout in (0.0, 0.05):
            state["cells"].append(step_cell(name, dropout, sizes, shape, seconds))
            gpu_state.write(options.output, state)
            print(describe(state["cells"][-1]), file=sys.stderr, flush=True)
    return state


def describe(cell: dict) -> str:
    """One line on a finished cell."""
    how = f"{cell['title']}, dropout {cell['dropout']:g}"
    if "left_out" in cell:
        return f"{how}: {cell['left_out']}"
    ratio, own = cell["cpu_vs_peft"], cell["cpu_self"]
    return f"{how}: CPU time of apply_lora / PEFT {_range(ratio)}; ours / ours {_range(own)}; {ratio['rounds']} rounds"


def _range(ratio: dict) -> str:
    return f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"


def sections(content: dict, name: str) -> list[str]:
    """Markdown of one JSON; ``name`` is its file's."""
    if content["quick"]:
        return [f"{name} is of a --quick run: it shows that the benchmark runs, its times mean nothing."]
    sizes, first = content["llama"], content["cells"][0]
    rows = [
        [cell["title"], f"{cell['dropout']:g}"]
        + [f"{cell['seconds'][who]['median'] * 1e3:.1f}" for who in ("peft", "apply_lora")]
        + [_range(cell[ratio]) for ratio in ("vs_peft", "self", "cpu_vs_peft", "cpu_self")]
        + [str(cell["vs_peft"]["rounds"])]
        for cell in content["cells"]
        if "left_out" not in cell
    ]
    header = ["regime", "dropout", "PEFT, ms", "apply_lora, ms", "apply_lora / PEFT", "ours / ours"]
    header += ["CPU time / PEFT", "CPU time, ours / ours", "rounds"]
    return [
        f"### A training step of a small Llama, `apply_lora` beside PEFT, on a CPU, from {name}",
        "",
        f"{sizes['num_hidden_layers']} layers, hidden size {sizes['hidden_size']}, {first['batch']} x "
        f"{first['length']} tokens, rank {content['rank']} on all seven linears; median and quartiles of the rounds.",
        *table(header, rows),
        *[f"* left out: {describe(cell)}" for cell in content["cells"] if "left_out" in cell],
    ]


def summary(content: dict, name: str) -> tuple[str, str]:
    """The two cells of the README's row."""
    ratios = [cell["cpu_vs_peft"]["median"] for cell in content["cells"] if "cpu_vs_peft" in cell]
    measured = bool(ratios) and not content["quick"]
    result = f"CPU time / PEFT {min(ratios):.3f} to {max(ratios):.3f}" if measured else "not measured"
    return "`apply_lora` beside PEFT: training step of a small Llama, LoRA on all linears, on a CPU", result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="apply_lora beside PEFT: CPU time of a training step of a small Llama."
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: shows that it runs")
    parser.add_argument("--seconds", type=float, default=40.0, help="of rounds per regime and dropout (default: 40)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own)")
    default = Path(__file__).parent / "results" / "apply-step.json"
    parser.add_argument("--output", type=Path, default=default, help="default: bench/results/apply-step.json")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    state = run(options)
    print("\n".join(sections(state, options.output.name)))
    print(f"wrote {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
