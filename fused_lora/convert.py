"""State dicts of loralib and torchtune: into a model, and out of one.

Neither format says the scale, so it is an argument. Loading checks everything and is all or nothing, as
:func:`load_adapter` is; PEFT's files come from here by way of :func:`save_adapter`.

            linear                                embedding
loralib     <path>.lora_A   <path>.lora_B         the same
torchtune   <path>.lora_a.weight  .lora_b.weight  none
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .adapter_config import AdapterConfig, literal
from .adapter_files import AdapterError, StoredTensor
from .adapter_keys import PREFIX, SUFFIXES, factor_key
from .adapter_models import Place, look
from .adapters import load_into
from .compat.loralib.linear import check_enabled
from .convolution import LoRAConv
from .layer import check_alpha

__all__ = ["load_loralib", "load_torchtune", "to_loralib", "to_torchtune"]

_TORCHTUNE = {".lora_a.weight": "lora_a", ".lora_b.weight": "lora_b"}
_LORALIB = {".lora_A": "lora_a", ".lora_B": "lora_b"}


@dataclass(frozen=True)
class _StateDict:
    """A state dict in PEFT's keys, in the place of a directory."""

    directory: str
    state: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    @property
    def stored(self) -> dict[str, StoredTensor]:
        return {key: StoredTensor(t.dtype, tuple(t.shape)) for key, t in self.state.items()}

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: self.state[key].detach().cpu() for key in keys}


