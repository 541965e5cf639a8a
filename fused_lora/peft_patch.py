"""``patch_peft``: one line that makes an existing PEFT model's LoRA layers run fused, and its report.

Each ``lora.Linear`` becomes, in place, an instance of a subclass whose forward takes the fused operator where every
condition of ``peft_forward.py`` holds and PEFT's own forward elsewhere. Parameters, names, state dict, config, files,
merging and adapter switching are PEFT's, untouched. PEFT is imported only inside the functions.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import peft_forward
from .peft_parts import AT_REST, DTYPES, TENSORS, branches_dtype, discord, parts_of

NOT_PATCHED = "it is not patched: call patch_peft(model) (layers added later need it again)"
HIDDEN = (
    "a forward on the instance hides the patch (accelerate's hooks install one): call patch_peft before they are "
    "installed"
)
SHARDED = "fully_shard has already changed its class: call patch_peft before fully_shard"
ATTENTION = "it is part of a lora.MultiheadAttention, which merges the weights instead of calling the layer"
_STATE = ("_fused_lora_dropout", "_fused_lora_norms")


@dataclass(frozen=True)
class LayerStatus:
    """One LoRA layer of a model.

    ``state``: ``"fused"``; ``"base"``, nothing to fuse at the moment (disabled, merged, no active adapter here); or
    ``"peft"``, PEFT's own forward runs. ``reason`` says why it is not ``"fused"``, else it is empty.
    """

    name: str
    layer: str
    state: str
    reason: str


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch_peft` did, layer by layer; ``print`` it."""

    layers: tuple[LayerStatus, ...]

    @property
    def fused(self) -> int:
        """The number of layers that run fused."""
        return sum(layer.state == "fused" for layer in self.layers)

    @property
    def unfused(self) -> tuple[LayerStatus, ...]:
        """The layers on PEFT's own forward although they have something to fuse."""
        return tuple(layer for layer in self.layers if layer.state == "peft")

    def __str__(self) -> str:
        if not self.layers:
            return "fused-lora: the model has no LoRA layers"
        lines = [f"fused-lora: {self.fused} of {len(self.layers)} LoRA layers fused"]
        reasons = Counter((layer.state, layer.layer, layer.reason) for layer in self.layers if layer.state != "fused")
        for (state, kind, reason), count in reasons.items():
            first = next(s.name for s in self.layers if (s.state, s.layer, s.reason) == (state, kind, reason))
            also = f" and {count - 1} more" if count > 1 else ""
            lines.append(
                f"  {'at rest' if state == 'base' else 'not fused'}: {count} x {kind} ({first}{also}): {reason}"
            )
        return "\n".join(lines)


@functools.cache
def _lora() -> Any:
    try:
        from peft.tuners.lora import layer
    except ImportError as error:
        raise ImportError("patch_peft needs PEFT: pip install 'fused-lora[peft]'") from error
    return layer


@functools.cache
def _fused_class() -> Any:
    """The subclass of PEFT's lora.Linear, made when PEFT is first needed."""
    Linear = _lora().Linear

    class FusedPeftLinear(Linear):  # type: ignore[misc, valid-type]
        """PEFT's ``lora.Linear`` with a fused forward; see :func:`patch_peft`."""

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self._disable_adapters:  # PEFT takes updates out in such a call, from a tied weight in another layer's
                self.__dict__.pop("_fused_lora_norms", None)
            y = None
            if not args:
                # Where one adapter of the model is an aLoRA, every layer gets its offsets.
                meant = {name: value for name, value in kwargs.items() if name != "alora_offsets"} if kwargs else kwargs
                if not meant:
                    y = peft_forward.fused_forward(self, x)
                elif len(meant) == 1 and meant.get("adapter_names") is not None:
                    y = peft_forward.mixed_forward(self, x, meant["adapter_names"])
            return super().forward(x, *args, **kwargs) if y is None else y

        # PEFT writes the weight through .data, which no version shows: when it merges, and for some initialisations.
        def merge(self, *args: Any, **kwargs: Any) -> None:
            self.__dict__.pop("_fused_lora_norms", None)
            super().merge(*args, **kwargs)

        def unmerge(self) -> None:
            self.__dict__.pop("_fused_lora_norms", None)
            super().unmerge()

        def update_layer(self, *args: Any, **kwargs: Any) -> None:
            self.__dict__.pop("_fused_lora_norms", None)
            super().update_layer(*args, **kwargs)

        def reset_lora_parameters(self, *args: Any, **kwargs: Any) -> None:
            self.__dict__.pop("_fused_lora_norms", None)
            super().reset_lora_parameters(*args, **kwargs)

        def _get_name(self) -> str:
            return "Linear"  # print(model) and get_layer_status show what they showed before

    FusedPeftLinear.__module__, FusedPeftLinear.__qualname__ = __name__, "FusedPeftLinear"
    return FusedPeftLinear


def __getattr__(name: str) -> Any:
    if name == "FusedPeftLinear":  # pickle looks the class up here
        return _fused_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """(name, layer, whether it is inside a lora.MultiheadAttention) of every LoRA layer."""
    lora = _lora()
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, lora.LoraLayer):
            yield name, module, id(module) in inside
            if isinstance(module, lora.MultiheadAttention):
                inside.update(id(child) for child in module.modules() if child is not module)


