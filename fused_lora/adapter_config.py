"""adapter_config.json: what PEFT's fields say, read with types checked and no pattern run unbounded, and written.

A layer's rank is r or its rank_pattern, its scale lora_alpha / r or lora_alpha / √r.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .adapter_files import AdapterError
from .adapter_patterns import Pattern, first_match, suffix_matcher
from .layer import lora_scale

_LARGEST_RANK = 1 << 16
_KINDS = ("none", "all", "lora_only")
# Draw the factors another way and change nothing else; the others rewrite the base weight or are more than LoRA.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
# Fields without a say in what the loaded model computes.
_IDLE = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("fan_in_fan_out", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying", "runtime_config", "peft_type", "init_lora_weights"),
}
_SEE_PATCH = "PEFT loads it: PeftModel.from_pretrained, then fused_lora.patch_peft"


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of an adapter_config.json that say what a loaded model computes."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0
    bias: str = "none"
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()

    def ranks(self, names: Iterable[str]) -> dict[str, int]:
        """The rank of each module.

        Raises:
            PatternError: a pattern that cannot be matched in bounded time.
        """
        return _by_pattern(self.rank_pattern or {}, names, self.r)

    def alphas(self, names: Iterable[str]) -> dict[str, float]:
        """lora_alpha of each module. Raises as :meth:`ranks`."""
        return _by_pattern(self.alpha_pattern or {}, names, self.lora_alpha)

    def targets(self, names: Iterable[str], old: bool = False) -> set[str] | None:
        """The modules PEFT would put LoRA on, by this config; None where it names none.

        ``old``: as PEFT read layers_to_transform up to 0.18: the last number of a name counted, not the first, and the
        list of layers had to be inside something.

        Raises:
            PatternError: a pattern that cannot be matched in bounded time.
        """
        if self.target_modules is None:
            return None
        saved = [suffix_matcher(f"(?:{name})(?:\\..*)?") for name in self.modules_to_save]
        wanted, excluded = _selector(self.target_modules), _selector(self.exclude_modules or ())
        in_layers, whole = self._layer_filter(old), frozenset(self.target_modules)
        return {
            name
            for name in names
            if (wanted(name) and (in_layers is None or name in whole or in_layers(name)))
            and not excluded(name)
            and not any(matches(name) for matches in saved)
        }

    def _layer_filter(self, old: bool) -> Callable[[str], bool] | None:
        if isinstance(self.target_modules, str) or self.layers_to_transform in (None, ()):
            return None
        chosen = self.layers_to_transform
        indices = {chosen} if isinstance(chosen, int) else set(chosen or ())
        lists = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern or ()
        holders = [suffix_matcher(name) for name in lists]

        def inside(name: str) -> bool:
            parts = name.split(".")
            places = range(1, len(parts) - 1)
            for i in reversed(places) if old else places:
                # Without layers_pattern PEFT asks for two components before the index.
                named = any(holder(".".join(parts[:i])) for holder in holders) if holders else i > 1
                named = named and (i > 1 or not old)
                if named and parts[i].isdecimal():
                    return int(parts[i]) in indices
            return False

        return inside


def _selector(value: str | Sequence[str]) -> Callable[[str], bool]:
    if isinstance(value, str):
        return Pattern(value).matches
    whole, endings = frozenset(value), tuple(f".{name}" for name in value)
    return lambda name: name in whole or name.endswith(endings)


def _by_pattern(patterns: Mapping[str, Any], names: Iterable[str], default: Any) -> dict[str, Any]:
    find = first_match(patterns)
    values = list(patterns.values())
    places = {name: find(name) for name in names}
    return {name: default if place is None else values[place] for name, place in places.items()}


def parse_config(content: Mapping[str, Any], where: str) -> AdapterConfig:
    """The config in ``content``, the parsed JSON of the file ``where``.

    Raises:
        AdapterError: it is not of LoRA, a field has a wrong type or value, or asks for more than LoRA layers do; the
            message lists all of it.
    """
    kind = content.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{where}: peft_type must be 'LORA', got {kind!r}")
    faults = [fault for field, check in _CHECKS.items() if field in content and (fault := check(content[field]))]
    faults += [
        f"{field}={content[field]!r:.80} is more than LoRA layers do; {_SEE_PATCH}"
        for field in content
        if field not in _CHECKS and field not in _IDLE and content[field] not in (None, False, {}, [], "")
    ]
    init = content.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        faults.append(
            f"init_lora_weights={init!r:.80} rewrote the base weight or is a variant; convert it where it was trained: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if faults:
        raise AdapterError(f"{where} cannot be used: {'; '.join(faults)}")
    values: dict[str, Any] = {
        field: content[field] for field in AdapterConfig.__dataclass_fields__ if content.get(field) is not None
    }
    if isinstance(values.get("modules_to_save"), str):
        values["modules_to_save"] = (values["modules_to_save"],)
    values = {field: tuple(value) if isinstance(value, list) else value for field, value in values.items()}
    return AdapterConfig(**values)


def _check(field: str, wanted: str, test: Callable[[Any], bool]) -> Callable[[Any], str]:
    return lambda value: "" if test(value) else f"{field} must be {wanted}, got {value!r:.80}"


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) and name for name in value))


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_table(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(of, value.values())))


def _or_string(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) or test(value)


_RANK, _NAMES = f"an int from 1 to {_LARGEST_RANK}", "a list of names, a string or null"
_CHECKS: dict[str, Callable[[Any], str]] = {
    "r": _check("r", _RANK, _is_rank),
    "lora_alpha": _check("lora_alpha", "a finite number", _is_number),
    "use_rslora": _check("use_rslora", "true or false", lambda value: type(value) is bool),
    "use_dora": _check("use_dora", "true or false", lambda value: type(value) is bool),
    "lora_dropout": _check("lora_dropout", "from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "bias": _check("bias", f"one of {', '.join(_KINDS)}", lambda value: value in _KINDS),
    "target_modules": _check("target_modules", _NAMES, _or_string(_is_names)),
    "exclude_modules": _check("exclude_modules", _NAMES, _or_string(_is_names)),
    "rank_pattern": _check("rank_pattern", f"a table whose values are {_RANK}", _is_table(_is_rank)),
    "alpha_pattern": _check("alpha_pattern", "a table of finite numbers", _is_table(_is_number)),
    "layers_to_transform": _check(
        "layers_to_transform",
        "an index, a list of them or null",
        lambda value: value is None or _is_index(value) or (isinstance(value, list) and all(map(_is_index, value))),
    ),
    "layers_pattern": _check("layers_pattern", _NAMES, _or_string(_is_names)),
    "modules_to_save": _check("modules_to_save", _NAMES, _or_string(_is_names)),
}


@dataclass(frozen=True)
class LayerSettings:
    """What a layer with LoRA contributes to the config."""

    r: int
    scale: float
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    lora_dropout: float | None  # None where the layer has none to set
    transposed: bool


def describe(
    layers: Mapping[str, LayerSettings],
    names: Iterable[str],
    bias: str,
    modules_to_save: Sequence[str],
    base: str | None,
) -> dict[str, Any]:
    """The adapter_config.json of these layers, in PEFT's fields, with patterns for what is not the same in all.

    ``names`` are all modules of the base model: the targets must choose the layers and none of the others.
    """
    rslora = all(layer.use_rslora for layer in layers.values())
    alphas = {name: _alpha(layer, rslora) for name, layer in layers.items()}
    ranks = {name: layer.r for name, layer in layers.items()}
    r, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    dropouts = [layer.lora_dropout for layer in layers.values() if layer.lora_dropout is not None]
    return {
        "alpha_pattern": {k: _number(v) for k, v in _exceptions(alphas, alpha).items()},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": bias,
        "exclude_modules": None,
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _number(alpha),
        "lora_bias": False,
        "lora_dropout": float(_commonest(dropouts)) if dropouts else 0.0,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": _exceptions(ranks, r),
        "revision": None,
        "target_modules": _target_modules(layers, [*names], modules_to_save),
        "task_type": None,
        "use_dora": all(layer.use_dora for layer in layers.values()),
        "use_rslora": rslora,
    }


def _alpha(layer: LayerSettings, rslora: bool) -> float:
    """The layer's own lora_alpha, or where its scale was set to something else, the one that gives this scale."""
    if lora_scale(layer.r, layer.lora_alpha, rslora) == layer.scale:
        return layer.lora_alpha
    return alpha_of(layer.scale, layer.r, rslora)


