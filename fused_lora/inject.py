"""LoRA into any model, in place: apply, remove, merge. One walk over the module tree, no code per model."""

from __future__ import annotations

import difflib
import sys
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .config import ALL_LINEAR, LoRAConfig
from .convolution import LoRAConv, LoRAConv1d, LoRAConv2d, LoRAConv3d
from .layer import LoRAHolder, LoRALayer, is_transformers_conv1d
from .modules import LoRAEmbedding, LoRALinear
from .report import _named, lora_layers

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CONVOLUTIONS: dict[type[nn.Module], type[LoRAConv]] = {
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
    nn.Conv3d: LoRAConv3d,
}
_SUPPORTED = "Linear, Conv1D of transformers, Embedding, Conv1d, Conv2d and Conv3d, of exactly these types"
# Modules of torch that in evaluation read the weights of the layers inside them, past those layers' forward, unless
# this attribute has this value.
_SHORTCUTS: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_RECORD = "_fused_lora_record"


@dataclass(frozen=True)
class _Record:
    """What remove_lora and merge_lora put back, kept on the model; names, so that a copy of the model can use it.

    ``bias`` is the config's: save_adapter writes the biases it names.
    """

    requires_grad: dict[str, bool]
    attributes: tuple[tuple[str, str, Any], ...]  # (module name, attribute, value)
    bias: str = "none"


def apply_lora(model: nn.Module, config: LoRAConfig, *, adapter_dtype: torch.dtype | None = None) -> nn.Module:
    """Replace the layers that ``config`` chooses by LoRA layers, in place, and freeze everything else.

    The LoRA layers share the weights of the layers they replace, so tied weights stay tied and the keys of the base
    model's state dict stay what they are; ``lora_a`` and ``lora_b`` stand beside ``weight``. A layer that appears under
    several names is replaced by one LoRA layer under all of them if any of its names is chosen and none excluded.
    Forward and backward hooks of a replaced layer go on running, with the LoRA layer as their module. The replaced
    layers are kept, emptied of their parameters, for :func:`remove_lora`. An error leaves the model as it was.

    Only layers whose forward is known are replaced: Linear, Conv1D of transformers, Embedding, Conv1d, Conv2d, Conv3d,
    of exactly these types. Code that reads the weight of such a layer instead of calling it does not see LoRA;
    nn.TransformerEncoder(Layer), which does so in evaluation, is made to call its layers.

    Args:
        model: any module. For a single layer use :meth:`LoRALinear.from_linear` and its like.
        config: what goes where, see :class:`LoRAConfig`. Names or patterns in it that had no effect give a warning.
        adapter_dtype: of the factors; default float32 over bfloat16 and float16, else that of the weight.

    Returns:
        ``model`` itself. ``print(lora_report(model))`` shows what was done.

    Raises:
        TypeError: ``model`` is not a module, ``config`` not a LoRAConfig, ``adapter_dtype`` not a floating dtype.
        ValueError: nothing is chosen (the message lists near names); a chosen module is of an unsupported type, or is
            hooked, patched or quantised in a way LoRA would lose, or not linear with ``use_dora``; the model holds LoRA
            already, ours, a tasks.Model's or PEFT's; a rank does not go with a convolution's groups.
    """
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}")
    chosen = _choose(model, config)
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    try:
        layers = {module: _wrap(module, names, config, adapter_dtype) for module, names in chosen.items()}
    except BaseException:
        _set_requires_grad(model, flags)
        raise
    attributes = _stop_shortcuts(model, chosen)
    model.requires_grad_(False)
    for module, layer in layers.items():
        layer.hold_base(module)
        _replace(model, chosen[module], layer)
    _free_biases(model, config.bias)
    model.__dict__[_RECORD] = _Record(flags, attributes, config.bias)
    return model


def remove_lora(model: nn.Module) -> nn.Module:
    """Put the replaced layers back, the same objects with the same weights, in place; undoes :func:`apply_lora`.

    Every ``requires_grad`` goes back to what it was. Biases that were trained (``bias="all"`` or ``"lora_only"``) keep
    their trained values. Layers that were built by hand (``from_linear``) become plain layers around the same weight.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: there is no LoRA layer inside ``model``, or it holds a tasks.Model.
    """
    return _take_out(model, merge=False)


