"""What was found about an adapter, in words for a plain terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_SHOWN = 20  # of one kind in an error's message

# In the order in which they are listed.
KINDS = {
    "file": "what is not there, broken, or not to be trusted",
    "config": "what the config asks for cannot be done, or contradicts the weights",
    "missing": "what should be there and is not",
    "extra": "tensors that belong to nothing here",
    "base weight": "tensors that would overwrite weights of the base model",
    "shape": "tensors of another shape",
    "rank": "ranks that do not agree",
    "scale": "scales that do not agree",
    "dtype": "tensors of a dtype that cannot be loaded",
    "values": "NaN or infinity",
    "note": "worth knowing",
}
BLOCKING = tuple(kind for kind in KINDS if kind != "note")


class Finding(NamedTuple):
    """Something wrong, or worth knowing: ``kind`` of KINDS, ``where`` a file, a key in it, a module or a field."""

    kind: str
    where: str
    detail: str

    @property
    def blocks(self) -> bool:
        """Whether load_adapter refuses because of it."""
        return self.kind in BLOCKING


class AdapterLayer(NamedTuple):
    """One layer that the file has tensors for and the model a place."""

    name: str
    rank: int
    scale: float


@dataclass(frozen=True)
class AdapterReport:
    """What :func:`fused_lora.check_adapter` found; ``print`` it.

    ``layers``: those that fit; ``faulty``: those that have a place, and a finding because of which they do not fit;
    ``unmatched``: names of layers in the file that the model has no place for; ``against``: what the adapter was
    checked against. ``ok`` is False where ``load_adapter`` would refuse.
    """

    directory: str
    against: str
    layers: tuple[AdapterLayer, ...]
    faulty: tuple[AdapterLayer, ...]
    unmatched: tuple[str, ...]
    dtypes: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not any(finding.blocks for finding in self.findings)

    def __str__(self) -> str:
        placed = (*self.layers, *self.faulty)
        total = len(placed) + len(self.unmatched)
        fit = f"{total} layers" if total == len(self.layers) else f"{len(self.layers)} of {total} layers fit"
        ranks = _values(str(layer.rank) for layer in sorted(placed, key=lambda layer: layer.rank))
        scales = _values(f"{layer.scale:g}" for layer in sorted(placed, key=lambda layer: layer.scale))
        lines = [
            f"adapter {self.directory}, checked against {self.against}",
            f"  {fit}; rank {ranks}; scale {scales}; {_values(self.dtypes)}",
        ]
        for kind, meaning in KINDS.items():
            found = [finding for finding in self.findings if finding.kind == kind]
            if found:
                lines.append(f"  {kind} ({len(found)}): {meaning}")
                lines += [f"    {finding.where}: {finding.detail}" for finding in found]
        lines.append("  ok: nothing is wrong" if self.ok else "  NOT OK: load_adapter refuses it")
        return "\n".join(lines)


def _values(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words)) or "none"


def list_keys(keys: Sequence[str]) -> str:
    """The keys for a message, not more than a reader takes in."""
    shown = ", ".join(keys[:_SHOWN])
    return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more, which check_adapter lists"


def list_findings(findings: Iterable[Finding]) -> str:
    """The findings for a message, kind by kind."""
    by_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for finding in findings:
        by_kind[finding.kind].append(f"{finding.where} ({finding.detail})")
    return "; ".join(f"{len(found)} {kind}: {list_keys(found)}" for kind, found in by_kind.items() if found)
