"""Whether one call of a peer's linear layer can take the fused operator, and the call itself.

x (..., K)   weight W (N, K)   bias (N,)   lora_a (R, K)   lora_b (N, R)   y (..., N)

A drop-in's layer lets its user do what the peer's does: train the base weight, hook or replace a submodule, shard or
quantise a tensor. Where the operator would not honour that, the layer computes the peer's own expression. Every
condition is looked at anew in each call; reasons are constants, so that a traced forward handles no strings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.linear import lora_linear
from ..substitution import compute_dtype, does_more, has_global_hooks, is_plain, traced_elsewhere
from .quantised import quantised_linear

TRAINABLE = "the base weight is trainable, and the fused backward has no gradient for it"
TENSORS = "a weight is not a plain tensor, nor a frozen NF4 one (sharded DTensor, another quantisation)"
FACTORS = "the dropout or a factor was replaced by a module of another kind, or given a bias"
HOOKS = "the dropout or a factor carries hooks or a forward of its own"
INPUT = "x is not a plain dense tensor with data"
DTYPES = "the dtypes go together in no regime of the operator"
TRACED = "a functorch transform, forward-mode AD, a dispatch mode or a tracer is active"


def _is_nf4(weight: Tensor) -> bool:
    """Whether this is torchao's NF4 in an eager call; torchao gives it no gradient, whatever requires_grad says."""
    return type(weight).__name__ == "NF4Tensor" and not torch.compiler.is_compiling()


def refusal(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dropout: nn.Module, *factors: nn.Module
) -> str:
    """Why this call must compute the peer's own expression; "" where it can run fused. Changes nothing.

    ``factors``: the modules that hold a and b, where the peer has any.
    """
    nf4 = _is_nf4(weight)
    if not nf4 and weight.requires_grad and torch.is_grad_enabled():
        return TRAINABLE
    if not ((nf4 or is_plain(weight)) and is_plain(a) and is_plain(b) and (bias is None or is_plain(bias))):
        return TENSORS
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return FACTORS
    if any(not _is_linear(type(factor)) or factor.bias is not None for factor in factors):
        return FACTORS
    if has_global_hooks() or any(does_more(module) for module in (dropout, *factors)):
        return HOOKS
    if not is_plain(x) or x.layout is not torch.strided or x.is_nested or x.device.type == "meta":
        return INPUT
    if a.dtype != b.dtype or _dtype(x, weight, a) is None or (nf4 and bias is not None and bias.dtype != x.dtype):
        return DTYPES
    return TRACED if traced_elsewhere() else ""


def _is_linear(kind: type) -> bool:
    """Whether modules of this class compute what nn.Linear computes; torchtitan's class inherits its forward."""
    if kind is nn.Linear:
        return True
    inherits = issubclass(kind, nn.Linear) and kind.forward is nn.Linear.forward
    return inherits and kind.__call__ is nn.Linear.__call__


def _dtype(x: Tensor, weight: Tensor, a: Tensor) -> torch.dtype | None:
    """The dtype the base layer computes in; a quantised weight follows x."""
    stored = x.dtype if _is_nf4(weight) else weight.dtype
    return compute_dtype(x.dtype, stored, a.dtype, x.device.type, True)


def fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: nn.Module
) -> Tensor:
    """``y = x Wᵀ + bias + scale · (drop(x) lora_aᵀ) lora_bᵀ`` for a call without a :func:`refusal`.

    The mask is the operator's own: nn.Dropout's distribution, not its bits.

    Raises:
        ValueError: shapes or devices that do not fit; a scale that is not finite.
    """
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    if _is_nf4(weight):
        dtype = _dtype(x, weight, a)
        assert dtype is not None
        return quantised_linear(x, weight, bias, a, b, scale, p, dtype)
    return lora_linear(x, weight, a, b, scale, bias, dropout_p=p)
