"""What was measured on a chip, as data: which form and tile of each piece won, and how a call finds its entry.

M rows   N out_features   K in_features   R rank

``tuned.json`` beside this file is written by ``python bench/gpu.py --tune`` and read once, when a GPU is first asked
for its facts. The table of a chip is part of those facts, so the plan stays a pure function of them.

Which table: that of the chip's own name. A chip without one takes the table of a chip of the same compute capability,
and from it only what won by ``KIN_GAIN``: its multiprocessors are the same, its memory may not be. Any other chip, and
any call far from everything measured, follows the plan's rule.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .kernels import tiles

VERSION = 1
KIN_GAIN = 1.1  # from another chip's table only what beat the rule by a tenth there
PATH = Path(__file__).with_name("tuned.json")

# What a piece's time depends on; and how far, as a factor, an entry may lie from the call it decides.
_DIMENSIONS = {"shrink": "MK", "grad_a": "MK", "grad_b": "MN", "expand": "MNK", "grad_x": "MNK", "strategy": "MNK"}
_REACH = {"M": 4.0, "N": 2.0, "K": 2.0}
_MANY_ROWS = 8192  # from here on more rows are only more waves of the same programs
_MASKED = ("shrink", "grad_a", "grad_x", "strategy")  # these draw the dropout mask
_TILES = {"triton": tiles.SkinnyTile, "beta1": tiles.LowrankTile, "pointer": tiles.GemmTile}
_TILES["descriptor"] = tiles.GemmTile


@dataclass(frozen=True)
class Entry:
    """What won for one piece (or for the choice of ``"strategy"``) at one size.

    ``tile``: None leaves the tile to ``kernels/tiles.py``. ``rule_seconds``: the time of what the plan does without a
    table, in the same run.
    """

    piece: str
    regime: str
    M: int
    N: int
    K: int
    R: int
    dropout: bool
    form: str
    tile: Any
    seconds: float
    rule_seconds: float

    @property
    def gain(self) -> float:
        """How many times faster than the rule."""
        return self.rule_seconds / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the JSON."""
        return {**vars(self), "tile": _plain(self.tile)}


@dataclass(frozen=True)
class Tuned:
    """The table of one chip. ``kin``: it was measured on another chip of the same capability."""

    chip: str
    source: str
    entries: tuple[Entry, ...] = field(repr=False)
    kin: bool = False

    def find(self, piece: str, problem: tiles.Problem) -> Entry | None:
        """The entry nearest to ``problem``, by the largest factor in any size; None where none is near enough."""
        sizes = _DIMENSIONS[piece]
        if any(getattr(problem, size) == 0 for size in sizes):
            return None
        alike = [entry for entry in self.entries if _comparable(entry, piece, problem)]
        largest = max((entry.M for entry in alike), default=0)
        rows = min(problem.M, largest) if largest >= _MANY_ROWS else problem.M

        def factors(entry: Entry) -> list[float]:
            asked = {"M": rows, "N": problem.N, "K": problem.K}
            return [max(asked[size] / getattr(entry, size), getattr(entry, size) / asked[size]) for size in sizes]

        near = [e for e in alike if all(f <= _REACH[size] for f, size in zip(factors(e), sizes, strict=True))]
        nearest = min(near, key=lambda entry: sorted(factors(entry), reverse=True), default=None)
        return None if nearest is None or (self.kin and nearest.gain < KIN_GAIN) else nearest


def _comparable(entry: Entry, piece: str, problem: tiles.Problem) -> bool:
    return (
        entry.piece == piece
        and entry.regime == problem.regime
        and _rank_class(entry.R) == _rank_class(problem.R)
        and (piece not in _MASKED or entry.dropout == problem.dropout)
    )


def _rank_class(rank: int) -> int:
    """Ranks that fill the same tile: up to 16, 32, 64, 128, 256, more."""
    return max(math.ceil(math.log2(rank)), 4)