def merge_lora(model: nn.Module) -> nn.Module:
    """Add ΔW to the weights and put plain layers back, in place: the model without LoRA layers that computes the same.

    The plain layers are the replaced objects with new weights; ``requires_grad`` goes back to what it was. Where other
    modules share the weight they keep the base weight: the tie is gone, and a warning says so.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: there is no LoRA layer inside ``model``, one is disabled, or it holds a tasks.Model.
    """
    _refuse_holders(_named(model))
    for name, layer in lora_layers(model):
        if not layer.enabled:
            raise ValueError(f"{name} is disabled: enable it, or use remove_lora for the base model")
    for names in _shared_weights(model):
        warnings.warn(
            f"{' and '.join(names)} share one weight; merging unties them: only the layers with LoRA get ΔW. "
            "Where a model's configuration says that they are tied, change it before saving",
            stacklevel=2,
        )
    return _take_out(model, merge=True)


def _choose(model: nn.Module, config: LoRAConfig) -> dict[nn.Module, list[str]]:
    """The modules to replace with all their names; refuse what cannot be done, before anything is done."""
    modules = _named(model)
    _refuse_lora(modules, "put all targets into one LoRAConfig, or call remove_lora or merge_lora first")
    modules.pop(model)
    head = _output_head(model) if config.target_modules == ALL_LINEAR else None
    chosen = {}
    for module, names in modules.items():
        if config.target_modules == ALL_LINEAR:
            targeted = module is not head and (isinstance(module, nn.Linear) or is_transformers_conv1d(module))
        else:
            targeted = any(map(config.targets, names))
        if targeted and not any(map(config.excludes, names)):
            chosen[module] = names
    if not chosen:
        raise ValueError(_nothing_found(model, modules, config))
    refusals = [(names[0], reason) for module, names in chosen.items() if (reason := _refusal(module))]
    if refusals:
        rest = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
        name, reason = refusals[0]
        raise ValueError(
            f"{name}{rest} cannot get LoRA: {reason}. Supported are {_SUPPORTED}; leave others out with "
            f"exclude_modules=[{name.rpartition('.')[2]!r}] or a narrower target_modules"
        )
    _warn_of_unused(modules, chosen, config)
    return chosen


