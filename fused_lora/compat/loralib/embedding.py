"""loralib's ``Embedding``: a lookup in weight and one in lora_A, which lora_B brings to the embedding's width.

V num_embeddings, D embedding_dim, R rank.
weight (V, D)   lora_A (R, V)   lora_B (D, R)   ΔW = scaling · (lora_B lora_A)ᵀ
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .merging import MergingLayer


class Embedding(MergingLayer, nn.Embedding):
    """loralib's embedding: ``y = weight[i] + lora_alpha / r · lora_A[:, i] lora_Bᵀ``; ΔW is built only to merge.

    Args:
        num_embeddings, embedding_dim: V and D.
        r: rank; 0 is a plain embedding, whose weight trains.
        lora_alpha, merge_weights: see :class:`Linear`.
        kwargs: nn.Embedding's, ``padding_idx`` and the others; they hold for the lookup in lora_A too.

    Shapes: i (...) of integers -> (..., D).

    Raises:
        TypeError: r is not an int, lora_alpha not a number.
        ValueError: r below 0; lora_alpha not finite.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ):
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        self._set_up(r, lora_alpha, 0.0, merge_weights)
        if r > 0:
            self._add_factors((r, num_embeddings), (embedding_dim, r))
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        else:  # from_pretrained: the weight is there
            self._reset_factors()

    def reset_parameters(self) -> None:
        """Draw weight as nn.Embedding does and lora_B normal; lora_A becomes zero."""
        nn.Embedding.reset_parameters(self)
        self._reset_factors()

    def _reset_factors(self) -> None:
        if self._adapts:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def _delta_weight(self) -> Tensor:
        return self._product(self.lora_B).t()

    def forward(self, x: Tensor) -> Tensor:
        """i (...) of integers -> (..., D)."""
        base = nn.Embedding.forward(self, x)
        if self._runs_as_base():
            return base
        s = F.embedding(
            x, self.lora_A.t(), self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )  # (..., R)
        acc = torch.promote_types(s.dtype, torch.float32)
        return (base + F.linear(s.to(acc) * self.scaling, self.lora_B.to(acc))).to(base.dtype)
