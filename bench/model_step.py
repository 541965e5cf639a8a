"""One training step of a Llama with LoRA on all seven linears of every layer: seconds, tokens per second, peak memory.

    python bench/model_step.py --output bench/results/model-step.json    Llama-3.2-1B's dimensions; on a CPU a tiny one
    python bench/model_step.py --quick                                   a tiny one, two rounds

The model is built from a configuration of transformers, with random weights and random tokens: nothing is loaded. A
step is forward, backward and AdamW on what trains. The ways take turns, in an order drawn anew for every round:

    frozen      no LoRA: forward, and backward to the embeddings' output; nothing trains. The floor
    peft        PEFT, float32 adapters (its default)
    patched     the same model after ``patch_peft``
    apply_lora  ``fused_lora.apply_lora``, float32 adapters
    full        every weight trains

First the logits and the adapters' gradients of a step are held to the accuracy rule: against PEFT's in a wider dtype,
the error of ours is at most twice that of PEFT as it is. A way that breaks it is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.metadata
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import gpu_state
import torch
from gpu_timing import paired, rounds_for, spread
from measure import environment
from model_sections import sections, summary
from torch import Tensor, nn

from fused_lora.accuracy import FACTOR

KIND = "fused-lora model step"
WAYS = ("frozen", "peft", "patched", "apply_lora", "full")
OURS = ("patched", "apply_lora")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 16, 32
_LR = 1e-6  # so small that the rounds do not change what is measured
_CHECKED_TOKENS = 256
__all__ = ["KIND", "main", "sections", "summary"]


def llama(tiny: bool, device: torch.device) -> nn.Module:
    """A Llama with random weights: the dimensions of Llama-3.2-1B in bfloat16, or a tiny one in float32."""
    import transformers

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    return model.to(torch.float32 if tiny else torch.bfloat16).train()


def _peft(model: nn.Module, dropout: float) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=TARGETS)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:  # the same for every way; B as after some training, at zero the branch would do nothing
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return wrapped


def _patched(model: nn.Module, dropout: float) -> nn.Module:
    from fused_lora import patch_peft

    wrapped = _peft(model, dropout)
    report = patch_peft(wrapped)
    if report.fused != len(report.layers):
        raise RuntimeError(f"not every layer is fused:\n{report}")
    return wrapped


def _apply(model: nn.Module, dropout: float) -> nn.Module:
    from fused_lora import LoRAConfig, apply_lora, lora_layers

    factors = dict(_peft(copy.deepcopy(model), dropout).named_parameters())
    config = LoRAConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=TARGETS)
    apply_lora(model, config, adapter_dtype=torch.float32)
    for name, layer in lora_layers(model):
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            getattr(layer, ours).data.copy_(factors[f"base_model.model.{name}.{theirs}.default.weight"])
    return model


def _full(model: nn.Module, dropout: float) -> nn.Module:
    return model


def _frozen(model: nn.Module, dropout: float) -> nn.Module:
    return model.requires_grad_(False)


BUILD: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    "frozen": _frozen, "peft": _peft, "patched": _patched, "apply_lora": _apply, "full": _full,
}  # fmt: skip


class Way:
    """One model and its step on the same tokens as all others."""

    def __init__(self, name: str, base: nn.Module, ids: Tensor, dropout: float):
        self.model = BUILD[name](copy.deepcopy(base), dropout).train()
        self.ids = ids
        self.whole = name == "full"
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        fused = ids.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.trained, lr=_LR, fused=fused) if self.trained else None
        self.peak_bytes: int | None = None

    def checkpointing(self, on: bool) -> None:
        newer = hasattr(self.model, "activation_checkpointing_enable")  # a later name of transformers for the same
        name = f"{'activation' if newer else 'gradient'}_checkpointing"
        if on:
            getattr(self.model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
        else:
            getattr(self.model, f"{name}_disable")()

    def forward(self) -> Any:
        """Loss and logits; the embeddings' output needs a gradient, as in a model that goes on below, but in "full"."""
        if self.whole:
            return self.model(input_ids=self.ids, labels=self.ids)
        embedded = self.model.get_input_embeddings()(self.ids).detach().requires_grad_()
        return self.model(inputs_embeds=embedded, labels=self.ids)

    def step(self) -> None:
        self.forward().loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def outcome(self) -> dict[str, Tensor]:
        """The loss, the logits and the adapters' gradients, one behind the other in the order of their names."""
        out = self.forward()
        out.loss.backward()
        named = [(_neutral(name), p) for name, p in self.model.named_parameters() if p.requires_grad]
        gradients = [p.grad.flatten() for _, p in sorted(named, key=lambda pair: pair[0])]
        for parameter in self.trained:
            parameter.grad = None
        return {"loss": out.loss.detach(), "logits": out.logits.detach(), "gradients": torch.cat(gradients)}

    def seconds(self) -> float:
        start = perf_counter()
        self.step()
        if self.ids.device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - start

    def peak(self) -> int | None:
        """The most memory a step takes beyond the weights and AdamW's moments; None on a CPU."""
        if self.ids.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def static_bytes(self) -> int:
        """Weights and AdamW's moments."""
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        moments = sum(t.nbytes for values in state for t in values.values() if isinstance(t, Tensor))
        return moments + sum(p.nbytes for p in self.model.parameters())


