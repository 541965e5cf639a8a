"""``fused-lora demo``: fine-tune a network with LoRALinear on real images and check what the library claims.

Every number printed is computed in the run. Needs ``pip install 'fused-lora[demo]'``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import digits
from .adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from .adapters import AdapterError, load_adapter, save_adapter
from .dropout import check_p
from .modules import LoRALinear

if TYPE_CHECKING:
    from .demo_report import Report

FIGURE_FILE = "fused-lora-demo.png"
BASE_NAME = "fused-lora demo"  # in the adapter's config and the figure: tells the demo's own files from a user's
# (name on the package index, import name)
_PACKAGES = (
    ("scikit-learn", "sklearn"),
    ("rich", "rich"),
    ("matplotlib", "matplotlib"),
    ("safetensors", "safetensors"),
)


@dataclass(frozen=True)
class Settings:
    """What the command line chooses; :func:`check` them before :func:`run`."""

    seed: int = 0
    digit: int = 8
    rank: int = 8
    dropout: float = 0.05
    device: str = "auto"
    epochs: int | None = None  # of fine-tuning; None is the usual number, fewer with ``quick``
    out: Path = Path("demo-output")
    quick: bool = False

    @property
    def lora_alpha(self) -> float:
        return 2.0 * self.rank

    @property
    def base_epochs(self) -> int:
        return 3 if self.quick else 10

    @property
    def tuning_epochs(self) -> int:
        return self.epochs or (8 if self.quick else 12)

    @property
    def timing_rounds(self) -> int:
        return 5 if self.quick else 40

    def torch_device(self) -> torch.device:
        """See :func:`usable_device`."""
        return usable_device(self.device)


def usable_device(name: str) -> torch.device:
    """The device asked for; ``auto`` is a GPU where there is one, else the CPU.

    Raises:
        ValueError: a device that torch does not know, that the demo does not run on, or that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"this does not run on {name!r}: use auto, cpu, cuda or cuda:0")
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"no {name!r} here, torch finds {gpus} GPUs: use auto or cpu")
    return device


