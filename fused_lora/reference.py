"""The formula in plain differentiable PyTorch: the oracle the strategies are held against, and the plain layer.

    y = x Wᵀ + bias + scale · ((drop(x) Aᵀ) Bᵀ + lora_bias)

x (..., K)   weight W (N, K)   bias (N,)   lora_a A (R, K)   lora_b B (N, R)   lora_bias (N,)   y (..., N)

Run on float64 tensors it is the truth; run on the tensors of a regime it rounds where the ordinary eager LoRA
layer rounds. Source: Hu et al., LoRA, arXiv 2106.09685, equation 3; lora_bias and the casts as in PEFT.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .dropout import as_seed, check_p, keep_mask


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    lora_bias: Tensor | None = None,
    seed: int | Tensor | None = None,
    strategy: str | None = None,
) -> Tensor:
    """LoRA linear by its definition; arguments as :func:`fused_lora.lora_linear`.

    The base product runs in the dtype of x and weight, the low-rank branch in the dtype of lora_a, and the sum is
    rounded to the base dtype, as PEFT does. Autograd derives the gradients, of every order.
    ``strategy`` is accepted so that the signatures agree; there is only one way here.
    """
    base = F.linear(x, weight, bias)
    branch = x.to(lora_a.dtype)
    p = check_p(dropout_p)
    if training and p > 0.0:
        rows = x.numel() // max(x.shape[-1], 1)
        keep = keep_mask(as_seed(seed, x.device), rows, x.shape[-1], p).reshape(x.shape)
        zeros = branch.new_zeros(())
        branch = (branch / (1.0 - p)).where(keep, zeros) if p < 1.0 else branch.where(keep, zeros)
    branch = F.linear(F.linear(branch, lora_a), lora_b, lora_bias)
    return (base + scale * branch).to(base.dtype)