def _neutral(name: str) -> str:
    """The same name for an adapter's parameter, PEFT's or ours."""
    name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
    return name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The loss, and for logits and gradients ‖found - truth‖ / ‖truth‖."""
    relative = {"loss": found["loss"].item()}
    for name in ("logits", "gradients"):
        wide = truth[name].double()
        relative[name] = ((found[name].double() - wide).norm() / wide.norm()).item()
    return relative


def disagreement(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """Why a way breaks the accuracy rule beside PEFT; "" where it holds."""
    for name in ("logits", "gradients"):
        if not ours[name] <= FACTOR * theirs[name]:
            return f"its {name} are off by {ours[name]:.1e} of their norm, PEFT's by {theirs[name]:.1e}"
    return ""


@contextlib.contextmanager
def leaving_out(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Inside, what a way raises goes into ``left_out`` and no further.

    PEFT may not be installed, memory may not suffice, a launch may fail: the rest is still worth timing.
    """
    try:
        yield
        return
    except Exception as error:
        left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    with contextlib.suppress(RuntimeError):  # where the device is lost
        torch.cuda.empty_cache()


def build(
    base: nn.Module, ids: Tensor, dropout: float, left_out: dict[str, str], wanted: tuple[str, ...] = WAYS
) -> dict[str, Way]:
    """The ways that can be built; why the others cannot goes into ``left_out``."""
    ways = {}
    for name in wanted:
        if name not in left_out:
            with leaving_out(name, left_out):
                ways[name] = Way(name, base, ids, dropout)
    return ways


def agree(base: nn.Module, ids: Tensor, left_out: dict[str, str]) -> dict[str, dict[str, float]]:
    """Errors of one step at dropout 0, per way; a way that breaks the rule goes into ``left_out``."""
    few = ids[:1, :_CHECKED_TOKENS]
    ways = build(base, few, 0.0, left_out, ("peft", "patched", "apply_lora"))
    found: dict[str, dict[str, float]] = {}
    if "peft" in ways:
        with leaving_out("the check", left_out):
            wide = copy.deepcopy(base).to(torch.float64 if base.dtype == torch.float32 else torch.float32)
            truth = Way("peft", wide, few, 0.0).outcome()
            for name, way in ways.items():
                with leaving_out(name, left_out):
                    found[name] = errors(way.outcome(), truth)
    for name in [name for name in OURS if name not in left_out]:
        compared = "peft" in found and name in found
        if why := disagreement(found[name], found["peft"]) if compared else "there is no result of PEFT beside it":
            left_out[name] = f"it is not timed: {why}"
    return found


