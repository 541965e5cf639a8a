"""A PEFT model before and after ``patch_peft``: bytes kept for the backward, and CPU time of a training step.

    python bench/peft_step.py --output bench/results/peft-step.json
    python bench/peft_step.py --quick                                   shows that it runs: tiny, its times mean nothing

Kept: q, k and v over one x, as in attention. Every storage that autograd saves in one forward is counted once, beside
the parameters, in units of bytes(x); x itself is among them wherever it is kept. By saved-tensor hooks, so exactly.

Step: forward, backward and AdamW of a small Llama from a configuration, random weights and tokens, LoRA on all seven
linears. PEFT, patched and a second patched model take turns, in an order drawn anew for every round; a ratio is formed
within a round. Before that the gradients at dropout 0 are compared with those of a float64 copy: a patched model whose
error is more than twice PEFT's is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import gpu_state
import torch
from gpu_timing import paired, rounds_for, spread
from markdown import table
from measure import environment
from model_step import ALPHA, RANK, Way
from torch import Tensor, nn

KIND = "fused-lora peft step"
# Bounds on what a patched model keeps, in units of bytes(x): without dropout, and with it on a CPU.
KEPT, KEPT_DROPOUT = 1.15, 1.35


class Regime(NamedTuple):
    """A row of PEFT's numerics: dtype of the base and of x, of the adapters, and autocast's."""

    base: torch.dtype
    adapters: torch.dtype
    autocast: torch.dtype | None
    title: str


F32, BF16 = torch.float32, torch.bfloat16
REGIMES = {
    "R1": Regime(BF16, F32, None, "bf16 base, fp32 adapters (PEFT's default)"),
    "R2": Regime(BF16, BF16, None, "bf16 base, bf16 adapters"),
    "R3": Regime(F32, F32, BF16, "fp32 base, fp32 adapters, bf16 autocast"),
    "R3-bf16": Regime(BF16, F32, BF16, "bf16 base, fp32 adapters, bf16 autocast"),
    "R4": Regime(F32, F32, None, "all fp32"),
}
_STEPPED = ("R1", "R2", "R3", "R4")
# A configuration of transformers per size, and (sequences, tokens of each).
SMALL = ({"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 2048}, (4, 128))
TINY = ({"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "vocab_size": 160}, (2, 24))


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


def _autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def kept(model: nn.Module, x: Tensor, autocast: torch.dtype | None) -> float:
    """Bytes that a forward keeps for its backward, beside the parameters, in units of bytes(x)."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), _autocast(autocast):
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


def llama(sizes: dict, dtype: torch.dtype) -> nn.Module:
    import transformers

    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True, use_cache=False)
    return transformers.LlamaForCausalLM(config).to(dtype)


class Model(Way):
    """A model of ``model_step`` whose step runs under a regime."""

    def __init__(self, name: str, regime: Regime, base: nn.Module, ids: Tensor, dropout: float):
        super().__init__(name, base, ids, dropout)
        self.regime = regime
        for parameter in self.trained:
            parameter.data = parameter.data.to(regime.adapters)

    def forward(self) -> Any:
        with _autocast(self.regime.autocast):
            return super().forward()

    def gradients(self) -> Tensor:
        """Of all that trains, after one forward and backward, as one vector in float64."""
        self.forward().loss.backward()
        return torch.cat([p.grad.double().flatten() for p in self.trained])


def errors(regime: Regime, base: nn.Module, ids: Tensor) -> dict[str, float]:
    """Error of all gradients together against float64, relative to their norm: of PEFT and of the patched model."""
    exact = Model("peft", REGIMES["R4"], base, ids, 0.0)
    exact.model.double()
    gradients = {"exact": exact.gradients()}
    for way in ("peft", "patched"):
        gradients[way] = Model(way, regime, base, ids, 0.0).gradients()
    truth = gradients["exact"]
    return {way: ((gradients[way] - truth).norm() / truth.norm()).item() for way in ("peft", "patched")}


