"""LoRAConfig: which layers get LoRA and of what kind. Field names and their reading are PEFT's."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .checks import check_switch
from .layer import check_init, lora_scale

ALL_LINEAR = "all-linear"
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which modules get LoRA, and its rank, scale, dropout and start.

    Args:
        r: rank.
        lora_alpha: the scale is lora_alpha / r, or lora_alpha / √r with ``use_rslora``.
        target_modules: a list of names, each matched against whole module names or their last components
            (``"q_proj"``, ``"self_attn.q_proj"``); or a regular expression that must match a whole module name; or
            ``"all-linear"``: every nn.Linear and Conv1D of transformers, except the output head where the model names
            it (``get_output_embeddings()``).
        exclude_modules: names or a regular expression, read in the same way; exclusion wins.
        lora_dropout: probability of dropping an element of a layer's input before lora_a. Embeddings have none.
        use_rslora: rank-stabilised scale.
        use_dora: weight-decomposed LoRA, for linear layers; see :class:`fused_lora.LoRALinear`.
        rank_pattern, alpha_pattern: other values of r and lora_alpha for some modules. A key is a regular expression
            that must match a module name or its last components; the first key that matches counts.
        layers_to_transform: an index or indices: of the modules that target_modules (a list) names, only those inside
            these layers; a module that is named in full counts anywhere. A layer's index is the first number in a
            module's name, as in ``model.layers.3.mlp.up_proj``.
        layers_pattern: name or names of the list that holds the layers (``"layers"``, ``"h"``): needed where the first
            number is not the right one, or where that list is the first part of the name.
        bias: which biases train: "none", "all" of the model, or "lora_only", those of the layers with LoRA.
        init_lora_weights: True: zero delta, Kaiming-uniform lora_a. "gaussian": zero delta, normal lora_a. False: both
            factors random, so the model does not start as the base model.

    Raises:
        TypeError, ValueError: a value outside what is said above; the message names it.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Iterable[str] | None = None
    exclude_modules: str | Iterable[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Iterable[int] | None = None
    layers_pattern: str | Iterable[str] | None = None
    bias: str = "none"
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        put = object.__setattr__
        lora_scale(self.r, self.lora_alpha, self.use_rslora)
        put(self, "lora_dropout", _probability(self.lora_dropout))
        for label in ("use_rslora", "use_dora"):
            put(self, label, check_switch(getattr(self, label), label))
        put(self, "init_lora_weights", check_init(self.init_lora_weights))
        if self.bias not in _BIASES:
            raise ValueError(f"bias must be one of {', '.join(_BIASES)}, got {self.bias!r}")
        put(self, "target_modules", _names_or_regex("target_modules", self.target_modules))
        put(self, "exclude_modules", _names_or_regex("exclude_modules", self.exclude_modules))
        if not self.target_modules:
            raise ValueError(
                "target_modules is empty: give a list of module names such as ['q_proj', 'v_proj'], a regular "
                "expression, or 'all-linear'"
            )
        put(self, "rank_pattern", _table("rank_pattern", self.rank_pattern))
        put(self, "alpha_pattern", _table("alpha_pattern", self.alpha_pattern))
        for pattern, r in self.rank_pattern.items():
            _compile("rank_pattern", pattern)
            lora_scale(r, self.lora_alpha, self.use_rslora)
        for pattern, lora_alpha in self.alpha_pattern.items():
            _compile("alpha_pattern", pattern)
            lora_scale(self.r, lora_alpha, self.use_rslora)
        self._check_layers()

    def _check_layers(self) -> None:
        layers, patterns = self.layers_to_transform, self.layers_pattern or ()
        if layers is not None:
            layers = tuple(layers) if isinstance(layers, Iterable) else (layers,)
        patterns = tuple(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else (patterns,)
        if patterns and not layers:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, the layers' indices")
        if layers and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform goes with a list of target_modules, not with {self.target_modules!r}: put the "
                "layers into the regular expression"
            )
        for index in layers or ():
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise ValueError(f"layers_to_transform must hold indices from 0, got {index!r}")
        for pattern in patterns:
            _compile("layers_pattern", pattern)
        object.__setattr__(self, "layers_to_transform", layers or None)
        object.__setattr__(self, "layers_pattern", patterns)

    def targets(self, name: str) -> bool:
        """Whether target_modules (other than "all-linear") and layers_to_transform choose the module of this name."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        wanted = self.target_modules or ()
        return name in wanted or (_named(name, wanted) and self._in_layers(name))

    def excludes(self, name: str) -> bool:
        """Whether exclude_modules takes the module of this name out again."""
        if isinstance(self.exclude_modules, str):
            return re.fullmatch(self.exclude_modules, name) is not None
        return _named(name, self.exclude_modules or ())

    def rank(self, name: str) -> int:
        """The rank of the module of this name."""
        return self.rank_pattern.get(_first_match(self.rank_pattern, name), self.r)

    def alpha(self, name: str) -> float:
        """lora_alpha of the module of this name."""
        return self.alpha_pattern.get(_first_match(self.alpha_pattern, name), self.lora_alpha)

    def unused(self, names: Iterable[str], chosen: Iterable[str]) -> list[tuple[str, str]]:
        """(field, entry) for every name and pattern that had no effect; ``chosen`` of ``names`` got LoRA."""
        names, chosen = list(names), list(chosen)
        unused = []
        for label, value in (("target_modules", self.target_modules), ("exclude_modules", self.exclude_modules)):
            listed = () if value is None or isinstance(value, str) else value
            unused += [(label, entry) for entry in listed if not any(_named(name, (entry,)) for name in names)]
        if isinstance(self.exclude_modules, str) and not any(map(self.excludes, names)):
            unused.append(("exclude_modules", self.exclude_modules))
        for label, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            hit = {_first_match(patterns, name) for name in chosen}
            unused += [(label, pattern) for pattern in patterns if pattern not in hit]
        return unused

    def _in_layers(self, name: str) -> bool:
        if self.layers_to_transform is None:
            return True
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in self.layers_pattern or ()]
        for expression in expressions or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
            match = re.match(expression, name)
            if match:
                return int(match["index"]) in self.layers_to_transform  # type: ignore[operator]
        return False


def _names_or_regex(label: str, value: str | Iterable[str] | None) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value.lower() == ALL_LINEAR and label == "target_modules":
            return ALL_LINEAR
        _compile(label, value)
        return value
    if not isinstance(value, Iterable):
        raise TypeError(f"{label} must be a string or a list of strings, got {value!r}")
    names = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{label} must be a string or hold strings that are not empty, got {name!r}")
    return names


def _probability(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"lora_dropout must be a number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"lora_dropout must be in [0, 1], got {value}; 0.0 is no dropout")
    return float(value)


def _table(label: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{label} must be a dict from regular expressions to numbers, got {value!r}")
    return dict(value or {})


def _compile(label: str, pattern: str) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{label} must hold regular expressions, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{label}: {pattern!r} is not a regular expression: {error}") from None


def _named(name: str, suffixes: Iterable[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def _first_match(patterns: Iterable[str], name: str) -> str:
    """The first pattern that matches the name or its last components; else the name itself, as PEFT has it."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), name)