def measure(ways: dict[str, Way], seconds: float, tokens: int, left_out: dict[str, str]) -> dict[str, object]:
    """Rounds in which every way takes one step; seconds, ratios within a round, memory."""
    first, peaks = {}, {}
    for name, way in ways.items():
        with leaving_out(name, left_out):
            way.step()
            peaks[name] = way.peak()
            first[name] = way.seconds()
    shuffle, names = random.Random(0).shuffle, list(first)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()  # a collection in the middle of a step would be timed
    try:
        for _ in range(rounds_for(sum(first.values()), seconds)):
            shuffle(names)
            for name in [name for name in names if name not in left_out]:
                with leaving_out(name, left_out):
                    times[name].append(ways[name].seconds())
    finally:
        gc.enable()
    times = {name: values for name, values in times.items() if name not in left_out}
    against = {
        f"vs_{other}": {name: paired(times, name, other) for name in times if name != other}
        for other in ("frozen", "peft")
        if other in times
    }
    took = {name: spread(values) for name, values in times.items()}
    speed = {name: round(tokens / value["median"], 1) for name, value in took.items()}
    static = {name: ways[name].static_bytes() for name in times}
    return {
        "seconds": took, "tokens_per_second": speed, **against, "peak_bytes": {n: peaks[n] for n in times},
        "static_bytes": static,
    }  # fmt: skip


def run(options: argparse.Namespace) -> dict:
    """Measure; what is there so far is written after every cell."""
    start, device = time.time(), torch.device(options.device)
    tiny = options.quick or device.type != "cuda"
    base = llama(tiny, device)
    shape = (2, 24) if tiny else (options.batch, options.length)
    ids = torch.randint(0, base.config.vocab_size, shape, generator=torch.Generator().manual_seed(2)).to(device)
    state: dict = {"kind": KIND, **environment(device), "transformers": importlib.metadata.version("transformers")}
    state |= {"commit": state["commit"] or os.environ.get("COMMIT"), "quick": options.quick}
    state |= {"batch": shape[0], "length": shape[1]}
    state |= {"model": "Llama, tiny" if tiny else "Llama, the dimensions of Llama-3.2-1B", "rank": RANK}
    state |= {"dtype": str(base.dtype).removeprefix("torch."), "left_out": {}, "checked": {}, "cells": []}
    gpu_state.write(options.output, state)
    state["checked"] = agree(base, ids, state["left_out"])
    gpu_state.write(options.output, state)
    seconds = 0.02 if options.quick else options.seconds / 6
    for dropout in (0.0, 0.05):
        ways = build(base, ids, dropout, state["left_out"])
        for checkpointing in (False, True):
            if time.time() - start > options.seconds and not options.quick:
                state["left_out"][f"dropout {dropout:g}, checkpointing {checkpointing}"] = "the time was up"
                continue
            for way in ways.values():
                way.checkpointing(checkpointing)
            left_out: dict[str, str] = {}
            cell = measure(ways, seconds, ids.numel(), left_out)
            state["cells"].append({"dropout": dropout, "checkpointing": checkpointing, **cell, "left_out": left_out})
            gpu_state.write(options.output, state)
            print(describe(state["cells"][-1]), file=sys.stderr, flush=True)
        del ways
    gpu_state.write(options.output, state)
    return state


def describe(cell: dict) -> str:
    """One line on a finished cell."""
    how = f"dropout {cell['dropout']:g}, checkpointing {'on' if cell['checkpointing'] else 'off'}"
    taxes = ", ".join(f"{name} {ratio['median']:.3f}" for name, ratio in cell.get("vs_frozen", {}).items())
    return f"{how}: time / frozen: {taxes}"


def shortfall(state: dict) -> str:
    """Why a finished run is no success; "" where it is one."""
    timed = [cell["seconds"].keys() for cell in state["cells"]]
    if not any(timed):
        return "nothing was timed"
    missing = [name for name in OURS if not all(name in names for names in timed)]
    return f"left out: {', '.join(missing)}" if missing else ""


def main(arguments: list[str] | None = None) -> int:
    """The exit code is 1 where nothing was timed or a way of ours was left out of a cell."""
    parser = argparse.ArgumentParser(description="Training steps of a Llama with LoRA on every linear layer.")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: shows that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4, help="sequences (default: 4; 2 of the tiny model)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default: 2048; tiny: 24)")
    parser.add_argument("--seconds", type=float, default=300.0, help="of rounds and steps together (default: 300)")
    default = Path(__file__).parent / "results" / "model-step.json"
    parser.add_argument("--output", type=Path, default=default, help="default: bench/results/model-step.json")
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    state = run(options)
    for name, reason in state["left_out"].items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    print(f"wrote {options.output}", file=sys.stderr)
    if why := shortfall(state):
        print(f"failed: {why}")
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())
