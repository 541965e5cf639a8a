"""loralib's ``Linear`` and ``MergedLinear`` over the fused operator.

K in_features, N out_features, R rank, G groups of rows (q, k, v in one weight), E of them with LoRA.
Linear        weight (N, K)  bias (N,)  lora_A (R, K)      lora_B (N, R)
MergedLinear  weight (N, K)  bias (N,)  lora_A (E·R, K)    lora_B (E·N/G, R)
With ``fan_in_fan_out`` weight is stored (K, N).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import route
from .merging import MergingLayer


def check_enabled(value: Any, name: str = "enable_lora") -> list[bool]:
    """loralib's ``enable_lora`` as a list; raise ``TypeError`` unless it is a list, tuple or array of bools.

    Of 0 and 1 loralib makes indices: ``[1, 0, 1]`` there means the first two of three groups.
    """
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    entries = value.tolist() if hasattr(value, "tolist") else [*value] if listed else None
    if isinstance(entries, list):
        entries = [entry.tolist() if hasattr(entry, "tolist") else entry for entry in entries]
    if not isinstance(entries, list) or not all(type(entry) is bool for entry in entries):
        raise TypeError(
            f"{name} must be a list with True or False for each group of rows, as [True, False, True], got "
            f"{type(value).__name__} {value!r}"
        )
    return entries


class _LinearLayer(MergingLayer, nn.Linear):
    """What the two share: all but the shapes of the factors."""

    fan_in_fan_out: bool

    def _finish(self, fan_in_fan_out: bool) -> None:
        self.fan_in_fan_out = fan_in_fan_out
        self.reset_parameters()
        if fan_in_fan_out:
            # A view, as in loralib: what a seed gives a model that initialises it depends on the strides.
            self.weight.data = self.weight.data.t()

    def reset_parameters(self) -> None:
        """Draw weight and bias as nn.Linear does, lora_A Kaiming-uniform with a = √5; lora_B becomes zero."""
        nn.Linear.reset_parameters(self)
        if self._adapts:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def _turned(self, t: Tensor) -> Tensor:
        """From the layout of weight to (N, K), and back."""
        return t.t() if self.fan_in_fan_out else t

    def _wide_b(self) -> Tensor:
        """lora_B as the factor of all of weight's rows, (N, rows of lora_A)."""
        return self.lora_B

    def _delta_weight(self) -> Tensor:
        return self._turned(self._product(self._wide_b()))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        weight = self._turned(self.weight)
        if self._runs_as_base():
            return F.linear(x, weight, self.bias)
        a, b = self.lora_A, self._wide_b()
        if route.refusal(x, weight, self.bias, a, b, self.lora_dropout):
            return F.linear(x, weight, self.bias) + F.linear(F.linear(self.lora_dropout(x), a), b) * self.scaling
        return route.fused(x, weight, self.bias, a, b, self.scaling, self.lora_dropout)


class Linear(_LinearLayer):
    """loralib's linear layer, fused: ``y = x Wᵀ + bias + lora_alpha / r · (drop(x) lora_Aᵀ) lora_Bᵀ``.

    Args:
        in_features, out_features: K and N.
        r: rank; 0 is a plain linear layer, whose weight trains.
        lora_alpha: ``scaling`` is lora_alpha / r.
        lora_dropout: probability of zeroing an element of x before lora_A; the mask is fused-lora's own.
        fan_in_fan_out: store weight as (K, N), as GPT-2's Conv1D does.
        merge_weights: merge ΔW into weight on ``eval()``, take it out on ``train()``.
        kwargs: nn.Linear's ``bias``, ``device``, ``dtype``.

    Shapes: x (..., K) -> (..., N).

    Raises:
        TypeError: r is not an int; lora_alpha or lora_dropout not a number.
        ValueError: r below 0; lora_alpha not finite; lora_dropout outside [0, 1].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ):
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self._set_up(r, lora_alpha, lora_dropout, merge_weights)
        if r > 0:
            self._add_factors((r, in_features), (out_features, r))
        self._finish(fan_in_fan_out)


class MergedLinear(_LinearLayer):
    """loralib's layer for several projections in one weight, each group of rows with LoRA of its own or none.

    Group g with LoRA, the e-th of them: ``y_g = x W_gᵀ + bias_g + scaling · (drop(x) A_eᵀ) B_eᵀ``, where A_e is the
    e-th block of R rows of lora_A, and B_e the e-th block of N/G rows of lora_B.

    One call of the operator computes all groups: lora_A is used as it is, and lora_B becomes block-structured,
    (N, E·R) with zeros. The dense (N, K) update, which loralib builds in every forward, exists only while merging.

    Args:
        enable_lora: for each of the G equal groups of rows whether it has LoRA; a list, tuple or array of bools.
        in_features, out_features, r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights, kwargs: see
            :class:`Linear`.

    Raises:
        TypeError: as Linear; enable_lora holds something other than bools.
        ValueError: as Linear; the length of enable_lora does not divide out_features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ):
        enabled = check_enabled(enable_lora)
        groups = len(enabled)
        if groups == 0 or out_features % groups:
            raise ValueError(f"the length of enable_lora must divide out_features={out_features}, got {groups}")
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self._set_up(r, lora_alpha, lora_dropout, merge_weights)
        self.enable_lora = enable_lora
        if r > 0 and any(enabled):
            self._add_factors((r * sum(enabled), in_features), (out_features // groups * sum(enabled), r))
        self._finish(fan_in_fan_out)

    def _wide_b(self) -> Tensor:
        if all(self.enable_lora) and len(self.enable_lora) == 1:
            return self.lora_B
        width, r = self.lora_A.shape[0], self.r
        blocks = iter(self.lora_B.split(self.out_features // len(self.enable_lora)))
        left, rows = 0, []
        for enabled in self.enable_lora:
            if enabled:
                rows.append(F.pad(next(blocks), (left, width - left - r)))
                left += r
            else:
                rows.append(self.lora_B.new_zeros(self.out_features // len(self.enable_lora), width))
        return torch.cat(rows)

    @property
    def lora_ind(self) -> Tensor:
        """(N,) of bool: the rows of the groups with LoRA."""
        enabled = torch.tensor([*map(bool, self.enable_lora)])
        return enabled.repeat_interleave(self.out_features // len(self.enable_lora))

    def zero_pad(self, x: Tensor) -> Tensor:
        """(E·N/G, ...) -> (N, ...): the rows of the groups with LoRA at their places, zeros between them."""
        padded = x.new_zeros(self.out_features, *x.shape[1:])
        padded[self.lora_ind] = x
        return padded

    def merge_AB(self) -> Tensor:
        """The update without its scaling, dense, in the layout of weight."""
        return self._turned(torch.mm(self._wide_b(), self.lora_A))