def load_loralib(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    lora_alpha: float,
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
    bias: str = "none",
    task: str | None = None,
    overwrite_base: bool = False,
) -> nn.Module:
    """Load what loralib's ``lora_state_dict`` gives, in place; the scale is lora_alpha / r, as there.

    Args:
        model: as for :func:`load_adapter`; in a model without LoRA the layers that the state dict names get it.
        state_dict: keys ``<path>.lora_A`` and ``<path>.lora_B``, and biases where ``bias`` says so.
        lora_alpha: what loralib's layers were made with.
        enable_lora: for each MergedLinear, by its path, the list it was made with. Its groups become one layer of rank
            r · groups with the same ΔW; A keeps its bits, B is spread over the rows that were enabled.
        bias: the ``bias`` given to ``lora_state_dict``.
        task, overwrite_base: as in :func:`load_adapter`.

    Raises:
        TypeError, ValueError: lora_alpha is not a finite number; the state dict does not hold tensors by name,
            enable_lora not lists of bools.
        AdapterError: as :func:`load_adapter`; a convolution, which loralib factors in another way.
    """
    check_alpha(lora_alpha)
    merged = _enabled_by_path(enable_lora)
    factors, rest = _split(state_dict, _LORALIB)
    alphas = {}
    for path, parts in factors.items():
        if path in merged:
            parts["lora_b"] = _spread(path, parts, merged.pop(path))
            alphas[path] = lora_alpha * (parts["lora_a"].shape[0] // _groups_rank(state_dict, path))
    if merged:
        raise AdapterError(f"enable_lora names {', '.join(merged)}, which the state dict has no lora_A and lora_B for")
    with _keys_of(_LORALIB, rest):
        return _load(model, "this loralib state dict", factors, rest, lora_alpha, alphas, bias, task, overwrite_base)


def load_torchtune(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    lora_alpha: float,
    rename: Callable[[str], str] | None = None,
    task: str | None = None,
    overwrite_base: bool = False,
) -> nn.Module:
    """Load torchtune's adapter weights, in place; the scale is lora_alpha / rank, as there.

    Args:
        model: as for :func:`load_adapter`.
        state_dict: keys ``<path>.lora_a.weight`` and ``<path>.lora_b.weight`` (torchtune's ``get_adapter_state_dict``).
        lora_alpha: torchtune's ``alpha``.
        rename: a layer's path in ``model`` for its path in torchtune, where they differ. Models of Hugging Face also
            order the rows of q_proj and k_proj differently: for those let torchtune write PEFT's files.
        task, overwrite_base: as in :func:`load_adapter`.

    Raises:
        TypeError, ValueError: lora_alpha is not a finite number; the state dict does not hold tensors by name; rename
            is no function, or gives something other than a string.
        AdapterError: as :func:`load_adapter`; rename gives two layers one path.
    """
    check_alpha(lora_alpha)
    factors, rest = _split(state_dict, _TORCHTUNE)
    if rename is not None:
        factors = _renamed(factors, rename)
    with _keys_of(_TORCHTUNE, rest):
        return _load(model, "this torchtune state dict", factors, rest, lora_alpha, {}, "none", task, overwrite_base)


def _enabled_by_path(enable_lora: Any) -> dict[str, list[bool]]:
    if enable_lora is None:
        return {}
    if not isinstance(enable_lora, Mapping):
        raise TypeError(
            "enable_lora must be a mapping from the path of each MergedLinear to its list, as "
            f"{{'attn': [True, False, True]}}, got {type(enable_lora).__name__} {enable_lora!r}"
        )
    for path in enable_lora:
        if not isinstance(path, str):
            raise TypeError(f"enable_lora must have the paths of layers as keys, got {type(path).__name__} {path!r}")
    return {path: check_enabled(enabled, f"enable_lora[{path!r}]") for path, enabled in enable_lora.items()}


def _renamed(factors: Mapping[str, dict[str, Tensor]], rename: Callable[[str], str]) -> dict[str, dict[str, Tensor]]:
    if not callable(rename):
        raise TypeError(
            f"rename must be a function from a path to a path, got {type(rename).__name__} {rename!r:.80}: for a dict, "
            "pass its __getitem__"
        )
    olds: dict[str, str] = {}
    for path in factors:
        new = rename(path)
        if not isinstance(new, str):
            raise TypeError(
                f"rename must return the path as a string, got {type(new).__name__} {new!r:.80} for {path!r}"
            )
        if new in olds:
            raise AdapterError(f"rename gives {olds[new]!r} and {path!r} the same path {new!r}: nothing was loaded")
        olds[new] = path
    return {new: factors[path] for new, path in olds.items()}


def to_loralib(model: nn.Module, *, lora_alpha: float, task: str | None = None) -> dict[str, Tensor]:
    """The LoRA layers as loralib's ``lora_state_dict`` gives them, for layers made there with ``lora_alpha``.

    Raises:
        TypeError, ValueError: lora_alpha is not a finite number; there is no LoRA layer.
        AdapterError: a layer whose scale is not lora_alpha / r; a convolution, which loralib factors in another way.
    """
    return {
        f"{place.path}.lora_{part[-1].upper()}": tensor
        for place, part, tensor in _factors(model, lora_alpha, task)
        if _refuse(place, isinstance(place.lora, LoRAConv), "loralib factors a convolution in another way")
    }


def to_torchtune(model: nn.Module, *, lora_alpha: float, task: str | None = None) -> dict[str, Tensor]:
    """The LoRA layers as torchtune's ``get_adapter_state_dict`` gives them, for layers with ``alpha=lora_alpha``.

    Raises:
        TypeError, ValueError: lora_alpha is not a finite number; there is no LoRA layer.
        AdapterError: a layer whose scale is not lora_alpha / r, or that is not linear.
    """
    return {
        f"{place.path}.{part}.weight": tensor
        for place, part, tensor in _factors(model, lora_alpha, task)
        if _refuse(place, place.embedding or isinstance(place.lora, LoRAConv), "torchtune has linear layers only")
    }


def _refuse(place: Place, refused: bool, reason: str) -> bool:
    if refused:
        raise AdapterError(f"{place.path} cannot be converted: {reason}")
    return True


def _factors(model: nn.Module, lora_alpha: float, task: str | None) -> Iterator[tuple[Place, str, Tensor]]:
    check_alpha(lora_alpha)
    target = look(model, task)
    if target.kind not in ("lora", "task"):
        raise ValueError("there is no LoRA layer in this model" + (f" for task {task!r}" if task else ""))
    places = list(target.own_places())
    for place in places:
        _refuse(place, place.dora, "DoRA is not converted; save_adapter writes it in PEFT's files")
    other = [
        f"{place.path} ({place.lora.scale * place.lora.r:g})"
        for place in places
        if place.lora is not None and not math.isclose(place.lora.scale, lora_alpha / place.lora.r, rel_tol=1e-12)
    ]
    if other:
        raise AdapterError(
            f"with lora_alpha={lora_alpha:g} another scale than theirs would come out for {', '.join(other)}; in "
            "parentheses is the lora_alpha that each needs"
        )
    for place in places:
        for part in ("lora_a", "lora_b"):
            yield place, part, getattr(place.lora, part).detach().clone()


def _split(
    state_dict: Mapping[str, Tensor], suffixes: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({path: {"lora_a": ..., "lora_b": ...}}, everything else)."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"a state dict must be a mapping from keys to tensors, got {type(state_dict).__name__}")
    factors: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"a state dict must map strings to tensors, got {key!r}: {type(value).__name__}")
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
        if suffix is None:
            rest[key] = value
        else:
            factors.setdefault(key.removesuffix(suffix), {})[suffixes[suffix]] = value
    return factors, rest


def _groups_rank(state_dict: Mapping[str, Tensor], path: str) -> int:
    """loralib's r of a MergedLinear: the columns of its lora_B."""
    return state_dict[f"{path}.lora_B"].shape[1]


def _spread(path: str, parts: Mapping[str, Tensor], enabled: Sequence[bool]) -> Tensor:
    """B of a MergedLinear, (N/len · groups, r), as the (N, r · groups) of one layer: each group has its own ranks."""
    groups = sum(map(bool, enabled))
    a, b = parts.get("lora_a"), parts.get("lora_b")
    fits = a is not None and b is not None and a.dim() == b.dim() == 2 and groups > 0
    if not fits or b.shape[0] % groups or a.shape[0] != b.shape[1] * groups:  # type: ignore[union-attr]
        raise AdapterError(f"lora_A and lora_B of {path} are not those of a MergedLinear with enable_lora={[*enabled]}")
    assert b is not None
    rows, r = b.shape[0] // groups, b.shape[1]
    spread = b.new_zeros(rows * len(enabled), r * groups)
    for group, place in enumerate(i for i, on in enumerate(enabled) if on):
        block = b[group * rows : (group + 1) * rows]
        spread[place * rows : (place + 1) * rows, group * r : (group + 1) * r] = block
    return spread


@contextlib.contextmanager
def _keys_of(suffixes: Mapping[str, str], rest: Iterable[str]) -> Iterator[None]:
    """Have an AdapterError from inside say the keys of the format with these suffixes in the place of PEFT's."""
    own = {part: suffix for suffix, part in suffixes.items()}
    as_given = {f"{PREFIX}{key}": key for key in rest}

    def theirs(match: re.Match[str]) -> str:
        key = match[1].replace(".base_layer.", ".")
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), "")
        return as_given.get(match[0], key.removesuffix(suffix) + own.get(SUFFIXES.get(suffix, ""), suffix))

    try:
        yield
    except AdapterError as error:
        error.args = (re.sub(rf"{re.escape(PREFIX)}([^\s,();]+)", theirs, str(error)),)
        raise


def _load(
    model: nn.Module,
    what: str,
    factors: Mapping[str, Mapping[str, Tensor]],
    rest: Mapping[str, Tensor],
    lora_alpha: float,
    alphas: Mapping[str, float],
    bias: str,
    task: str | None,
    overwrite_base: bool,
) -> nn.Module:
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias must be none, all or lora_only, got {bias!r}")
    places = look(model, task).places
    state, ranks = {f"{PREFIX}{key}": value for key, value in rest.items()}, {}
    for path, parts in factors.items():
        embedding = path in places and places[path].embedding
        for part, tensor in parts.items():
            state[factor_key(path, part, embedding)] = tensor
        if "lora_a" in parts and parts["lora_a"].dim() and len(parts["lora_a"]):
            ranks[f"^{literal(path)}"] = len(parts["lora_a"])
    config = AdapterConfig(
        lora_alpha=lora_alpha,
        bias=bias,
        rank_pattern=ranks,
        alpha_pattern={f"^{literal(path)}": alpha for path, alpha in alphas.items()},
    )
    files: Any = _StateDict(what, state, {})
    return load_into(model, files, config, task=task, adapter_dtype=None, overwrite_base=overwrite_base)