def take_turns(models: dict[str, Model], seconds: float) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(seconds, CPU seconds of all threads) per model and round; the first step of each is a warm-up."""
    first = []
    for model in models.values():
        model.step()
        start = perf_counter()
        model.step()
        first.append(perf_counter() - start)
    names, shuffle = list(models), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()  # a collection in the middle of a step would be timed
    try:
        for _ in range(rounds_for(sum(first), seconds)):
            shuffle(names)
            for name in names:
                start = process_time()
                times[name].append(models[name].seconds())
                cpu[name].append(process_time() - start)
    finally:
        gc.enable()
    return times, cpu


def step_cell(name: str, dropout: float, sizes: dict, shape: tuple[int, int], seconds: float) -> dict:
    """One regime and dropout: seconds, ratios to PEFT, and ours / ours."""
    regime = REGIMES[name]
    base = llama(sizes, regime.base)
    ids = torch.randint(0, base.config.vocab_size, shape, generator=torch.Generator().manual_seed(2))
    cell: dict = {"regime": name, "title": regime.title, "dropout": dropout, "batch": shape[0], "length": shape[1]}
    cell["errors"] = errors(regime, base, ids)
    if not cell["errors"]["patched"] <= 2 * cell["errors"]["peft"]:
        return cell | {"left_out": f"it is not timed: errors of the gradients are {cell['errors']}"}
    ways = {"peft": "peft", "patched": "patched", "again": "patched"}
    models = {who: Model(way, regime, base, ids, dropout) for who, way in ways.items()}
    times, cpu = take_turns(models, seconds)
    cell["seconds"] = {who: spread(values) for who, values in times.items()}
    cell["cpu_seconds"] = {who: spread(values) for who, values in cpu.items()}
    cell["cpu_vs_peft"] = paired(cpu, "patched", "peft")
    cell["vs_peft"], cell["self"] = paired(times, "patched", "peft"), paired(times, "again", "patched")
    return cell


def run(options: argparse.Namespace) -> dict:
    """Measure; what is there so far is written after every cell."""
    sizes, shape = TINY if options.quick else SMALL
    state: dict = {"kind": KIND, **environment(torch.device("cpu")), "quick": options.quick}
    state |= {"rank": RANK, "llama": sizes, "kept": kept_cells(128 if options.quick else 4096, 2048), "cells": []}
    seconds = 0.05 if options.quick else options.seconds
    for dropout in (0.0, 0.05):
        for name in _STEPPED:
            state["cells"].append(step_cell(name, dropout, sizes, shape, seconds))
            gpu_state.write(options.output, state)
            print(describe(state["cells"][-1]), file=sys.stderr, flush=True)
    return state


def describe(cell: dict) -> str:
    """One line on a finished cell."""
    how = f"{cell['regime']}, dropout {cell['dropout']:g}"
    if "left_out" in cell:
        return f"{how}: {cell['left_out']}"
    ratio, own = cell["vs_peft"], cell["self"]
    return f"{how}: patched / PEFT {_range(ratio)}; ours / ours {_range(own)}; {ratio['rounds']} rounds"


def _range(ratio: dict) -> str:
    return f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"


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
        + [_range(cell[ratio]) for ratio in ("vs_peft", "cpu_vs_peft", "self")]
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
    parser = argparse.ArgumentParser(description="A PEFT model before and after patch_peft: memory and time on a CPU.")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: shows that it runs")
    parser.add_argument("--seconds", type=float, default=40.0, help="of rounds per regime and dropout (default: 40)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own)")
    default = Path(__file__).parent / "results" / "peft-step.json"
    parser.add_argument("--output", type=Path, default=default, help="default: bench/results/peft-step.json")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    state = run(options)
    print("\n".join(sections(state, options.output.name)))
    print(f"wrote {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
