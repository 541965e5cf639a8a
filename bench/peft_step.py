"""A PEFT model before and after ``patch_peft``: bytes kept for the backward, and CPU time of a training step.

    python bench/peft_step.py --output bench/results/peft-step.json
    python bench/peft_step.py --quick                                   shows that it runs: tiny, its times mean nothing

Kept: q, k and v over one x, as in attention. Every storage that autograd saves in one forward is counted once, beside
the parameters, in units of bytes(x); x itself is among them wherever it is kept. By saved-tensor hooks, so exactly.

Step: of a small Llama with LoRA on all seven linears; PEFT, patched and a second patched model take turns. How, and
what is not timed: ``llama_step.py``.
"""

from __future__ import annotations

import argparse

import llama_step
import torch
from gpu_timing import paired, spread
from llama_step import REGIMES, Regime, autocast, spread_of
from markdown import table
from model_step import ALPHA, RANK
from torch import Tensor, nn

KIND = "fused-lora peft step"
# Bounds on what a patched model keeps, in units of bytes(x): without dropout, and with it on a CPU.
KEPT, KEPT_DROPOUT = 1.15, 1.35
_STEPPED = ("R1", "R2", "R3", "R4")


class Projections(nn.Module):
    """q, k and v of Llama-3.2-1B's attention (k and v are narrower), or of the given width."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width // n, bias=False) for n in (1, 4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


def projections(regime: Regime, p: float, width: int) -> nn.Module:
    """PEFT's model over :class:`Projections`."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=p, target_modules=["q", "k", "v"])
    lower = regime.adapters != torch.float32
    return peft.get_peft_model(Projections(width).to(regime.base), config, autocast_adapter_dtype=not lower)


def kept(model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> float:
    """Bytes a forward (under autocast to ``dtype``) keeps for its backward beside the parameters, over bytes(x)."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(dtype):
        y = model(x)
    del y
    return sum(storage.nbytes() for storage in storages.values()) / x.nbytes


def kept_cells(rows: int, width: int) -> list[dict]:
    """Ours and PEFT's in every regime, with and without dropout, for both of ``patch_peft``'s masks."""
    from fused_lora import patch_peft

    cells = []
    for name, regime in REGIMES.items():
        for p in (0.0, 0.05):
            model = projections(regime, p, width)
            torch.manual_seed(0)
            x = torch.randn(rows, width).to(regime.base).requires_grad_() * 1  # no leaf: autocast caches a leaf's cast
            found = {"peft": kept(model, x, regime.autocast)}
            for mode in ("fused", "torch") if p else ("fused",):
                patch_peft(model, strict=True, dropout=mode)
                found[mode] = kept(model, x, regime.autocast)
            sizes = {who: round(size, 4) for who, size in found.items()}
            cells.append({"regime": name, "title": regime.title, "dropout": p, "rows": rows, "width": width, **sizes})
    return cells


def step_cell(name: str, dropout: float, sizes: dict, shape: tuple[int, int], seconds: float) -> dict:
    """One regime and dropout: seconds, ratios to PEFT, and ours / ours."""
    cell, times, cpu = llama_step.timed("patched", name, dropout, sizes, shape, seconds)
    if not times:
        return cell
    cell["seconds"] = {who: spread(values) for who, values in times.items()}
    cell["cpu_seconds"] = {who: spread(values) for who, values in cpu.items()}
    cell["cpu_vs_peft"] = paired(cpu, "patched", "peft")
    return cell | {"vs_peft": paired(times, "patched", "peft"), "self": paired(times, "again", "patched")}


def run(options: argparse.Namespace) -> dict:
    """Measure; what is there so far is written after every cell."""
    state = llama_step.start(KIND, options) | {"kept": kept_cells(128 if options.quick else 4096, 2048)}
    wanted = [(name, dropout) for dropout in (0.0, 0.05) for name in _STEPPED]
    return llama_step.fill(state, options, wanted, step_cell, describe)


def describe(cell: dict) -> str:
    """One line on a finished cell."""
    how = f"{cell['regime']}, dropout {cell['dropout']:g}"
    if "left_out" in cell:
        return f"{how}: {cell['left_out']}"
    ratio, own = cell["vs_peft"], cell["self"]
    return f"{how}: patched / PEFT {spread_of(ratio)}; ours / ours {spread_of(own)}; {ratio['rounds']} rounds"


def sections(content: dict, name: str) -> list[str]:
    """Markdown of one JSON; ``name`` is its file's."""
    rows = [
        [cell["regime"], cell["title"], f"{cell['dropout']:g}"]
        + [f"{cell[who]:.2f}" if who in cell else "" for who in ("fused", "torch", "peft")]
        for cell in content["kept"]
    ]
    first = content["kept"][0]
    lines = [
        f"### Kept for the backward in units of bytes(x), q, k and v over one x, from {name}",
        "",
        f"{first['rows']} rows of {first['width']}, rank {content['rank']}; k and v a quarter as wide as q. "
        "Counted, not timed.",
        *table(["regime", "", "dropout", "patched", 'patched, `dropout="torch"`', "PEFT"], rows),
    ]
    if content["quick"]:
        return [*lines, f"The steps of {name} are of a --quick run: their times mean nothing."]
    sizes = content["llama"]
    times = [
        [cell["regime"], f"{cell['dropout']:g}"]
        + [f"{cell['seconds'][who]['median'] * 1e3:.1f}" for who in ("peft", "patched")]
        + [spread_of(cell[ratio]) for ratio in ("vs_peft", "cpu_vs_peft", "self")]
        + [str(cell["vs_peft"]["rounds"])]
        for cell in content["cells"]
        if "left_out" not in cell
    ]
    header = [
        "regime",
        "dropout",
        "PEFT, ms",
        "patched, ms",
        "patched / PEFT",
        "CPU time / PEFT's",
        "ours / ours",
        "rounds",
    ]
    left_out = [f"* left out: {describe(cell)}" for cell in content["cells"] if "left_out" in cell]
    cell = content["cells"][0]
    return [
        *lines,
        f"### A training step of a small Llama, patched beside PEFT, on a CPU, from {name}",
        "",
        f"{sizes['num_hidden_layers']} layers, hidden size {sizes['hidden_size']}, {cell['batch']} x {cell['length']} "
        "tokens; median, and quartiles over the rounds; a ratio is formed within a round.",
        *table(header, times),
        *left_out,
    ]


def summary(content: dict, name: str) -> tuple[str, str]:
    """The two cells of the README's row."""
    what = "a patched PEFT model beside PEFT: training step of a small Llama, bytes kept by q, k and v over one x"
    default = {cell["dropout"]: cell for cell in content["kept"] if cell["regime"] == "R1"}
    sizes = ", ".join(f"{c['fused']:.2f} against {c['peft']:.2f} at dropout {p:g}" for p, c in default.items())
    times = [
        f"{cell['vs_peft']['median']:.3f} at dropout {cell['dropout']:g}"
        for cell in content["cells"]
        if cell["regime"] == "R1" and "vs_peft" in cell and not content["quick"]
    ]
    return what, f"PEFT's default: kept {sizes} (x bytes(x)); time / PEFT {', '.join(times) or 'not measured'}"


def main(arguments: list[str] | None = None) -> None:
    description = "A PEFT model before and after patch_peft: memory and time on a CPU."
    llama_step.main(description, "peft-step.json", run, sections, arguments)


if __name__ == "__main__":
    main()
