"""torchtitan's ``LoRAConverter``, whose layers run the fused operator.

K in_features, N out_features, R rank.   weight (N, K)   bias (N,)   lora_a.weight (R, K)   lora_b.weight (N, R)

    from fused_lora.compat.torchtitan import LoRAConverter   # was: from torchtitan.components.lora import LoRAConverter

torchtitan is imported when ``LoRAConverter`` is asked for, not before. Reference: pytorch/torchtitan,
``torchtitan/components/lora.py`` at b5bcd76c6.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from . import route

_NO_DROPOUT = nn.Identity()
# What a sharding of torchtitan's does to a call, where it is not None.
_REDISTRIBUTIONS = ("in_src_shardings", "in_dst_shardings", "out_src_shardings", "out_dst_shardings", "local_map")


@functools.cache
def fused_class(layer_class: type) -> Any:
    """A subclass of torchtitan's LoRA layer class over its ``Linear``, with a fused forward.

    ``y = x Wᵀ + bias + alpha / rank · (x lora_aᵀ) lora_bᵀ``, x (..., K) -> (..., N). Parameters, names, initial values
    and the sharding of ``parallelize`` are torchtitan's. What the operator has no answer to computes torchtitan's own
    forward: tensor parallelism, a check of its types of sharded tensors, and what ``route.py`` lists.
    """
    base: Any = layer_class

    class Fused(base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            pass

        def parallelize(self, parallel_dims: Any) -> None:
            untouched = [factor for factor in (self.lora_a, self.lora_b) if "forward" not in factor.__dict__]
            super().parallelize(parallel_dims)
            if parallel_dims.tp == 1:
                for factor in untouched:
                    _undo_wrapper(factor)

        def forward(self, input: Tensor) -> Tensor:
            tensors = (input, self.weight, self.bias, self.lora_a.weight, self.lora_b.weight)
            if _type_checked() or route.refusal(*tensors, _NO_DROPOUT, self.lora_a, self.lora_b):
                return super().forward(input)
            return route.fused(*tensors, self._lora_scaling, _NO_DROPOUT)

    Fused.__name__, Fused.__qualname__ = layer_class.__name__, layer_class.__qualname__
    return Fused


def _undo_wrapper(factor: Any) -> None:
    """Take away the forward that ``parallelize`` gave a factor, where it only calls the one it replaced."""
    sharding = factor._sharding_config
    if sharding is not None and all(getattr(sharding, name) is None for name in _REDISTRIBUTIONS):
        factor.__dict__.pop("forward", None)


def _type_checked() -> bool:
    """Whether a mode follows torch's functions, as torchtitan's check of sharded types does; not a default device."""
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack() == 0:
        return False
    return any(type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


@functools.cache
def _converter() -> Any:
    try:
        theirs: Any = importlib.import_module("torchtitan.components.lora").LoRAConverter
    except ImportError as error:
        raise ImportError(f"LoRAConverter is for models of torchtitan, which cannot be imported: {error}") from error

    class LoRAConverter(theirs):
        """torchtitan's ``LoRAConverter`` with fused layers: the same configuration, the same order of converters.

        Only layers whose base runs ``nn.Linear``'s own forward are fused. Those over another one, such as
        ``Float8Linear``, are torchtitan's.
        """

        @dataclass(kw_only=True, slots=True)
        class Config(theirs.Config):
            pass

        def _make_lora_config(self, cfg: Any) -> Any:
            made = super()._make_lora_config(cfg)
            if cfg._owner.forward is not nn.Linear.forward:
                return made
            fused = fused_class(made._owner)
            return fused.Config(**{field.name: getattr(made, field.name) for field in fields(made) if field.init})

    LoRAConverter.__module__ = LoRAConverter.Config.__module__ = __name__
    LoRAConverter.__qualname__, LoRAConverter.Config.__qualname__ = "LoRAConverter", "LoRAConverter.Config"
    return LoRAConverter


def __getattr__(name: str) -> Any:
    if name == "LoRAConverter":
        return _converter()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