def tile_refusal(piece: str, form: str, tile: Any, problem: tiles.Problem, chip: tiles.Chip) -> str:
    """Why a tile from a table cannot run a piece in a form; "" where it can."""
    if piece == "grad_b" and form == "triton":
        if not isinstance(tile, tiles.GradBTile):
            return f"{tile} is no tile of grad_b"
        parts = [("both", tile.both), ("shrink", tile.ds), ("outer", tile.db)]
    elif not isinstance(tile, _TILES.get(form, ())):
        return f"{tile} is no tile of the form {form}"
    elif isinstance(tile, tiles.GemmTile):
        if tile.form != form:
            return f"its tile is of the form {tile.form}"
        return _too_much(tiles.gemm_shared_bytes(tile, problem), chip)
    else:
        parts = [("shrink" if piece == "shrink" else "outer", tile)] if form == "triton" else []
    refusals = (
        _too_much(tiles.skinny_shared_bytes(part, problem, kernel, chip), chip) for kernel, part in parts if part
    )
    return next(filter(None, refusals), "")


def _too_much(needed: int, chip: tiles.Chip) -> str:
    if needed <= chip.shared_limit:
        return ""
    return f"its tile takes {needed} bytes of shared memory, the chip has {chip.shared_limit}"


def fit(entry: Entry, problem: tiles.Problem, chip: tiles.Chip) -> Any:
    """The entry's tile for this problem: as many programs as were measured, however its blocks divide this size."""
    tile, measured = entry.tile, replace(problem, M=entry.M, N=entry.N, K=entry.K, R=entry.R)
    if isinstance(tile, tiles.GradBTile):
        kernels = (("both", tile.both), ("shrink", tile.ds), ("outer", tile.db))
        return tiles.GradBTile(*(part and _resplit(part, k, "N", measured, problem) for k, part in kernels))
    if isinstance(tile, tiles.SkinnyTile):
        return _resplit(tile, "shrink" if entry.piece == "shrink" else "outer", "K", measured, problem)
    if isinstance(tile, tiles.GemmTile):
        tile = replace(tile, programs=chip.num_sms if tile.form == "descriptor" else 0)
        return tile if problem.M == measured.M else replace(tile, split=1 if problem.M > 64 else tile.split)
    return tile


def _resplit(tile: Any, kernel: str, columns: str, measured: tiles.Problem, asked: tiles.Problem) -> Any:
    def blocks(problem: tiles.Problem) -> int:
        length, block = (problem.M, tile.block_m) if kernel == "shrink" else (getattr(problem, columns), tile.block_c)
        return max(tiles.cdiv(length, block) * tiles.cdiv(problem.R, tile.block_r), 1)

    contraction = tiles.cdiv(getattr(asked, columns), tile.block_c)
    if kernel != "shrink":
        contraction = tiles.cdiv(asked.M, tile.block_m)
    split = round(tile.split * blocks(measured) / blocks(asked))
    return replace(tile, split=max(1, min(split, contraction)))


def _plain(tile: Any) -> Any:
    """A tile as nested dicts."""
    if isinstance(tile, tiles.GradBTile):
        return {name: _plain(part) for name, part in vars(tile).items()}
    return None if tile is None else dict(vars(tile))


def _tile(piece: str, form: str, fields: dict[str, Any] | None) -> Any:
    if fields is None:
        return None
    if piece == "grad_b":
        return tiles.GradBTile(**{name: part and tiles.SkinnyTile(**part) for name, part in fields.items()})
    return _TILES[form](**fields)


def entry_of(fields: dict[str, Any]) -> Entry:
    """An entry as it stands in the JSON (``Entry.as_dict``)."""
    return Entry(**{**fields, "tile": _tile(fields["piece"], fields["form"], fields["tile"])})


def read(path: Path = PATH) -> tuple[dict[str, Any], ...]:
    """The chips of a table as they stand in the JSON.

    Raises:
        ValueError: the file is of another version.
    """
    content = json.loads(path.read_text())
    if content.get("version") != VERSION:
        raise ValueError(f"{path} has version {content.get('version')}, this fused-lora reads {VERSION}: measure again")
    return tuple(content["chips"])


def from_dict(chip: dict[str, Any], kin: bool = False) -> Tuned:
    """The table of one chip of a JSON."""
    return Tuned(chip["name"], chip["source"], tuple(map(entry_of, chip["entries"])), kin)


@functools.cache
def table_for(name: str, capability: tuple[int, int], path: Path = PATH) -> Tuned | None:
    """The table for a chip: its own, else that of the first chip of its capability, else None."""
    chips: Sequence[dict[str, Any]] = read(path)
    for chip in chips:
        if chip["name"] == name:
            return from_dict(chip)
    for chip in chips:
        if tuple(chip["capability"]) == capability:
            return from_dict(chip, kin=True)
    return None
