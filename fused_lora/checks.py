"""What is refused before any work: the argument checks of ``lora_linear`` and ``explain``, and of whoever takes a
number, a switch or a module.

x (..., K)   weight (N, K)   bias (N,)   lora_a (R, K)   lora_b (N, R)   lora_bias (N,)
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_LARGEST_SCALE = torch.finfo(torch.float32).max


def as_number(value: Any, name: str) -> float:
    """``value`` as a float, infinite where it is too large for one; raise ``TypeError`` unless it is a number."""
    try:
        if isinstance(value, (str, bytes, bytearray)):  # float() would read it
            raise TypeError
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):  # a tensor of several elements among them
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}: use float()") from None


def check_switch(value: Any, name: str) -> bool:
    """``value`` as a bool; raise ``TypeError`` where it is neither true nor false: the string "no" would be true."""
    try:
        fits = type(value) is bool or (not isinstance(value, (str, bytes)) and value in (True, False))
    except (RuntimeError, ValueError):  # a tensor or an array of several elements
        fits = False
    if not fits:
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}")
    return bool(value)


def check_bias(value: Any) -> bool:
    """A layer's ``bias``; raise ``TypeError`` for a number: many a hand-written layer takes its rank in that place."""
    if not isinstance(value, bool):
        hint = f"; the rank is a keyword: r={value}" if isinstance(value, int) and value > 0 else ""
        raise TypeError(f"bias must be True or False, got {type(value).__name__} {value!r}{hint}")
    return value


def check_module(value: Any, name: str = "model") -> None:
    """Raise ``TypeError`` unless ``value`` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(value).__name__}: pass the module itself")


def check_dtypes(**dtypes: Any) -> None:
    """Raise ``TypeError`` unless a layer can compute in each; None leaves the choice to the layer."""
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in _FLOATS:
            raise TypeError(f"{name} must be one of {', '.join(map(str, _FLOATS))}, got {dtype!r}")


def autocasting(device_type: str) -> bool:
    """Whether autocast is on for this type of device; some, such as meta, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


_NOTHING = contextlib.nullcontext()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast lowers nothing on this type of device."""
    if torch._C._is_any_autocast_enabled() and autocasting(device.type):  # the name of a device takes longer to ask for
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


modes_active = torch._C._len_torch_dispatch_stack


def without_modes() -> contextlib.AbstractContextManager[Any]:
    """A context in which no dispatch mode acts, for what is kept from call to call: a fake tensor would serve real
    calls later."""
    return _disable_current_modes() if modes_active() else _NOTHING  # to disable none takes longer than to ask


def autocast_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype autocast computes in; None where it is off or does not apply (it never touches float64)."""
    device_type = x.device.type
    if autocasting(device_type) and torch.float64 not in (x.dtype, weight.dtype):
        return torch.get_autocast_dtype(device_type)
    return None


def check_operands(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, lora_bias: Tensor | None
) -> torch.dtype:
    """Refuse what the operator does not define, before any work; return the compute dtype."""
    if _beyond_doubt(x, weight, a, b, bias, lora_bias):
        return x.dtype
    return _examine(x, weight, a, b, bias, lora_bias)


