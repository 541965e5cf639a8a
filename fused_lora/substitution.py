"""Whether a fused call may stand in for a call of somebody else's layer: PEFT's, torchtune's, loralib's.

What a user may have done to a layer acts only in that layer's own forward: hooks, tensors that are more than tensors, a
tracer that must see its operations. ``peft_parts.py`` and ``compat/route.py`` ask these questions in every call.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW_PRECISION = (torch.bfloat16, torch.float16)


def does_more(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def has_global_hooks() -> bool:
    """Whether hooks run around the calls of every module."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def is_plain(t: Any) -> TypeGuard[Tensor]:
    """Whether this is a tensor or a parameter, and no subclass of them."""
    return type(t) is nn.Parameter or type(t) is Tensor


def compute_dtype(
    x_dtype: torch.dtype, weight_dtype: torch.dtype, adapter_dtype: torch.dtype, device_type: str, casting: bool
) -> torch.dtype | None:
    """The dtype the base layer computes in, or None where PEFT's own dtype rules (or its error) must decide."""
    if x_dtype not in _FLOATS or weight_dtype not in _FLOATS:
        return None
    dtype = x_dtype
    if torch.is_autocast_enabled(device_type) and x_dtype != torch.float64 and weight_dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        if dtype not in _FLOATS:
            return None
    elif x_dtype != weight_dtype or not (casting or x_dtype == adapter_dtype):
        return None
    if adapter_dtype == dtype or (adapter_dtype == torch.float32 and dtype in LOW_PRECISION):
        return dtype
    return None


def traced_elsewhere() -> bool:
    """Whether something watches the call that must see PEFT's own operations."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )
