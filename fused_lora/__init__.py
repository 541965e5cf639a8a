"""fused-lora: LoRA at the price of the frozen layer.

y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ
"""

from .adapters import AdapterError, AdapterReport, check_adapter, load_adapter, save_adapter
from .config import LoRAConfig
from .convolution import LoRAConv1d, LoRAConv2d, LoRAConv3d
from .inject import apply_lora, merge_lora, remove_lora
from .modules import LoRAEmbedding, LoRALinear
from .ops.linear import FusedLoRALinear, explain, lora_linear
from .peft_patch import PatchReport, patch_peft, peft_status, unpatch_peft
from .report import count_parameters, lora_layers, lora_parameters, lora_report

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "AdapterReport",
    "FusedLoRALinear",
    "LoRAConfig",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRALinear",
    "PatchReport",
    "apply_lora",
    "check_adapter",
    "count_parameters",
    "explain",
    "load_adapter",
    "lora_layers",
    "lora_linear",
    "lora_parameters",
    "lora_report",
    "merge_lora",
    "patch_peft",
    "peft_status",
    "remove_lora",
    "save_adapter",
    "unpatch_peft",
]
