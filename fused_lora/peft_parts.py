"""The parts of a PEFT LoRA layer that a fused call needs, or the reason why PEFT's own forward must run.

x (..., K)   weight W (N, K), or (K, N) in a transformers Conv1D   lora_A (R, K)   lora_B (N, R)

Every condition is looked at anew in each call, because PEFT lets all of them change between calls. Reasons are
constants, so that a traced forward handles no strings. PEFT is not imported here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .substitution import compute_dtype, does_more, has_global_hooks, is_plain, traced_elsewhere

# At rest: PEFT would run the base layer alone, so there is nothing to fuse.
DISABLED = "its adapters are disabled, so the base layer runs alone (enable_adapter_layers() switches them on)"
MERGED = "its adapters are merged, so the base layer runs alone (unmerge_adapter() takes them out)"
ABSENT = "none of the active adapters is on this layer, so the base layer runs alone (see set_adapter())"
AT_REST = frozenset((DISABLED, MERGED, ABSENT))

# Reasons for PEFT's forward.
BASE = (
    "its base layer is neither exactly nn.Linear nor transformers' Conv1D: quantised, parametrised and custom layers "
    "keep PEFT's forward"
)
HOOKS = (
    "its base layer, lora_A, lora_B or dropout carries hooks or a forward of its own (accelerate, DeepSpeed, tensor "
    "parallelism, activation capture): they act only in PEFT's forward"
)
FACTORS = "its lora_A, lora_B or dropout is not PEFT's plain nn.Linear or nn.Dropout"
VARIANT = "its adapter is a LoRA variant other than DoRA (use_dora alone is fused)"
DORA_PLACE = "its DoRA magnitude is not a plain parameter beside the weights (offloaded, sharded or hooked)"
TENSORS = (
    "a weight is not a plain 2-D tensor of the layer's size (sharded DTensor, quantised, sparse, meta or gathered on "
    "demand); with FSDP wrap whole blocks, not the factors"
)
INFERENCE = "its base weight was made in inference mode, and such a tensor cannot be saved for a backward"
TRAINABLE = (
    "its base weight is trainable, and the fused backward has no gradient for it: call "
    "base_layer.weight.requires_grad_(False)"
)
SCALE = "its scaling is not a finite number or a one-element floating tensor without gradient"
DTYPES = (
    "the dtypes do not go together: x must have the base weight's dtype or run under autocast, and the adapter the "
    "dtype of the computation, or float32 over bfloat16 and float16 (bias dtypes follow their weights)"
)
SEVERAL_DTYPES = (
    "dropout='torch' is asked for, and several active adapters have different dtypes, which PEFT casts one by one"
)
SEVERAL_COMPILE = "several active adapters trained with dropout are fused in eager mode only"
TORCH_COMPILE = (
    "dropout='torch' is asked for, and its recomputation draws another mask in a graph compiled without AOTAutograd"
)
SEVERAL_DORA = "several adapters are active and one of them is DoRA"
MIXED = "adapter_names is fused only without torch.compile, dropout and variants, for a list that fits the batch"
INPUT = "x is not a plain dense tensor of the layer's width on the weights' device"
TRANSFORM = "a functorch transform, forward-mode AD, a dispatch mode or a tracer is active"
DORA_TORCH = "dropout='torch' is asked for, and DoRA runs its base layer on the dropped x"
DORA_VECTOR = "DoRA gives a one-dimensional x a leading dimension in PEFT"
DORA_COMPILE = "DoRA is fused in eager mode only"

_DROPOUTS = (nn.Identity, nn.Dropout)


class Branch(NamedTuple):
    """One active adapter of a layer."""

    name: str
    a: Tensor
    b: Tensor
    bias: Tensor | None
    scale: float | Tensor
    dropout: nn.Module
    p: float  # what the dropout does now: 0 in evaluation
    magnitude: Tensor | None  # of DoRA


class Parts(NamedTuple):
    """What a fused call of a layer needs."""

    weight: Tensor  # as the base layer stores it
    transposed: bool  # Conv1D: (K, N)
    bias: Tensor | None
    branches: list[Branch]


def _is_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def parts_of(layer: Any, names: Any = None) -> Parts | str:
    """The layer's parts as they are now, or the reason why no x could be fused.

    ``names``: adapters to take instead of the active ones.
    """
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    present = layer._modules["lora_A"]._modules
    names = [name for name in names or layer.active_adapters if name in present]
    if not names:
        return ABSENT
    base = layer._modules["base_layer"]
    transposed = _is_conv1d(type(base))
    if not (type(base) is nn.Linear or transposed):
        return BASE
    if does_more(base) or has_global_hooks():
        return HOOKS
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if not is_plain(weight) or not (bias is None or is_plain(bias)) or weight.dim() != 2:
        return TENSORS
    if weight.requires_grad and torch.is_grad_enabled():
        return TRAINABLE
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and weight.is_inference():
        return INFERENCE
    N, K = weight.shape[::-1] if transposed else weight.shape
    if bias is not None and (bias.shape[0] != N or bias.dtype != weight.dtype or bias.device != weight.device):
        return DTYPES
    branches = []
    for name in names:
        branch = _branch(layer, name, weight, N, K)
        if isinstance(branch, str):
            return branch
        branches.append(branch)
    return Parts(weight, transposed, bias, branches)


def _branch(layer: Any, name: str, weight: Tensor, N: int, K: int) -> Branch | str:
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    variant = layer.lora_variant.get(name) if layer.lora_variant else None
    if variant is not None and type(variant).__name__ != "DoraLinearVariant":
        return VARIANT
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear or type(dropout) not in _DROPOUTS:
        return FACTORS
    if does_more(lora_a) or does_more(lora_b) or does_more(dropout):
        return HOOKS
    a, b, bias = lora_a._parameters.get("weight"), lora_b._parameters.get("weight"), lora_b._parameters.get("bias")
    if (
        not is_plain(a)
        or not is_plain(b)
        or not (bias is None or is_plain(bias))
        or lora_a._parameters.get("bias") is not None
    ):
        return TENSORS
    R = a.shape[0]
    if a.shape != (R, K) or b.shape != (N, R) or R == 0 or a.device != weight.device or b.device != weight.device:
        return TENSORS
    if a.dtype != b.dtype or (bias is not None and (bias.dtype != b.dtype or bias.shape[0] != N)):
        return DTYPES
    scale = layer.scaling[name]
    if not _usable_scale(scale):
        return SCALE
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    magnitude = None
    if variant is not None:
        magnitude = _magnitude(layer, name, weight, N)
        if magnitude is None or bias is not None:
            return DORA_PLACE
        p = p if layer.training else 0.0  # PEFT's DoRA asks the layer as well as the dropout
    return Branch(name, a, b, bias, scale, dropout, p, magnitude)


def _usable_scale(scale: Any) -> bool:
    if isinstance(scale, (float, int)):
        return math.isfinite(scale)
    return is_plain(scale) and scale.numel() == 1 and scale.dtype.is_floating_point and not scale.requires_grad


def _magnitude(layer: Any, name: str, weight: Tensor, N: int) -> Tensor | None:
    holder = layer._modules["lora_magnitude_vector"]._modules[name]
    magnitude = holder._parameters.get("weight")
    if type(holder).__name__ != "DoraLinearLayer" or does_more(holder) or not is_plain(magnitude):
        return None
    if layer.fan_in_fan_out != _is_conv1d(type(layer._modules["base_layer"])):
        return None
    return magnitude if magnitude.shape == (N,) and magnitude.device == weight.device else None


def discord(layer: Any, branches: list[Branch]) -> str | None:
    """Why the branches cannot be fused with each other and with the chosen dropout; None where they can."""
    torch_dropout = layer.__dict__.get("_fused_lora_dropout") == "torch"
    dora = any(branch.magnitude is not None for branch in branches)
    dropout = any(branch.p for branch in branches)
    if torch_dropout and dropout and not dora and torch.compiler.is_compiling():
        return TORCH_COMPILE
    if len(branches) > 1:
        if dora:
            return SEVERAL_DORA
        if torch_dropout and dropout and any(branch.a.dtype != branches[0].a.dtype for branch in branches):
            return SEVERAL_DTYPES
        if dropout and not torch_dropout and torch.compiler.is_compiling():
            return SEVERAL_COMPILE
    elif dora:
        if torch_dropout and branches[0].p:
            return DORA_TORCH
        if torch.compiler.is_compiling():
            return DORA_COMPILE
    return None


def _input_refusal(x: Any, parts: Parts) -> str | None:
    if not is_plain(x) or x.layout is not torch.strided or x.is_nested or x.dim() == 0:
        return INPUT
    weight = parts.weight
    if (
        x.device != weight.device
        or x.device.type == "meta"
        or x.shape[-1] != weight.shape[0 if parts.transposed else 1]
    ):
        return INPUT
    if weight.layout is not torch.strided:
        return TENSORS
    if x.dim() == 1 and parts.branches[0].magnitude is not None:
        return DORA_VECTOR
    return TRANSFORM if traced_elsewhere() else None


def route(layer: Any, x: Any) -> tuple[Parts, torch.dtype] | str:
    """The parts and the compute dtype of a fused ``layer(x)``, or the reason for PEFT's forward. Changes nothing."""
    parts = parts_of(layer)
    if isinstance(parts, str):
        return parts
    refusal = discord(layer, parts.branches) or _input_refusal(x, parts)
    if refusal is not None:
        return refusal
    dtype = branches_dtype(layer, parts, x.dtype)
    return DTYPES if dtype is None else (parts, dtype)


