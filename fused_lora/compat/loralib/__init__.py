"""loralib's layers and functions over the fused operator: ``from fused_lora.compat import loralib as lora``.

Names, signatures, attributes, state-dict keys and merging by ``eval()`` are those of microsoft/LoRA at c4593f0. What is
different, and why: ``docs/drop-ins.md``.
"""

from .checkpoint import lora_state_dict, mark_only_lora_as_trainable
from .convolution import Conv1d, Conv2d, Conv3d, ConvLoRA
from .embedding import Embedding
from .linear import Linear, MergedLinear
from .merging import LoRALayer

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]
