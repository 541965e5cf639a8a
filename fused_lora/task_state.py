"""State dicts of ``tasks.Model``: the keys of the plain network, the keys of one task, and loading all or nothing.

Keys are taken apart at their dots and compared whole, so ``fc1`` and ``fc10``, or tasks ``a`` and ``aa``, never mix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .task_layer import TaskLayer

_SHOWN = 10  # of a list of keys in a message


class StateDictError(ValueError, RuntimeError):
    """A state dict that does not fit. A RuntimeError too, as what nn.Module.load_state_dict raises."""


def task_layers(network: nn.Module) -> Iterator[tuple[str, TaskLayer]]:
    """(name, layer) of every TaskLayer, each once."""
    for name, module in network.named_modules():
        if isinstance(module, TaskLayer):
            yield name, module


def base_state(network: nn.Module, prefix: str, keep_vars: bool) -> OrderedDict[str, Any]:
    """The state dict of the network as it was before it was wrapped: its keys, in its order."""
    paths = _paths(network)
    wrapped = network.state_dict(keep_vars=keep_vars)
    state: OrderedDict[str, Any] = OrderedDict()
    for key, value in wrapped.items():
        plain = _plain_key(key, paths)
        if plain is not None:
            state[prefix + plain] = value
    metadata = {_plain_key(key, paths): value for key, value in getattr(wrapped, "_metadata", {}).items()}
    # Where torch looks for the versions of modules.
    state._metadata = OrderedDict(  # type: ignore[attr-defined]
        ((prefix + key).rstrip("."), value) for key, value in metadata.items() if key is not None
    )
    return state


def task_state(network: nn.Module, task: str, prefix: str, keep_vars: bool) -> OrderedDict[str, Any]:
    """``<layer>.<task>.<parameter>`` of one task, e.g. ``fc.anime.lora_a``."""
    state: OrderedDict[str, Any] = OrderedDict()
    for name, layer in task_layers(network):
        for key, value in layer.own_state(task).items():
            if isinstance(value, Tensor) and not keep_vars:
                value = value.detach()
            state[prefix + _join(name, task, key)] = value
    return state


def load_base_state(network: nn.Module, state: Mapping[str, Any], strict: bool) -> Any:
    """Check everything, then load into the layers' bases; returns torch's (missing_keys, unexpected_keys)."""
    expected = base_state(network, "", keep_vars=True)
    outcome = _check(expected, state, strict, "the base network")
    paths = _paths(network)
    wrapped: OrderedDict[str, Any] = OrderedDict(
        (_wrapped_key(key, paths), value) for key, value in state.items() if key in expected
    )
    versions = getattr(state, "_metadata", None) or {}
    wrapped._metadata = OrderedDict((_wrapped_key(key, paths), value) for key, value in versions.items())  # type: ignore[attr-defined]
    network.load_state_dict(wrapped, strict=False)
    return outcome


def load_task_state(network: nn.Module, task: str, state: Mapping[str, Any], strict: bool) -> Any:
    """Check everything, then load into the task's layers; returns torch's (missing_keys, unexpected_keys)."""
    expected = task_state(network, task, "", keep_vars=True)
    outcome = _check(expected, state, strict, f"task {task!r}", _whose(state, expected, network, task))
    for name, layer in task_layers(network):
        keys = {key: _join(name, task, key) for key in layer.own_state(task)}
        values = {key: state[full] for key, full in keys.items() if full in state}
        layer.tasks[task].load_state_dict(values, strict=False)
    return outcome


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _paths(network: nn.Module) -> frozenset[str]:
    """Every name of every TaskLayer."""
    modules = network.named_modules(remove_duplicate=False)
    return frozenset(name for name, module in modules if isinstance(module, TaskLayer))


def _cut(key: str, paths: frozenset[str]) -> tuple[list[str], list[str]] | None:
    """The key's parts up to the TaskLayer it lies in, and the rest; None where it lies in none."""
    parts = key.split(".") if key else []
    for i in range(len(parts) + 1):
        if ".".join(parts[:i]) in paths:
            return parts[:i], parts[i:]
    return None


def _plain_key(key: str, paths: frozenset[str]) -> str | None:
    """The key in the plain network; None for what only the wrapping added."""
    cut = _cut(key, paths)
    if cut is None:
        return key
    layer, rest = cut
    return ".".join(layer + rest[1:]) if rest[:1] == ["base"] else None


def _wrapped_key(key: str, paths: frozenset[str]) -> str:
    cut = _cut(key, paths)
    return key if cut is None else ".".join([*cut[0], "base", *cut[1]])


def _whose(state: Any, expected: Mapping[str, Any], network: nn.Module, task: str) -> str:
    """A hint: the names that stand where ``task`` should, in keys of the first layer that are else expected."""
    layer, _ = next(task_layers(network))
    start = f"{layer}." if layer else ""
    keys = [key for key in state if isinstance(key, str) and key.startswith(start)]
    found = [key[len(start) :].partition(".") for key in keys]
    others = sorted({name for name, _, rest in found if name != task and _join(layer, task, rest) in expected})
    return f"; its keys are those of {', '.join(map(repr, others[:3]))}" if others else ""


def _check(expected: Mapping[str, Any], state: Mapping[str, Any], strict: bool, whose: str, hint: str = "") -> Any:
    """Torch's (missing_keys, unexpected_keys); raise where ``state`` cannot be loaded."""
    if not isinstance(state, Mapping):
        raise TypeError(f"a state dict must be a mapping from keys to tensors, got {type(state).__name__}")
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    wrong = [f"{key} {fault}" for key in expected if key in state and (fault := _fault(expected[key], state[key]))]
    complaints = [("wrong", wrong)]
    if strict:
        complaints += [("missing", missing), ("extra", extra)]
    if any(keys for _, keys in complaints):
        listed = "; ".join(f"{len(keys)} {label}: {_list(keys)}" for label, keys in complaints if keys)
        raise StateDictError(
            f"this is not a state dict of {whose}{hint if missing and extra else ''}; nothing was loaded; {listed}"
        )
    return torch.nn.modules.module._IncompatibleKeys(missing, extra)


def _list(keys: list[Any]) -> str:
    shown = ", ".join(map(str, keys[:_SHOWN]))
    return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more"


def _fault(expected: Any, value: Any) -> str:
    """Why ``value`` cannot be loaded where ``expected`` is; "" where it can."""
    if not isinstance(expected, Tensor):
        return ""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if value.shape != expected.shape:
        return f"has shape {tuple(value.shape)} instead of {tuple(expected.shape)}"
    if expected.is_floating_point() and not value.is_floating_point():
        return f"holds {value.dtype}, not floating numbers"
    # Buffers may hold infinities, masks for instance.
    if isinstance(expected, nn.Parameter) and not torch.isfinite(value).all():
        return "holds NaN or infinity"
    return ""