def _refuse_lora(modules: dict[nn.Module, list[str]], instead: str) -> None:
    """Raise where one of the modules is LoRA already; ``instead``: what to do about our own layers."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # not imported: then no module can be PEFT's
    for module, names in modules.items():
        name = names[0] or "the model"
        if isinstance(module, LoRAHolder):
            raise ValueError(f"{name} is a {type(module).__name__} of a tasks.Model: add tasks to that with add_task")
        if isinstance(module, LoRALayer):
            raise ValueError(f"{name} is a {type(module).__name__} already: {instead}")
        if peft is not None and isinstance(module, peft.BaseTunerLayer):
            raise ValueError(
                f"{name} is a {type(module).__name__} of PEFT already: patch_peft runs a PEFT model fused as it is; or "
                "take PEFT's layers out first, with its unload() or merge_and_unload()"
            )


def _output_head(model: nn.Module) -> nn.Module | None:
    try:
        return cast(Any, model).get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _refusal(module: nn.Module) -> str:
    """Why this layer cannot be replaced; "" where it can."""
    kind = type(module)
    if not (kind in (nn.Linear, nn.Embedding, *_CONVOLUTIONS) or is_transformers_conv1d(module)):
        base = next((c.__name__ for c in (nn.Linear, nn.Embedding, *_CONVOLUTIONS) if isinstance(module, c)), "")
        return f"it is a {kind.__name__}" + (f", a {base} whose forward may do something else" if base else "")
    if "forward" in module.__dict__:
        return "its forward was replaced on this one object"
    weight = module._parameters.get("weight")
    others = [*module._modules, *module._buffers, *(n for n in module._parameters if n not in ("weight", "bias"))]
    if weight is None or others:
        return f"its weight is computed from other tensors ({', '.join(others) or 'none of them parameters'})"
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, not a plain floating parameter"
    if module._state_dict_hooks or module._state_dict_pre_hooks or module._load_state_dict_pre_hooks:
        return "it has hooks on its state dict"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return "it has max_norm or sparse set"
    return ""


def _nothing_found(model: nn.Module, modules: dict[nn.Module, list[str]], config: LoRAConfig) -> str:
    names = [name for all_names in modules.values() for name in all_names]
    able = [name for module, all_names in modules.items() if not _refusal(module) for name in all_names]
    if not able:
        hint = " The model itself is one layer: use LoRALinear.from_linear and its like" if not modules else ""
        return f"target_modules matches nothing: no layer here can get LoRA.{hint}"
    excluded = " once exclude_modules is taken away" if config.exclude_modules else ""
    layers = f" in layers_to_transform={config.layers_to_transform!r}" if config.layers_to_transform is not None else ""
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules or ())
    near = sorted({close for target in wanted for close in _near(target, able)})
    endings = sorted({name.rpartition(".")[2] for name in able})
    listed = f"near names: {', '.join(near)}" if near else f"names that can get LoRA end in: {', '.join(endings[:20])}"
    shown = ", ".join(map(repr, wanted))
    return f"target_modules {shown} matches none of the {len(names)} modules{layers}{excluded}; {listed}"


def _near(target: str, names: list[str]) -> list[str]:
    """Up to three endings of names, with as many components as ``target``, that look like it."""
    parts = target.count(".") + 1
    endings = list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names))
    return difflib.get_close_matches(target, endings)


def _warn_of_unused(
    modules: dict[nn.Module, list[str]], chosen: dict[nn.Module, list[str]], config: LoRAConfig
) -> None:
    names = [name for all_names in modules.values() for name in all_names]
    for label, entry in config.unused(names, [name for all_names in chosen.values() for name in all_names]):
        near = _near(entry, names)
        hint = f"; near names: {', '.join(near)}" if near else ""
        warnings.warn(f"{label}: {entry!r} matches no module and has no effect{hint}", stacklevel=4)


def _wrap(module: nn.Module, names: list[str], config: LoRAConfig, adapter_dtype: torch.dtype | None) -> LoRALayer:
    name = next(filter(config.targets, names), names[0])
    settings: dict[str, Any] = {
        "r": config.rank(name),
        "lora_alpha": config.alpha(name),
        "use_rslora": config.use_rslora,
        "init_lora_weights": config.init_lora_weights,
        "adapter_dtype": adapter_dtype,
    }
    convolution = _CONVOLUTIONS.get(type(module))
    if config.use_dora and (convolution is not None or isinstance(module, nn.Embedding)):
        raise ValueError(
            f"{names[0]} is a {type(module).__name__}: use_dora is for linear layers; leave others out with "
            "exclude_modules or a narrower target_modules"
        )
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding.from_embedding(module, **settings)
    settings["lora_dropout"] = config.lora_dropout
    if convolution is not None:
        try:
            return convolution.from_conv(module, **settings)
        except ValueError as error:  # a rank that the groups do not divide
            raise ValueError(f"layer {names[0]!r}: {error}") from None
    return LoRALinear.from_linear(module, use_dora=config.use_dora, **settings)


def _replace(model: nn.Module, names: list[str], module: nn.Module) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = module


def _stop_shortcuts(model: nn.Module, chosen: dict[nn.Module, list[str]]) -> tuple[tuple[str, str, Any], ...]:
    """Make the modules of _SHORTCUTS that hold a chosen layer call it; return what their attributes were."""
    before = []
    for name, module in model.named_modules():
        for kind, attribute, value in _SHORTCUTS:
            if isinstance(module, kind) and any(inner in chosen for inner in module.modules()):
                before.append((name, attribute, getattr(module, attribute)))
                setattr(module, attribute, value)
    return tuple(before)


def _free_biases(model: nn.Module, bias: str) -> None:
    if bias == "all":
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias":
                parameter.requires_grad_(True)
    elif bias == "lora_only":
        for _, layer in lora_layers(model):
            if layer.bias is not None:
                layer.bias.requires_grad_(True)


def _shared_weights(model: nn.Module) -> list[list[str]]:
    """The names that share the weight of a LoRA layer, for each such weight that several modules hold."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append(f"{name}.{key}")
    weights = dict.fromkeys(layer.weight for _, layer in lora_layers(model))
    return [owners[weight] for weight in weights if len(owners[weight]) > 1]


def _take_out(model: nn.Module, merge: bool) -> nn.Module:
    named = _named(model)
    layers = {module: names for module, names in named.items() if isinstance(module, LoRALayer)}
    _refuse_holders(named)
    if not layers or model in layers:
        raise ValueError(
            "there is no LoRA layer inside this module"
            + (": it is one itself, use its to_base()" if layers else "; was apply_lora called on it?")
        )
    for layer, names in layers.items():
        _replace(model, names, layer.release_base(merge))
    for holder in model.modules():
        record = holder.__dict__.pop(_RECORD, None)
        if record is not None:
            for name, attribute, value in record.attributes:
                setattr(holder.get_submodule(name), attribute, value)
            _set_requires_grad(holder, record.requires_grad)
    return model


def _refuse_holders(modules: dict[nn.Module, list[str]]) -> None:
    for module, names in modules.items():
        if isinstance(module, LoRAHolder):
            raise ValueError(
                f"{names[0] or 'this module'} is a {type(module).__name__}: the LoRA layers in it are tasks of a "
                "tasks.Model, not made by apply_lora; drop a task with its remove_task"
            )


def _set_requires_grad(model: nn.Module, flags: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in flags:
            parameter.requires_grad_(flags[name])
