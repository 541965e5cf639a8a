"""loralib's two functions: what trains, and what is saved."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...checks import check_module
from .merging import LoRALayer

_BIASES = ("none", "all", "lora_only")


def _check(model: nn.Module, bias: str) -> None:
    check_module(model)
    if bias not in _BIASES:
        raise ValueError(f"bias must be one of {', '.join(map(repr, _BIASES))}, got {bias!r}")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze every parameter of ``model`` without ``lora_`` in its name, but for the biases asked for.

    Args:
        model: any module.
        bias: ``"none"``; ``"all"``: every parameter with ``bias`` in its name trains; ``"lora_only"``: those of the
            LoRA layers.

    Raises:
        TypeError: not a module.
        ValueError: bias is none of the three; nothing is changed then.
    """
    _check(model, bias)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad = bias == "all" and "bias" in name
    if bias == "lora_only":
        for module in model.modules():
            if isinstance(module, LoRALayer) and getattr(module, "bias", None) is not None:
                module.bias.requires_grad = True


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Any]:
    """The part of ``model.state_dict()`` that belongs to LoRA, for ``load_state_dict(..., strict=False)``.

    Args:
        model: any module.
        bias: as in :func:`mark_only_lora_as_trainable`: which biases to save with the factors.

    Raises:
        TypeError: not a module.
        ValueError: bias is none of the three.
    """
    _check(model, bias)
    state = model.state_dict()
    kept = {name for name in state if "lora_" in name or (bias == "all" and "bias" in name)}
    if bias == "lora_only":
        kept |= {name.split("lora_")[0] + "bias" for name in kept}
    return {name: t for name, t in state.items() if name in kept}