def branches_dtype(layer: Any, parts: Parts, x_dtype: torch.dtype) -> torch.dtype | None:
    """The compute dtype of a fused call with all branches, or None as in :func:`compute_dtype`.

    PEFT casts x for one adapter after the other, each time from the cast before. Over a bfloat16 or float16 base that
    loses nothing for the dtypes that are let through here; over any other they are all the base's own.
    """
    weight, casting = parts.weight, layer.cast_input_dtype_enabled
    dtype = None
    for branch in parts.branches:
        dtype = compute_dtype(x_dtype, weight.dtype, branch.a.dtype, weight.device.type, casting)
        if dtype is None:
            return None
    return dtype


def route_mixed(layer: Any, x: Any, names: Any) -> tuple[Parts, torch.dtype] | str:
    """The parts (one branch per adapter in ``names``) of a mixed batch and the compute dtype, or the reason for
    PEFT's forward."""
    if torch.compiler.is_compiling() or not isinstance(names, (list, tuple)):
        return MIXED
    if isinstance(x, torch.Tensor) and x.dim() and len(names) != x.shape[0]:
        return MIXED  # PEFT's error, before a name is looked at
    parts = parts_of(layer, dict.fromkeys(names))
    if isinstance(parts, str):
        return parts
    refusal = _input_refusal(x, parts)
    if refusal is not None or x.dim() < 2:
        return refusal or MIXED
    dtype = None
    for branch in parts.branches:
        if branch.p or branch.magnitude is not None:
            return MIXED
        dtype = compute_dtype(x.dtype, parts.weight.dtype, branch.a.dtype, x.device.type, True)
        if dtype is None:
            return DTYPES
    return MIXED if dtype is None else (parts, dtype)