def _obstacle(layer: Any, in_attention: bool) -> str:
    """Why the class of this layer cannot be swapped, or the swap would have no effect; "" where it can."""
    fused = _fused_class()
    if in_attention:
        return ATTENTION
    if type(layer) not in (_lora().Linear, fused):
        if any(base.__name__ == "FSDPModule" for base in type(layer).__mro__) and isinstance(layer, _lora().Linear):
            return "" if isinstance(layer, fused) else SHARDED
        return f"only lora.Linear is fused, and its type is {type(layer).__name__}"
    own = layer.__dict__.get("forward")
    if own is None:
        return ""
    # accelerate keeps the forward that its hook wraps; a hook over a patched layer is harmless.
    wrapped = getattr(layer.__dict__.get("_old_forward"), "__func__", None)
    return "" if wrapped is fused.forward else HIDDEN


def _status(name: str, layer: Any, in_attention: bool) -> LayerStatus:
    kind = repr(type(layer).__name__).strip("'") if not isinstance(layer, _lora().Linear) else "Linear"
    reason = _obstacle(layer, in_attention)
    if not reason and not isinstance(layer, _fused_class()):
        reason = NOT_PATCHED
    if not reason:
        reason = _standing_reason(layer)
    state = "base" if reason in AT_REST else "peft" if reason else "fused"
    return LayerStatus(name, f"lora.{kind}", state, reason)


def _standing_reason(layer: Any) -> str:
    """Why a patched layer would not fuse an x of the base weight's dtype in a call made now; "" where it would."""
    parts = parts_of(layer)
    if isinstance(parts, str):
        return parts
    weight = parts.weight
    if weight.layout is not torch.strided or weight.device.type == "meta":
        return TENSORS
    against = discord(layer, parts.branches)
    if against is not None:
        return against
    return "" if branches_dtype(layer, parts, weight.dtype) is not None else DTYPES


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module with PEFT LoRA layers, got {type(model).__name__}")


def patch_peft(model: nn.Module, strict: bool = False, *, dropout: str = "fused") -> PatchReport:
    """Make the LoRA layers of a PEFT model run fused, in place. Everything else about the model stays as it is.

    What cannot be fused keeps PEFT's own forward and gives PEFT's result; the report says which layers and why. The
    decision is made anew in every call, so adapters may be switched, merged, disabled or added at any time; LoRA layers
    that are added later are patched by calling again. Calling twice changes nothing but ``dropout``.

    Args:
        model: a ``PeftModel``, or any module with PEFT LoRA layers in it.
        strict: raise if a LoRA layer would stay on PEFT's forward, or if there is none; the model is then as it was.
        dropout: ``"fused"`` draws the mask from fused-lora's own function, seeded by torch's generator (same statistics
            as ``nn.Dropout``, other bits, nothing kept); ``"torch"`` draws ``nn.Dropout``'s own bits and gives PEFT's
            numbers, recomputing the low-rank branch in the backward instead of keeping its copies of x.

    Returns:
        A :class:`PatchReport`.

    Raises:
        TypeError: model is not an ``nn.Module``.
        ValueError: dropout is neither of the two; with ``strict``, the layers that cannot be fused, with their reasons.
        ImportError: PEFT is not installed.
    """
    _check_model(model)
    if dropout not in ("fused", "torch"):
        raise ValueError(f"dropout must be 'fused' or 'torch', got {dropout!r}")
    swapped = []
    fused = _fused_class()
    for _, layer, in_attention in _lora_layers(model):
        if not _obstacle(layer, in_attention):
            swapped.append((layer, type(layer), layer.__dict__.get("_fused_lora_dropout")))
            if not isinstance(layer, fused):
                layer.__class__ = fused
            _set_dropout(layer, dropout if dropout == "torch" else None)
    report = peft_status(model)
    if strict and (report.unfused or not report.layers):
        for layer, before, mode in swapped:
            layer.__class__ = before
            _set_dropout(layer, mode)
        raise ValueError(f"patch_peft(strict=True): not every LoRA layer can be fused, nothing was changed\n{report}")
    return report


def _set_dropout(layer: Any, mode: str | None) -> None:
    if mode is None:
        layer.__dict__.pop("_fused_lora_dropout", None)
    else:
        layer.__dict__["_fused_lora_dropout"] = mode


def unpatch_peft(model: nn.Module) -> int:
    """Give every patched layer PEFT's class back, in place. Returns how many there were.

    Raises:
        TypeError: model is not an ``nn.Module``.
        ValueError: a patched layer was sharded with fully_shard since, which changed its class again.
    """
    _check_model(model)
    fused, plain = _fused_class(), _lora().Linear
    layers = [layer for layer in model.modules() if isinstance(layer, fused)]
    if any(type(layer) is not fused for layer in layers):
        raise ValueError(
            "a patched layer was sharded with fully_shard since, so its class cannot be restored: "
            "unpatch before sharding"
        )
    for layer in layers:
        layer.__class__ = plain
        for key in _STATE:
            layer.__dict__.pop(key, None)
    return len(layers)


def peft_status(model: nn.Module) -> PatchReport:
    """For every LoRA layer whether a call made now would run fused, or the reason why not. Changes nothing.

    The input is taken to be a plain tensor in the dtype of the base weight, unless autocast is on.

    Raises:
        TypeError: model is not an ``nn.Module``.
        ImportError: PEFT is not installed.
    """
    _check_model(model)
    return PatchReport(tuple(_status(*found) for found in _lora_layers(model)))
