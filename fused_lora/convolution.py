"""LoRAConv1d, LoRAConv2d, LoRAConv3d: a convolution to rank R, then a 1 x 1 convolution to the outputs.

C in_channels, N out_channels, R rank, G groups, k... the kernel's sizes.
weight (N, C/G, k...)  bias (N,)  frozen;  lora_a (R, C, k...)  lora_b (N, R/G, 1...)  trained, in PEFT's shapes.
ΔW (N, C, k...): row n is scale · lora_b[n] times the R/G filters of lora_a that belong to n's group.

lora_a sees all channels, whatever G is (PEFT's convention). With G > 1, ΔW therefore reaches channels that weight has
no place for, and the merged weight is the dense one, (N, C, k...), for a convolution with one group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_bias, check_dtypes, without_autocast
from .layer import LoRALayer

_Layer = TypeVar("_Layer", bound="LoRAConv")
_SETTINGS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)


class LoRAConv(LoRALayer):
    """What LoRAConv1d, LoRAConv2d and LoRAConv3d share: all but the number of dimensions.

    ``y = conv(x, weight) + bias + scale · conv1x1(conv(drop(x), lora_a), lora_b)``; ΔW is never built in forward.

    Stride, padding (numbers, "same", "valid"), dilation and padding mode of the base hold for lora_a too, so merging
    changes nothing but rounding. lora_a is Kaiming-uniform and lora_b zero at start; weight and bias are frozen.

    Args:
        in_channels ... padding_mode: as in the layer of torch.
        r: rank, at least 1 and a multiple of ``groups``.
        lora_alpha, lora_dropout, use_rslora, init_lora_weights, device, dtype, adapter_dtype: as in LoRALinear.

    Shapes: x (B, C, ...) or (C, ...) -> (B, N, ...) or (N, ...), in the dtype of the base layer's output.

    Raises:
        TypeError, ValueError: r is not an int of at least 1, or not a multiple of groups; lora_alpha not finite;
            lora_dropout outside [0, 1]; an unknown init_lora_weights.

    Source: Hu et al., LoRA, arXiv 2106.09685; the pair of convolutions as in PEFT.
    """

    _wraps: ClassVar[type[nn.Module]]
    _convolution: ClassVar[Callable[..., Tensor]]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ):
        super().__init__(r, lora_alpha, lora_dropout, use_rslora)
        check_dtypes(dtype=dtype, adapter_dtype=adapter_dtype)
        check_bias(bias)
        settings = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self._adopt(self._wraps(*settings, device=device, dtype=dtype), adapter_dtype, init_lora_weights)

    @classmethod
    def from_conv(
        cls: type[_Layer],
        conv: nn.Module,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> _Layer:
        """A LoRA layer over an existing convolution: the same weight and bias parameters, frozen, nothing copied.

        Raises:
            TypeError: conv is not the convolution of torch with the same number of dimensions.
            ValueError: r is not a multiple of conv.groups.
        """
        layer = cls.__new__(cls)
        LoRALayer.__init__(layer, r, lora_alpha, lora_dropout, use_rslora)
        layer._adopt(conv, adapter_dtype, init_lora_weights)
        return layer

    def _read_base(self, base: nn.Module) -> None:
        if not isinstance(base, self._wraps):
            raise TypeError(f"{type(self).__name__} goes over an nn.{self._wraps.__name__}, got {type(base).__name__}")
        for name in _SETTINGS:
            setattr(self, name, getattr(base, name))
        if self.r % self.groups:
            raise ValueError(
                f"r={self.r} is not a multiple of groups={self.groups}: each group takes r / groups filters; choose "
                "another rank for this layer (rank_pattern) or leave it out (exclude_modules)"
            )

    def _factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ones = (1,) * len(self.kernel_size)
        return (self.r, self.in_channels, *self.kernel_size), (self.out_channels, self.r // self.groups, *ones)

    def delta_weight(self) -> Tensor:
        """ΔW, (N, C, k...) as for one group, in float32 (float64 for a float64 layer)."""
        acc = torch.promote_types(self.lora_a.dtype, torch.float32)
        a = self.lora_a.to(acc).reshape(self.groups, self.r // self.groups, -1)  # (G, R/G, C·k)
        b = self.lora_b.to(acc).reshape(self.groups, -1, self.r // self.groups)  # (G, N/G, R/G)
        with without_autocast(a.device):
            delta = torch.bmm(b, a)
        return delta.mul_(self._scale).view(self.out_channels, *self.lora_a.shape[1:])

    def _add_delta(self, delta: Tensor) -> Tensor:
        G, sizes = self.groups, self.weight.shape[1:]  # sizes (C/G, k...)
        blocks = delta.view(G, -1, G, *sizes).diagonal(dim1=0, dim2=2)  # (N/G, C/G, k..., G)
        blocks += self.weight.view(G, -1, *sizes).movedim(0, -1)
        return delta

    def _fill(self, base: nn.Module, weight: nn.Parameter) -> None:
        super()._fill(base, weight)
        base.groups = self._groups_of(weight)  # type: ignore[assignment]

    def _groups_of(self, weight: Tensor) -> int:
        return self.in_channels // weight.shape[1]

    def _padded(self, x: Tensor) -> Tensor:
        """x with the padding that is not zeros; zeros are the convolution's own business."""
        if self.padding_mode == "zeros":
            return x
        return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)

    def _convolve(self, padded: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        padding = self.padding if self.padding_mode == "zeros" else 0
        return type(self)._convolution(padded, weight, bias, self.stride, padding, self.dilation, groups)

    def _base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._convolve(self._padded(x), weight, self.bias, self._groups_of(weight))

    def _lora_forward(self, x: Tensor) -> Tensor:
        padded = self._padded(x)
        base = self._convolve(padded, self.weight, self.bias, self.groups)
        if self.training and self.lora_dropout:
            # Dropped before padding: an element goes together with its copies.
            padded = self._padded(F.dropout(x, self.lora_dropout))
        s = self._convolve(padded.to(self.lora_a.dtype), self.lora_a, None, 1) * self._runtime_scale()  # (B, R, ...)
        branch = type(self)._convolution(s, self.lora_b, groups=self.groups)
        return (base + branch).to(base.dtype)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        for name, default in (("padding", 0), ("dilation", 1), ("groups", 1), ("padding_mode", "zeros")):
            value = getattr(self, name)
            if value not in (default, (default,) * len(self.kernel_size)):
                parts.append(f"{name}={value}")
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join([*parts, self._lora_repr()])


class LoRAConv1d(LoRAConv):
    """LoRA over nn.Conv1d; see :class:`LoRAConv`."""

    _wraps = nn.Conv1d
    _convolution = F.conv1d


class LoRAConv2d(LoRAConv):
    """LoRA over nn.Conv2d; see :class:`LoRAConv`."""

    _wraps = nn.Conv2d
    _convolution = F.conv2d


class LoRAConv3d(LoRAConv):
    """LoRA over nn.Conv3d; see :class:`LoRAConv`."""

    _wraps = nn.Conv3d
    _convolution = F.conv3d
