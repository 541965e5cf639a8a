"""LoRA on any weight through ``torch.nn.utils.parametrize``: no layer is replaced, the weight itself becomes W + ΔW.

weight (out, ...) seen as (out, fan_in), fan_in the product of the other sizes; lora_a (R, fan_in)   lora_b (out, R)
ΔW = scale · lora_b lora_a, reshaped to weight.

It forms ΔW in every forward, so it costs a pass over the weight where :class:`fused_lora.LoRALinear` does not; it is
for weights that no LoRA layer exists for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .checks import _FLOATS, check_module, check_switch, without_autocast
from .layer import default_adapter_dtype, lora_scale


class LoRAParametrization(nn.Module):
    """``weight -> weight + scale · (lora_b lora_a)``; the weight itself where ``enabled`` is False.

    The sum is formed in the adapters' dtype or wider and rounded once to the dtype of weight. lora_b starts at zero.
    """

    def __init__(self, weight: Tensor, r: int = 8, lora_alpha: float = 16, *, use_rslora: bool = False):
        super().__init__()
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor, got {type(weight).__name__}: pass the parameter itself")
        if weight.dtype not in _FLOATS or weight.dim() < 2:
            raise ValueError(
                "LoRA needs a floating weight of two or more dimensions, "
                f"got {weight.dtype} of shape {tuple(weight.shape)}"
            )
        self.scale = lora_scale(r, lora_alpha, use_rslora)
        self.r, self.lora_alpha = r, lora_alpha
        self.enabled = True
        out, fan_in = weight.shape[0], math.prod(weight.shape[1:])
        dtype = default_adapter_dtype(weight.dtype)
        self.lora_a = nn.Parameter(torch.empty(r, fan_in, dtype=dtype, device=weight.device))
        self.lora_b = nn.Parameter(torch.zeros(out, r, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """(out, ...) -> (out, ...), the dtype of weight."""
        if not self.enabled:
            return weight
        acc = torch.promote_types(weight.dtype, self.lora_a.dtype)
        flat = weight.reshape(weight.shape[0], -1).to(acc)
        with without_autocast(weight.device):
            total = torch.addmm(flat, self.lora_b.to(acc), self.lora_a.to(acc), alpha=self.scale)
        return total.to(weight.dtype).view(weight.shape)

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha:g}, scale={self.scale:g}" + (
            "" if self.enabled else ", disabled"
        )


def lora_parametrize(
    module: nn.Module,
    tensor_name: str = "weight",
    r: int = 8,
    lora_alpha: float = 16,
    *,
    use_rslora: bool = False,
) -> nn.Module:
    """Make ``module.<tensor_name>`` the sum of its frozen value and a low-rank ΔW, and return ``module``.

    Args:
        module: any module with a parameter of that name, of two or more dimensions.
        tensor_name: the parameter.
        r, lora_alpha, use_rslora: rank and scale, as in :class:`fused_lora.LoRALinear`.

    Raises:
        TypeError: not a module; tensor_name not a str, r not an int, lora_alpha not a number, use_rslora not a bool.
        ValueError: no such parameter; it already carries LoRA; a shape or dtype LoRA cannot take; r or lora_alpha out
            of range.
    """
    check_module(module, "module")
    if not isinstance(tensor_name, str):
        raise TypeError(f"tensor_name must be a str, got {type(tensor_name).__name__} {tensor_name!r}")
    if any(True for _ in _lora_parametrizations(module, tensor_name)):
        raise ValueError(
            f"{type(module).__name__}.{tensor_name} already carries LoRA: remove it first with lora_unparametrize"
        )
    weight = getattr(module, tensor_name, None)
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if not isinstance(weight, Tensor) or (
        tensor_name not in names and not parametrize.is_parametrized(module, tensor_name)
    ):
        raise ValueError(
            f"{type(module).__name__} has no parameter {tensor_name!r}; it has {', '.join(names) or 'none'}"
        )
    parametrize.register_parametrization(
        module, tensor_name, LoRAParametrization(weight, r, lora_alpha, use_rslora=use_rslora)
    )
    # Of another parametrization underneath there may be several: the originals it computes the weight from.
    for original in _entries(module, tensor_name).parameters(recurse=False):
        original.requires_grad_(False)
    return module


def lora_unparametrize(module: nn.Module, tensor_name: str = "weight", *, merge: bool = False) -> nn.Module:
    """Take LoRA off again: ``merge=False`` restores the original parameter, ``merge=True`` puts a new one with
    ΔW in its place: other modules that share the original keep it as it is.

    The parameter stays frozen (``requires_grad`` False).

    Raises:
        TypeError: not a module.
        ValueError: the parameter does not carry LoRA, or carries other parametrizations too.
    """
    check_module(module, "module")
    found = list(_lora_parametrizations(module, tensor_name))
    if not found:
        raise ValueError(f"{type(module).__name__}.{tensor_name} does not carry LoRA")
    if len(_entries(module, tensor_name)) > 1:
        raise ValueError(
            f"{type(module).__name__}.{tensor_name} carries other parametrizations too: "
            "remove_parametrizations of torch.nn.utils.parametrize takes all of them off"
        )
    merged = None
    if merge and found[0].enabled:
        with torch.inference_mode(False), torch.no_grad():
            merged = getattr(module, tensor_name).detach()
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=False)
    if merged is not None:
        # Not into the original, which other modules may hold as well.
        parameter = tensor_name in module._parameters
        setattr(module, tensor_name, nn.Parameter(merged, requires_grad=False) if parameter else merged)
    getattr(module, tensor_name).requires_grad_(False)
    return module


def set_lora_enabled(model: nn.Module, enabled: bool) -> int:
    """Switch every LoRA parametrization inside ``model`` on or off; return how many there are.

    Off, the weights are the base's bit for bit.

    Raises:
        TypeError: not a module; ``enabled`` not a bool.
    """
    check_module(model)
    enabled = check_switch(enabled, "enabled")
    found = [m for m in model.modules() if isinstance(m, LoRAParametrization)]
    for parametrization in found:
        parametrization.enabled = enabled
    return len(found)


def _entries(module: nn.Module, tensor_name: str) -> Any:
    """torch's ParametrizationList of the parameter."""
    return cast(nn.ModuleDict, module.parametrizations)[tensor_name]


def _lora_parametrizations(module: nn.Module, tensor_name: str) -> Iterator[LoRAParametrization]:
    if parametrize.is_parametrized(module, tensor_name):
        for entry in _entries(module, tensor_name):
            if isinstance(entry, LoRAParametrization):
                yield entry
