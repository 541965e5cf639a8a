"""The LoRA linear layers of torchtune and loralib, where they are installed, around the tensors of a case.

Both are eager: two products, a product with the scale on the N-wide side, a sum. Neither casts x, so float32 adapters
over a bfloat16 or float16 base are refused by both; under autocast they would run in the base's dtype.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from shapes import SCALE, Case
from torch import nn

if TYPE_CHECKING:
    from providers import Inputs


def torchtune_refusal(case: Case, device: torch.device) -> str:
    """Why torchtune's layer cannot take this case; "" where it can."""
    return _refusal("torchtune", "torchtune torchao", case)


def loralib_refusal(case: Case, device: torch.device) -> str:
    """Why loralib's layer cannot take this case; "" where it can."""
    return _refusal("loralib", "loralib", case)


def _refusal(package: str, requirement: str, case: Case) -> str:
    if importlib.util.find_spec(package) is None:
        return f"not installed (pip install {requirement})"
    if case.dtype != case.adapter_dtype:
        return f"it has no {case.regime}: it does not cast x to the dtype of the adapters"
    return ""


def torchtune_layer(inputs: Inputs, p: float) -> nn.Module:
    """``torchtune.modules.peft.LoRALinear``."""
    from torchtune.modules.peft import LoRALinear

    rank = inputs.a.shape[0]
    with torch.device("meta"):
        layer = LoRALinear(inputs.weight.shape[1], inputs.weight.shape[0], rank, SCALE * rank, p)
    layer.weight = nn.Parameter(inputs.weight, requires_grad=False)
    layer.lora_a.weight, layer.lora_b.weight = nn.Parameter(inputs.a.clone()), nn.Parameter(inputs.b.clone())
    return layer


def loralib_layer(inputs: Inputs, p: float) -> nn.Module:
    """``loralib.Linear``."""
    import loralib

    rank = inputs.a.shape[0]
    N, K = inputs.weight.shape
    layer = loralib.Linear(K, N, rank, SCALE * rank, p, bias=False, device="meta")
    layer.weight = nn.Parameter(inputs.weight, requires_grad=False)
    layer.lora_A, layer.lora_B = nn.Parameter(inputs.a.clone()), nn.Parameter(inputs.b.clone())
    return layer