def _beyond_doubt(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, lora_bias: Tensor | None
) -> bool:
    """Whether nothing is to be refused and no autocast is on, in a third of the time that :func:`_examine` takes."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    dtype, adapter, device = x.dtype, a.dtype, x.device
    shape, shape_w, shape_a, shape_b = x.shape, weight.shape, a.shape, b.shape
    if not (len(shape) and len(shape_w) == 2 and len(shape_a) == 2 and len(shape_b) == 2):
        return False
    N, K = shape_w
    return (
        dtype in _FLOATS
        and weight.dtype == dtype
        and b.dtype == adapter
        and (adapter == dtype or (adapter == torch.float32 and dtype in _LOW_PRECISION))
        and shape[-1] == K
        and shape_a[1] == K
        and shape_b[0] == N
        and shape_a[0] == shape_b[1]
        and shape_a[0] != 0
        and weight.device == device
        and a.device == device
        and b.device == device
        and not weight.requires_grad
        and (bias is None or _is_vector(bias, N, dtype, device))
        and (lora_bias is None or _is_vector(lora_bias, N, adapter, device))
        and not (torch._C._is_any_autocast_enabled() and autocasting(device.type))  # the first costs a tenth
    )


def _is_vector(t: Tensor, length: int, dtype: torch.dtype, device: torch.device) -> bool:
    return isinstance(t, Tensor) and t.shape == (length,) and t.dtype == dtype and t.device == device


def _examine(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, lora_bias: Tensor | None
) -> torch.dtype:
    """:func:`check_operands` one question after the other, each with its message."""
    named = {"x": x, "weight": weight, "lora_a": a, "lora_b": b, "bias": bias, "lora_bias": lora_bias}
    for name, t in named.items():
        if not isinstance(t, Tensor) and (t is not None or name not in ("bias", "lora_bias")):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}: convert it with torch.as_tensor")
    autocast = autocast_dtype(x, weight)
    dtype = x.dtype if autocast is None else autocast
    mixed = x.dtype != weight.dtype and autocast is None
    if mixed or x.dtype not in _FLOATS or weight.dtype not in _FLOATS:
        raise TypeError(
            f"x is {x.dtype} and weight is {weight.dtype}: they must be the same floating dtype, "
            "one of float64, float32, bfloat16, float16 (or run under torch.autocast)"
        )
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit weight of shape {tuple(weight.shape)}: "
            "weight must be (out_features, in_features) and the last dimension of x in_features"
        )
    _examine_factors(weight.shape, dtype, a, b)
    for name, vector, wanted in (("bias", bias, weight.dtype), ("lora_bias", lora_bias, a.dtype)):
        if vector is not None and (vector.shape != weight.shape[:1] or vector.dtype != wanted):
            raise ValueError(
                f"{name} must be {wanted} of shape ({len(weight)},), got {vector.dtype} of shape {tuple(vector.shape)}"
            )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight requires grad, but the base layer is frozen here and would get no gradient: call "
            "weight.requires_grad_(False), or use nn.Linear for a layer that trains in full"
        )
    for name, t in named.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device} and x is on {x.device}: move them to one device")
    return dtype


def _examine_factors(shape: torch.Size, dtype: torch.dtype, a: Tensor, b: Tensor) -> None:
    """The part of :func:`_examine` on A and B, over a weight of this shape and a layer that computes in ``dtype``."""
    N, K = shape
    fits = a.dim() == 2 and b.dim() == 2 and a.shape[1] == K and b.shape[0] == N and a.shape[0] == b.shape[1]
    if not fits or a.shape[0] == 0:
        raise ValueError(
            f"lora_a of shape {tuple(a.shape)} and lora_b of shape {tuple(b.shape)} do not fit weight of shape "
            f"({N}, {K}): they must be (rank, {K}) and ({N}, rank) with rank at least 1"
        )
    if a.dtype != b.dtype or (a.dtype != dtype and not (a.dtype == torch.float32 and dtype in _LOW_PRECISION)):
        raise TypeError(
            f"lora_a is {a.dtype} and lora_b is {b.dtype} over a layer that computes in {dtype}: both must be {dtype}"
            + (", or both float32" if dtype in _LOW_PRECISION else "")
            + "; cast the adapters with .to()"
        )


def check_scale(scale: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """(float, None) or (1.0, 0-d tensor on the CPU or on ``device``, that of x)."""
    if not isinstance(scale, Tensor):
        if not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"scale must be a float or a 0-d tensor, got {type(scale).__name__}: use float(scale)")
        # A trace has a symbol here, whose value it must not ask for.
        if not torch.compiler.is_compiling() and not abs(scale) <= _LARGEST_SCALE:
            raise ValueError(
                f"scale must be finite, got {scale}: check lora_alpha and the rank it came from (the kernels hold it "
                "in float32, up to 3.4e38)"
            )
        return scale, None
    if scale.numel() != 1 or not scale.dtype.is_floating_point:
        raise ValueError(
            f"scale must be a 0-d floating tensor, got {scale.dtype} of shape {tuple(scale.shape)}: "
            "use .float(), or a Python float"
        )
    if scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "scale requires grad, which is not supported: pass scale.detach(), or train the gain inside lora_b"
        )
    if scale.device != device and scale.device.type != "cpu":
        raise ValueError(f"scale is on {scale.device} and x is on {device}: move it there, or pass a Python float")
    return 1.0, scale.reshape(())
