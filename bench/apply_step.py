"""``apply_lora`` beside PEFT: CPU time of a training step of a small Llama with LoRA on all seven linears.

    python bench/apply_step.py --output bench/results/apply-step.json
    python bench/apply_step.py --quick                              shows that it runs: tiny, its times mean nothing

How the steps take turns, and what is not timed: ``llama_step.py``.
"""

from __future__ import annotations

import argparse

import llama_step
from gpu_timing import paired, spread
from llama_step import spread_of
from markdown import table

KIND = "fused-lora apply step"
_STEPPED = ("R4", "R1")  # float32; bfloat16 with float32 adapters


def step_cell(name: str, dropout: float, sizes: dict, shape: tuple[int, int], seconds: float) -> dict:
    """One regime and dropout: seconds, ours / PEFT, and ours / ours."""
    cell, times, cpu = llama_step.timed("apply_lora", name, dropout, sizes, shape, seconds)
    if not times:
        return cell
    cell["seconds"] = {who: spread(values) for who, values in times.items()}
    cell["cpu_vs_peft"], cell["cpu_self"] = paired(cpu, "apply_lora", "peft"), paired(cpu, "again", "apply_lora")
    return cell | {"vs_peft": paired(times, "apply_lora", "peft"), "self": paired(times, "again", "apply_lora")}


def run(options: argparse.Namespace) -> dict:
    """Measure; what is there so far is written after every cell."""
    wanted = [(name, dropout) for name in _STEPPED for dropout in (0.0, 0.05)]
    return llama_step.fill(llama_step.start(KIND, options), options, wanted, step_cell, describe)


def describe(cell: dict) -> str:
    """One line on a finished cell."""
    how = f"{cell['title']}, dropout {cell['dropout']:g}"
    if "left_out" in cell:
        return f"{how}: {cell['left_out']}"
    ratio, own = cell["cpu_vs_peft"], cell["cpu_self"]
    ratios = f"CPU time of apply_lora / PEFT {spread_of(ratio)}; ours / ours {spread_of(own)}"
    return f"{how}: {ratios}; {ratio['rounds']} rounds"


def sections(content: dict, name: str) -> list[str]:
    """Markdown of one JSON; ``name`` is its file's."""
    if content["quick"]:
        return [f"{name} is of a --quick run: it shows that the benchmark runs, its times mean nothing."]
    sizes, first = content["llama"], content["cells"][0]
    rows = [
        [cell["title"], f"{cell['dropout']:g}"]
        + [f"{cell['seconds'][who]['median'] * 1e3:.1f}" for who in ("peft", "apply_lora")]
        + [spread_of(cell[ratio]) for ratio in ("vs_peft", "self", "cpu_vs_peft", "cpu_self")]
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
    description = "apply_lora beside PEFT: CPU time of a training step of a small Llama."
    llama_step.main(description, "apply-step.json", run, sections, arguments)


if __name__ == "__main__":
    main()