def alpha_of(scale: float, r: int, rslora: bool) -> float:
    """The lora_alpha whose scale comes out as ``scale``, to the last bit where there is such a one."""
    divisor = math.sqrt(r) if rslora else r
    near = scale * divisor
    options = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return min(options, key=lambda alpha: abs(alpha / divisor - scale))


def _number(value: float) -> float:
    """An int where it is one, as PEFT's users write alphas."""
    return int(value) if float(value).is_integer() else float(value)


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _exceptions(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    # Anchored: PEFT would read "up" as the end of "blocks.0.up" as well.
    return {f"^{literal(name)}": value for name, value in values.items() if value != usual}


def literal(name: str) -> str:
    """The name as a regular expression for itself; a dot may stay what it is, and people read it more easily."""
    return name if re.fullmatch(r"[\w.]+", name) else re.escape(name)


def _target_modules(layers: Iterable[str], names: Sequence[str], modules_to_save: Sequence[str]) -> str | list[str]:
    """The shortest list of endings that PEFT reads as exactly these layers; else one expression of their full names."""
    wanted = set(layers)
    for entries in ({name.rpartition(".")[2] for name in wanted}, wanted):
        config = AdapterConfig(target_modules=tuple(entries), modules_to_save=tuple(modules_to_save))
        if config.targets(names) == wanted:
            return sorted(entries)
    return "|".join(map(re.escape, sorted(wanted)))
