"""What a patched PEFT layer does with one call: the fused operator, where ``peft_parts.py`` finds no reason against it.

    y = x Wᵀ + bias + Σ scale · (drop(x) Aᵀ Bᵀ + lora_bias)        the sum runs over the active adapters

x (..., K)   weight W (N, K), or (K, N) in a transformers Conv1D   lora_A (R, K)   lora_B (N, R)   y (..., N)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .dora import Norms, dora_forward
from .dropout import draw_seed
from .ops.linear import apply_linear
from .peft_mixed import Constants as Mixed
from .peft_mixed import Span, mixed_linear
from .peft_parts import Branch, route, route_mixed
from .peft_several import Constants, FusedSeveralLinear
from .substitution import LOW_PRECISION


def fused_forward(layer: Any, x: Tensor) -> Tensor | None:
    """y, or None where PEFT's forward must run."""
    chosen = route(layer, x)
    if isinstance(chosen, str):
        return None
    parts, dtype = chosen
    weight = parts.weight.t() if parts.transposed else parts.weight
    branch = parts.branches[0]
    if layer.__dict__.get("_fused_lora_dropout") == "torch" and any(branch.p for branch in parts.branches):
        return _torch_dropout_forward(layer, x, parts.branches)
    if branch.magnitude is not None:
        return dora_forward(x, weight, parts.bias, branch, dtype, _norms(layer, branch.name))
    if len(parts.branches) > 1:
        return _several(x, weight, parts.bias, parts.branches, dtype)
    return _linear(x, weight, parts.bias, branch, dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, branch: Branch, dtype: torch.dtype) -> Tensor:
    scale, scale_tensor = (1.0, branch.scale) if isinstance(branch.scale, Tensor) else (branch.scale, None)
    seed = draw_seed(x.device) if branch.p else None
    # Not through lora_linear: its checks are the ones that have just been made.
    return apply_linear(
        x, weight, bias, branch.a, branch.b, branch.bias, scale, scale_tensor, seed, branch.p, dtype, None
    )


def _several(x: Tensor, weight: Tensor, bias: Tensor | None, branches: list[Branch], dtype: torch.dtype) -> Tensor:
    """Several adapters as one whose factors stand side by side along the rank; each keeps a mask of its own."""
    factors, b, lora_bias, scale = _side_by_side(branches, dtype)
    if not any(branch.p for branch in branches):
        one = branches[0]._replace(a=torch.cat(factors), b=b, bias=lora_bias, scale=scale)
        return _linear(x, weight, bias, one, dtype)
    seeds = tuple(draw_seed(x.device) if branch.p else None for branch in branches)
    constants = Constants(scale, dtype, seeds, tuple(branch.p for branch in branches))
    return FusedSeveralLinear.apply(x, weight, bias, b, lora_bias, constants, *factors)


def _side_by_side(branches: list[Branch], dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor | None, float]:
    """(each A, all B side by side, the sum of the lora_bias, scale) in one dtype; differing scales are inside B.

    In bfloat16 and float16 a scale inside lora_B would be rounded, so those factors become float32 first; float32 too
    where adapters of both dtypes are active, which changes no value.
    """
    scales = [branch.scale for branch in branches]
    shared = all(not isinstance(scale, Tensor) and scale == scales[0] for scale in scales)
    same = all(branch.a.dtype == branches[0].a.dtype for branch in branches)
    wide = branches[0].a.dtype if same and (shared or dtype not in LOW_PRECISION) else torch.float32
    factors = [branch.a.to(wide) for branch in branches]
    b = torch.cat([branch.b.to(wide) if shared else branch.b.to(wide) * branch.scale for branch in branches], dim=1)
    biases = [
        branch.bias.to(wide) if shared else branch.bias.to(wide) * branch.scale
        for branch in branches
        if branch.bias is not None
    ]
    return factors, b, sum(biases[1:], biases[0]) if biases else None, float(scales[0]) if shared else 1.0


def _torch_dropout_forward(layer: Any, x: Tensor, branches: list[Branch]) -> Tensor | None:
    """PEFT's own arithmetic with nn.Dropout's own bits; the branches are checkpointed: only x is kept of them.

    The backward restores the random state they were run with and draws the same masks again.
    """
    if not torch.is_grad_enabled():
        return None
    result = base = layer._modules["base_layer"](x)
    casting = layer.cast_input_dtype_enabled
    for delta in checkpoint(_plain_branches, x, branches, casting, use_reentrant=False):
        result = result + delta
    return result.to(base.dtype)


def _plain_branches(x: Tensor, branches: list[Branch], casting: bool) -> list[Tensor]:
    x = x.to(branches[0].a.dtype) if casting else x
    return [F.linear(F.linear(f.dropout(x), f.a), f.b, f.bias) * f.scale for f in branches]


def _norms(layer: Any, name: str) -> Norms:
    """The layer's store of DoRA column norms for one adapter."""
    store = layer.__dict__.setdefault("_fused_lora_norms", {})
    if name not in store:
        store[name] = Norms()
    return store[name]


def mixed_forward(layer: Any, x: Tensor, names: list[str]) -> Tensor | None:
    """y of a batch in which sample i uses adapter names[i] ("__base__": none), or None where PEFT's forward must run.

    Samples are brought together by adapter once, so that every delta is added in place to a slice of one base product.
    """
    chosen = route_mixed(layer, x, names)
    if isinstance(chosen, str):
        return None
    parts, dtype = chosen
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    order = sorted(range(len(names)), key=lambda i: place[names[i]])
    index = None if order == list(range(len(names))) else torch.tensor(order, device=x.device)
    # On a CPU a product of float32 takes several times as long as one of bfloat16, where PEFT's runs under autocast.
    narrow = dtype if x.dtype != dtype and x.device.type == "cpu" else None
    branches = {branch.name: branch for branch in parts.branches}
    spans: list[Span] = []
    factors: list[Tensor | None] = []
    start = 0
    for name in place:
        stop = start + names.count(name)
        if name in branches:
            scale, found = _constant_scale(branches[name], dtype)
            spans.append(Span(start, stop, scale))
            factors += found if narrow is None else [None if t is None else t.to(narrow) for t in found]
        start = stop
    weight = parts.weight.t() if parts.transposed else parts.weight
    return mixed_linear(x, weight, parts.bias, index, Mixed(tuple(spans), dtype), factors)


def _constant_scale(branch: Branch, dtype: torch.dtype) -> tuple[float, list[Tensor | None]]:
    """(scale, [A, B, lora_bias]), a scale in a tensor inside B, in float32 as in :func:`_side_by_side`."""
    if not isinstance(branch.scale, Tensor):
        return branch.scale, [branch.a, branch.b, branch.bias]
    (a,), b, lora_bias, scale = _side_by_side([branch], dtype)
    return scale, [a, b, lora_bias]
