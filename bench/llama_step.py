"""What ``peft_step.py`` and ``apply_step.py`` share: steps of a small Llama on a CPU that take turns with PEFT's.

A step is forward, backward and AdamW, from a configuration of transformers with random weights and tokens, LoRA on all
seven linears. PEFT, ours and ours once more take turns, in an order drawn anew for every round; a ratio is formed
within a round, and ours / ours says what the machine's noise is. CPU time is that of all threads. Before that the
gradients at dropout 0, with the same factors, are compared with those of a float64 copy: where our error is more than
twice PEFT's, nothing is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import gpu_state
import torch
from gpu_timing import rounds_for
from measure import environment
from model_step import RANK, Way
from torch import Tensor, nn


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
# A configuration of transformers per size, and (sequences, tokens of each).
SMALL = ({"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 2048}, (4, 128))
TINY = ({"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "vocab_size": 160}, (2, 24))
Times = dict[str, list[float]]


def autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


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
        with autocast(self.regime.autocast):
            return super().forward()


def gradients(model: Model) -> Tensor:
    """Of all factors, in float64, in the order of the layers' names: PEFT's and ours are then the same numbers."""
    return model.outcome()["gradients"].double()


def errors(way: str, regime: Regime, base: nn.Module, ids: Tensor) -> dict[str, float]:
    """Error of all gradients together against float64, relative to their norm: of PEFT and of ours, ``way``."""
    exact = Model("peft", REGIMES["R4"], base, ids, 0.0)
    exact.model.double()
    truth = gradients(exact)
    found = {who: gradients(Model(who, regime, base, ids, 0.0)) for who in ("peft", way)}
    return {who: ((found[who] - truth).norm() / truth.norm()).item() for who in found}


def take_turns(models: dict[str, Model], seconds: float) -> tuple[Times, Times]:
    """(seconds, CPU seconds of all threads) per model and round; the first step of each is a warm-up."""
    first = []
    for model in models.values():
        model.step()
        start = perf_counter()
        model.step()
        first.append(perf_counter() - start)
    names, shuffle = list(models), random.Random(0).shuffle
    times: Times = {name: [] for name in names}
    cpu: Times = {name: [] for name in names}
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


def timed(
    way: str, name: str, dropout: float, sizes: dict, shape: tuple[int, int], seconds: float
) -> tuple[dict, Times, Times]:
    """A cell with its errors, and (seconds, CPU seconds) of "peft", ``way`` and "again"; a cell left out has none."""
    regime = REGIMES[name]
    base = llama(sizes, regime.base)
    ids = torch.randint(0, base.config.vocab_size, shape, generator=torch.Generator().manual_seed(2))
    cell: dict = {"regime": name, "title": regime.title, "dropout": dropout, "batch": shape[0], "length": shape[1]}
    cell["errors"] = errors(way, regime, base, ids)
    if not cell["errors"][way] <= 2 * cell["errors"]["peft"]:
        return cell | {"left_out": f"it is not timed: errors of the gradients are {cell['errors']}"}, {}, {}
    ways = {"peft": "peft", way: way, "again": way}
    return cell, *take_turns({who: Model(kind, regime, base, ids, dropout) for who, kind in ways.items()}, seconds)


def start(kind: str, options: argparse.Namespace) -> dict:
    """What the JSON holds before anything is measured."""
    sizes, _ = TINY if options.quick else SMALL
    state: dict = {"kind": kind, **environment(torch.device("cpu")), "quick": options.quick}
    return state | {"rank": RANK, "llama": sizes}


def fill(
    state: dict,
    options: argparse.Namespace,
    wanted: Iterable[tuple[str, float]],
    step_cell: Callable[..., dict],
    describe: Callable[[dict], str],
) -> dict:
    """Measure a cell for every (regime, dropout); what is there so far is written after each."""
    size = TINY if options.quick else SMALL
    seconds = 0.05 if options.quick else options.seconds
    state["cells"] = []
    for name, dropout in wanted:
        state["cells"].append(step_cell(name, dropout, *size, seconds))
        gpu_state.write(options.output, state)
        print(describe(state["cells"][-1]), file=sys.stderr, flush=True)
    return state


def spread_of(ratio: dict) -> str:
    return f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"


def main(
    description: str,
    file: str,
    run: Callable[[argparse.Namespace], dict],
    sections: Callable[[dict, str], list[str]],
    arguments: list[str] | None,
) -> None:
    """The command line of both scripts; the JSON goes to ``file`` of ``bench/results`` if nothing else is said."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: shows that it runs")
    parser.add_argument("--seconds", type=float, default=40.0, help="of rounds per regime and dropout (default: 40)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own)")
    default = Path(__file__).parent / "results" / file
    parser.add_argument("--output", type=Path, default=default, help=f"default: bench/results/{file}")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    state = run(options)
    print("\n".join(sections(state, options.output.name)))
    print(f"wrote {options.output}", file=sys.stderr)
