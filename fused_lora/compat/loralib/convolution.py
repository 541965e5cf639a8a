"""loralib's ``Conv1d``, ``Conv2d``, ``Conv3d``: a convolution with weight + ΔW.

C in_channels, N out_channels, G groups, k kernel_size, d dimensions, R rank.
weight (N, C/G, k, ...)   bias (N,)   lora_A (R·k, C·k)   lora_B (N/G·k^(d-1), R·k)
ΔW = scaling · lora_B lora_A, its elements in order taken for those of weight

As a convolution such a ΔW has rank R·k^d, and in a grouped one no block structure at all, so there is no cheap branch
to compute beside the base: the sum of weights is formed, in float32, and convolved once. (``fused_lora.LoRAConv2d`` has
PEFT's factors, which do make a cheap branch.)

Two dimensions have loralib's own shapes. Its one- and three-dimensional layers with k > 1 fail in the first forward,
because their product has the wrong number of elements; here lora_B has as many rows as the dimensions need.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor, nn

from .merging import MergingLayer


class ConvLoRA(MergingLayer):
    """loralib's layer over any convolution of torch: ``y = conv(x, weight + ΔW) + bias``.

    The convolution is the submodule ``conv``; its parameters have a second name on the layer itself (``weight`` and
    ``conv.weight``), and state dicts hold both. A file may have either.

    Args:
        conv_module: nn.Conv1d, nn.Conv2d or nn.Conv3d.
        in_channels, out_channels, kernel_size: of the convolution; kernel_size is one int.
        r: rank; 0 is the plain convolution, whose weight trains.
        lora_alpha, merge_weights: see :class:`Linear`.
        lora_dropout: accepted and, as in loralib, not applied: weights are summed, so no x could be dropped. Warned of.
        kwargs: the convolution's: ``stride``, ``padding``, ``groups``, ``bias``, ``device`` and so on.

    Raises:
        TypeError: kernel_size or r is not an int; lora_alpha or lora_dropout not a number.
        ValueError: r below 0; lora_alpha not finite; lora_dropout outside [0, 1].
    """

    def __init__(
        self,
        conv_module: Any,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ):
        if not isinstance(kernel_size, int):
            raise TypeError(f"kernel_size must be one int, for all dimensions, got {kernel_size!r}")
        nn.Module.__init__(self)
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        for name, parameter in self.conv.named_parameters():
            self.register_parameter(name, parameter)
        self._set_up(r, lora_alpha, lora_dropout, merge_weights)
        if r > 0:
            if lora_dropout:
                warnings.warn(
                    f"lora_dropout={lora_dropout} has no effect in loralib's convolutions: pass 0, or use "
                    "fused_lora.LoRAConv2d and its sisters, which drop",
                    stacklevel=3,
                )
            rows = out_channels // self.conv.groups * kernel_size ** (self.weight.dim() - 3)
            self._add_factors((r * kernel_size, in_channels * kernel_size), (rows, r * kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch does, lora_A Kaiming-uniform with a = √5; lora_B becomes zero."""
        self.conv.reset_parameters()
        if self._adapts:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def _delta_weight(self) -> Tensor:
        return self._product(self.lora_B).view(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) or (C, ...) -> (B, N, ...) or (N, ...)."""
        if self._runs_as_base():
            return self.conv(x)
        weight = (self._delta_weight() + self.weight).to(self.weight.dtype)
        return self.conv._conv_forward(x, weight, self.conv.bias)

    def _tie(self) -> None:
        for name, parameter in self.conv._parameters.items():
            if name in self._parameters:
                self._parameters[name] = parameter

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.conv._parameters:
            keys = [prefix + name, f"{prefix}conv.{name}"]
            held = next((state_dict[key] for key in keys if key in state_dict), None)
            if held is not None:  # load_state_dict gave us a dict of its own
                state_dict.update((key, held) for key in keys if key not in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Conv1d(ConvLoRA):
    """loralib's ``Conv1d(in_channels, out_channels, kernel_size, r, ...)``; see :class:`ConvLoRA`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """loralib's ``Conv2d(in_channels, out_channels, kernel_size, r, ...)``; see :class:`ConvLoRA`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """loralib's ``Conv3d(in_channels, out_channels, kernel_size, r, ...)``; see :class:`ConvLoRA`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(nn.Conv3d, *args, **kwargs)
