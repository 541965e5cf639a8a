"""What LoRA a model holds: its layers, their parameters, the counts, and a table of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .checks import check_module
from .layer import LoRALayer
from .parametrize import LoRAParametrization


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """(name, layer) of every LoRA layer in ``model``, each once.

    Raises:
        TypeError: not a module.
    """
    check_module(model)  # now, and not when the first layer is asked for
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer))


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """lora_a and lora_b (of DoRA, magnitude too) of every LoRA layer and LoRA parametrization, each once: what an
    optimizer takes (with ``bias="none"``).

    Raises:
        TypeError: not a module.
    """
    check_module(model)
    return _factors(model)


def _factors(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, LoRALayer):
            yield from module.trained()
        elif isinstance(module, LoRAParametrization):
            yield module.lora_a
            yield module.lora_b


class ParameterCount(NamedTuple):
    """Elements of all parameters, of those that train, and of the LoRA factors. A shared parameter counts once."""

    total: int
    trainable: int
    lora: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.total:,} parameters, {self.trainable:,} trainable ({share:.3g} %), {self.lora:,} of LoRA"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the elements of the model's parameters, see :class:`ParameterCount`.

    Raises:
        TypeError: not a module.
    """
    check_module(model)
    parameters = list(model.parameters())
    return ParameterCount(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(p.numel() for p in lora_parameters(model)),
    )


class LoRAReportRow(NamedTuple):
    """One LoRA layer. ``names``: all it has in the model; ``base``: the type of the layer it replaced."""

    names: tuple[str, ...]
    type: str
    base: str
    rank: int
    scale: float
    parameters: int


@dataclass(frozen=True)
class LoRAReport:
    """What :func:`lora_report` found. ``print`` it for a table."""

    rows: tuple[LoRAReportRow, ...]
    parameters: ParameterCount

    def __str__(self) -> str:
        table = [("module", "layer", "over", "rank", "scale", "parameters")]
        for row in self.rows:
            numbers = (str(row.rank), f"{row.scale:g}", f"{row.parameters:,}")
            table.append((" = ".join(row.names), row.type, row.base, *numbers))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for entries in table:
            padded = [e.ljust(w) if i < 3 else e.rjust(w) for i, (e, w) in enumerate(zip(entries, widths, strict=True))]
            lines.append("  ".join(padded).rstrip())
        return "\n".join([*lines, f"{len(self.rows)} LoRA layers; {self.parameters}"])


def lora_report(model: nn.Module) -> LoRAReport:
    """The LoRA layers of a model with rank, scale and size, and the totals; ``print`` it.

    Raises:
        TypeError: not a module.
    """
    rows = []
    for layer, names in _named(model).items():
        if isinstance(layer, LoRALayer):
            size = sum(p.numel() for p in layer.trained())
            kind = (type(layer).__name__, layer.base_type.__name__)
            rows.append(LoRAReportRow(tuple(names), *kind, layer.r, layer.scale, size))
    return LoRAReport(tuple(rows), count_parameters(model))


def _named(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all its names, in order.

    Raises:
        TypeError: not a module.
    """
    check_module(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names
