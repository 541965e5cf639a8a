"""The five gradients of the fused LoRA linear as expressions autograd can differentiate again (create_graph=True).

    ds = scale · dy B      db = scale · dyᵀ s      da = dsᵀ drop(x)      dx = dy W + drop'(ds A)

x (..., K)   weight W (N, K)   A (R, K)   B (N, R)   y, dy (..., N)   s, ds (M, R)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocks import acc_dtype
from .dropout import keep_mask, keep_scale


def transformed() -> bool:
    """Whether a functorch transform or forward-mode AD is active: they differentiate the formula itself."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def expressions_wanted(dy: Tensor) -> bool:
    """Whether the gradients of a backward have to be made of expressions that can be differentiated, or mapped.

    create_graph; many gradients at once (``is_grads_batched``), on which no work may be in place; a transform.
    """
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy) or transformed()


def differentiable_backward(
    dy, x, weight, a, b, s, factor, seed, p, x_dtype, adapter_dtype, bias_dtype, in_features, need
):
    """The five gradients as expressions autograd can differentiate again (create_graph=True)."""
    need_x, need_bias, need_a, need_b, need_lora_bias = need
    acc = acc_dtype(adapter_dtype)
    lead = dy.shape[:-1]
    dy = dy.reshape(math.prod(lead), dy.shape[-1])
    dy_acc = dy.to(acc)
    rows = dropped = keep = None
    if x is not None:
        rows = dropped = x.reshape(dy.shape[0], x.shape[-1]).to(acc)
    if seed is not None and (need_x or need_a or need_b):
        keep = keep_mask(seed, dy.shape[0], in_features, p).to(acc) * keep_scale(p)
        dropped = None if rows is None else rows * keep
    dx = dbias = da = db = dlora_bias = None
    if need_x or need_a:
        ds = (dy_acc @ b.to(acc)) * factor
    if need_x:
        lowrank = ds @ a.to(acc)
        lowrank = lowrank if keep is None else lowrank * keep
        dx = (dy_acc @ weight.to(acc) + lowrank).to(x_dtype).reshape(*lead, weight.shape[1])
    if need_a:
        da = (ds.t() @ dropped).to(adapter_dtype)
    if need_b:
        # s as saved is a constant; where it depends on something that is being differentiated it is made again.
        s = s.to(acc) if dropped is None else dropped @ a.to(acc).t()
        db = ((dy_acc.t() @ s) * factor).to(adapter_dtype)
    if need_bias:
        dbias = dy_acc.sum(0).to(bias_dtype)
    if need_lora_bias:
        dlora_bias = (dy_acc.sum(0) * factor).to(adapter_dtype)
    return dx, dbias, da, db, dlora_bias
