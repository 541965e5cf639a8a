"""Which layers of a network ``tasks.Model`` wraps, and what a task in them is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from . import inject
from .config import ALL_LINEAR, LoRAConfig
from .layer import is_transformers_conv1d
from .task_layer import TaskLayer

_wrappers: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}


def register_base_module_wrapper(base_type: type[nn.Module], constructor: Callable[[Any], nn.Module] | None) -> None:
    """Have ``tasks.Model`` wrap modules of ``base_type``, subclasses included, with tasks made by ``constructor``.

    ``constructor(module)`` makes the module of one task; it is called by ``add_task`` once per task and wrapped module,
    takes what ``module`` takes and returns what it returns, in its place. It may use ``module``, which stays frozen and
    shared; parameters of ``module`` that it registers are not counted as the task's. A new task starts as the base
    network if what the constructor makes starts with the output of ``module``. What is inside a wrapped module is left
    alone; its methods other than forward stay the base's. A registered type wins over the built-in layers; of several
    registered types that fit, the nearest ancestor. Registering a type again replaces its constructor, None takes it
    off. Models made before are not touched.

    Raises:
        TypeError: base_type is not a type of nn.Module, or constructor cannot be called.
    """
    if not isinstance(base_type, type) or not issubclass(base_type, nn.Module):
        raise TypeError(f"base_type must be a subclass of nn.Module, got {base_type!r}")
    if constructor is None:
        _wrappers.pop(base_type, None)
    elif callable(constructor):
        _wrappers[base_type] = constructor
    else:
        raise TypeError(f"constructor must be callable, got {type(constructor).__name__}")


def constructor_of(module: nn.Module) -> Callable[[Any], nn.Module] | None:
    """The constructor registered for the type of ``module``, or for its nearest ancestor."""
    return next((_wrappers[kind] for kind in type(module).__mro__ if kind in _wrappers), None)


def choose(model: nn.Module, config: LoRAConfig, everything: bool) -> dict[nn.Module, list[str]]:
    """The modules to wrap, with all their names outside other wrapped modules; refuse what cannot be done."""
    modules = inject._named(model)
    inject._refuse_lora(modules, "give Model the network without LoRA, see remove_lora and merge_lora")
    head = inject._output_head(model) if config.target_modules == ALL_LINEAR else None
    targeted = {
        module
        for module, names in modules.items()
        if _targeted(module, names, config, head) and not any(map(config.excludes, names))
    }
    if everything:
        targeted = {module for module in targeted if constructor_of(module) or not inject._refusal(module)}
    chosen: dict[nn.Module, list[str]] = {}
    _walk(model, "", targeted, chosen)
    del modules[model]
    if not chosen:
        raise ValueError(inject._nothing_found(model, modules, config))
    for module, names in chosen.items():
        reason = "" if constructor_of(module) else inject._refusal(module)
        if reason:
            raise ValueError(
                f"{names[0]} cannot get LoRA: {reason}. Supported are {inject._SUPPORTED}, and types given to "
                "register_base_module_wrapper; leave others out with exclude_modules or a narrower target_modules"
            )
    inject._warn_of_unused(modules, chosen, config)
    return chosen


def _targeted(module: nn.Module, names: list[str], config: LoRAConfig, head: nn.Module | None) -> bool:
    if config.target_modules != ALL_LINEAR:
        return any(map(config.targets, names))
    return module is not head and (isinstance(module, nn.Linear) or is_transformers_conv1d(module))


def _walk(module: nn.Module, name: str, targeted: set[nn.Module], chosen: dict[nn.Module, list[str]]) -> None:
    if module in targeted:
        chosen.setdefault(module, []).append(name)
        return
    for key, child in module._modules.items():
        if child is not None:
            _walk(child, f"{name}.{key}" if name else key, targeted, chosen)


def make_task(layer: TaskLayer, config: LoRAConfig) -> nn.Module:
    """One task's module for a wrapped layer."""
    base = layer.base
    if not layer.registered:
        return inject._wrap(base, [layer.path], config, None)
    constructor = constructor_of(base)
    if constructor is None:
        raise ValueError(f"layer {layer.path!r}: no wrapper is registered for {type(base).__name__} any more")
    module = constructor(base)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"layer {layer.path!r}: the constructor for {type(base).__name__} returned {module!r}, not a module"
        )
    devices = {p.device for p in base.parameters()}
    if len(devices) == 1:
        module.to(devices.pop())
    for part in set(module.modules()).difference(base.modules()):
        part.training = base.training
    return module