def folder(text: str) -> Path:
    """The ``type`` of an option for argparse that names a folder.

    Raises:
        argparse.ArgumentTypeError: ``text`` is empty, which Path takes for the current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("a folder is needed, got '': the current one is .")
    return Path(text)


def check(settings: Settings) -> None:
    """Find what would stop the demo, before any work; makes the output folder.

    Raises:
        ValueError: a value out of range, an unusable device, or an output folder that holds somebody's files.
        ModuleNotFoundError: a package of the ``demo`` extra is missing.
        OSError: the output folder cannot be made.
    """
    if settings.rank < 1:
        raise ValueError(f"rank must be at least 1, got {settings.rank}")
    if settings.epochs is not None and settings.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {settings.epochs}")
    if not 0 <= settings.digit < digits.CLASSES:
        raise ValueError(f"digit must be 0 to {digits.CLASSES - 1}, got {settings.digit}")
    if not 0 <= settings.seed < 2**32:
        raise ValueError(f"seed must be 0 to {2**32 - 1}, got {settings.seed}")
    check_p(settings.dropout)
    settings.torch_device()
    missing = [name for name, module in _PACKAGES if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(f"the demo needs {', '.join(missing)}: pip install 'fused-lora[demo]'")
    if settings.out.exists() and not settings.out.is_dir():
        raise ValueError(f"out must be a folder, {settings.out} is a file: choose another with --out")
    there = _not_ours(settings.out)
    if there:
        raise ValueError(f"{there[0]} is not this demo's and stays as it is: choose another folder with --out")
    settings.out.mkdir(parents=True, exist_ok=True)


def run(settings: Settings) -> int:
    """Run the demo; 0 where every bit-identity claim holds, else 1. Call :func:`check` first."""
    from .demo_report import Report

    start = time.perf_counter()
    report = Report()
    device = settings.torch_device()
    torch.manual_seed(settings.seed)
    data = digits.load(settings.digit, settings.seed, device)
    report.introduction(device, settings.seed, settings.digit, data)

    base = digits.build_network(device)
    epochs = settings.base_epochs
    for _ in report.progress("training the base network", digits.train(base, data.base, epochs), epochs):
        pass
    base.requires_grad_(False)
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    base_logits = digits.logits(base, data.test)
    history = [digits.accuracies(base, data.test)]

    adapted = digits.with_lora(base, lambda linear: _fused(linear, settings))
    epochs = settings.tuning_epochs
    for _ in report.progress("fine-tuning with LoRA", digits.train(adapted, data.domain, epochs), epochs):
        history.append(digits.accuracies(adapted, data.test))
    figure = settings.out / FIGURE_FILE
    save_adapter(adapted, settings.out, base_model_name_or_path=BASE_NAME, overwrite=True)
    claims = check_claims(adapted, frozen, base_logits, data.test, settings.out)

    report.accuracies(settings.digit, data.test, history)
    report.parameters(digits.lora_layers(adapted))
    report.claims(claims)
    report.errors(digits.errors(adapted, data.domain, settings.dropout, settings.seed))
    report.step_times(_time_steps(report, base, data.domain, settings))
    report.figure(figure, BASE_NAME, settings.digit, history)
    report.line(
        f"\nWrote {settings.out / WEIGHTS_FILE}\n  and {figure}\nTotal time {time.perf_counter() - start:.1f} s"
    )
    return 0 if all(claims.values()) else 1


def _fused(linear: nn.Linear, settings: Settings) -> LoRALinear:
    return LoRALinear.from_linear(
        linear, r=settings.rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.dropout
    )


def _time_steps(report: Report, base: nn.Sequential, data: digits.Images, settings: Settings) -> list[list[float]]:
    """Seconds per training step, round by round: (fused, plain). On new layers, so the result stays as it is."""
    rank, alpha, dropout = settings.rank, settings.lora_alpha, settings.dropout
    fused = digits.with_lora(base, lambda linear: _fused(linear, settings))
    plain = digits.with_lora(
        base, lambda linear: digits.PlainLoRALinear(linear, r=rank, lora_alpha=alpha, lora_dropout=dropout)
    )
    rounds = settings.timing_rounds
    return list(report.progress("timing both LoRA layers", digits.step_times([fused, plain], data, rounds), rounds))


def check_claims(
    adapted: nn.Module, frozen: dict[str, Tensor], base_logits: Tensor, test: digits.Images, folder: Path
) -> dict[str, bool]:
    """Each claim of bit-identity and whether it holds.

    Args:
        adapted: the fine-tuned network.
        frozen: copies of the base network's parameters, made before fine-tuning.
        base_logits: the base network's outputs on ``test``.
        folder: where :func:`save_adapter` wrote the adapter.
    """
    state = adapted.state_dict()
    reloaded = _reload(folder, frozen, test.labels.device)
    return {
        f"{len(frozen)} frozen weights and biases are as before fine-tuning": all(
            torch.equal(state[name], tensor) for name, tensor in frozen.items()
        ),
        "with LoRA switched off the outputs are the base network's": _off_restores(adapted, test, base_logits),
        "the adapter file gives a fresh network the same outputs": torch.equal(
            digits.logits(reloaded, test), digits.logits(adapted, test)
        ),
    }


@torch.no_grad()
def _off_restores(adapted: nn.Module, test: digits.Images, base_logits: Tensor) -> bool:
    """Whether ``enabled = False`` gives the base outputs bit for bit, training (dropout) or not."""
    layers = digits.lora_layers(adapted).values()
    for layer in layers:
        layer.enabled = False
    restored = all(torch.equal(adapted.train(mode)(test.images), base_logits) for mode in (True, False))
    for layer in layers:
        layer.enabled = True
    return restored


def _reload(folder: Path, frozen: dict[str, Tensor], device: torch.device) -> nn.Sequential:
    """A new network over the base weights ``frozen``, with the adapter in ``folder``."""
    fresh = digits.build_network(device)
    fresh.load_state_dict(frozen)
    load_adapter(fresh, folder)
    return fresh


def _not_ours(folder: Path) -> list[Path]:
    """What the demo would overwrite in ``folder`` though it did not write it."""
    from .demo_report import drawn_by

    figure = folder / FIGURE_FILE
    adapter = [path for path in (folder / CONFIG_FILE, folder / WEIGHTS_FILE) if os.path.lexists(path)]
    try:
        ours = bool(adapter) and read_adapter(folder).config.get("base_model_name_or_path") == BASE_NAME
    except AdapterError:
        ours = False
    foreign = [] if ours else adapter
    return [*foreign, figure] if os.path.lexists(figure) and not drawn_by(figure, BASE_NAME) else foreign
