"""The two torch.library ops of the fused LoRA linear: bodies, shapes, derivatives. For the formulas, ``ops/linear.py``.

Eager calls on plain tensors go straight to the bodies; a trace (compile, export, fake tensors) sees the registered ops,
which have derivatives of their own: an exported graph can be trained.
Autocast's choice of dtype is an argument of the ops, so that x and W are kept as they are and cast inside, in passing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import pieces
from .blocks import acc_dtype
from .checks import modes_active, without_autocast
from .derivatives import differentiable_backward, expressions_wanted
from .plan import Plan, plan_for

_library = torch.library.Library("fused_lora", "DEF")
_library.define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? lora_bias, "
    "float scale, Tensor? scale_tensor, Tensor? seed, float p, ScalarType dtype, str? strategy) "
    "-> (Tensor y, Tensor s)"
)
_library.define(
    "linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_a, Tensor? lora_b, Tensor? s, float scale, "
    "Tensor? scale_tensor, Tensor? seed, float p, ScalarType x_dtype, ScalarType adapter_dtype, ScalarType bias_dtype, "
    "SymInt in_features, SymInt rank, bool recast, bool[] need, str? strategy) "
    "-> (Tensor dx, Tensor dbias, Tensor da, Tensor db, Tensor dlora_bias)"
)


def as_factor(scale: float, scale_tensor: Tensor | None) -> float | Tensor:
    """The scale as one runtime value: a float where no device has to be asked for it."""
    if scale_tensor is None:
        return scale
    if scale_tensor.device.type == "cpu":
        return scale * scale_tensor.item()
    return scale_tensor if scale == 1.0 else scale_tensor * scale


def _lowers(plan: Plan, recast: bool) -> bool:
    """Whether the branch runs in autocast's dtype, as the plain layer's does under autocast.

    ``recast``: whether x or the weight is of another dtype. On a CPU alone, where products of float32 take several
    times as long as bfloat16's; kernels lose no time by float32.
    """
    facts = plan.facts
    return (
        recast
        and facts.dtype == torch.bfloat16 != facts.adapter_dtype
        and plan.strategy == "torch"
        and facts.device.type == "cpu"
        and not plan.upcast
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    scale: float,
    scale_tensor: Tensor | None,
    seed: Tensor | None,
    p: float,
    dtype: torch.dtype,
    strategy: str | None,
) -> tuple[Tensor, Tensor]:
    """Body of linear_forward: (y (..., N), s (M, R)); s is bfloat16 where one GEMM made it so."""
    N, K = weight.shape
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), K)
    plan = plan_for(rows.shape[0], N, K, a.shape[0], dtype, a.dtype, p > 0.0, x.device, strategy)
    factor = as_factor(scale, scale_tensor)
    mask = None if seed is None else pieces.Mask(seed, rows.shape[0], K, p)
    with without_autocast(x.device):
        rows = pieces.operand(plan, rows)
        if _lowers(plan, x.dtype != dtype or weight.dtype != dtype):
            rows, a, b = rows.to(dtype), a.to(dtype), b.to(dtype)
            lora_bias = None if lora_bias is None else lora_bias.to(dtype)
        s = pieces.shrink(plan, rows, a, mask, rounded=True)
        y = pieces.expand(plan, rows, pieces.operand(plan, weight), bias, s, b, lora_bias, factor)
    if x.dim() != 2:
        # Not .view: autograd forbids in-place work (an activation, += residual) on a view made inside a Function.
        y = torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], N))
    return y, s


def _forward_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    """:func:`forward` as an op, whose s has one dtype whatever the plan: the accumulation dtype."""
    y, s = forward(*arguments)
    return y, pieces.summed(s)


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, a: Tensor | None, b: Tensor | None, s: Tensor | None,
    scale: float, scale_tensor: Tensor | None, seed: Tensor | None, p: float,
    x_dtype: torch.dtype, adapter_dtype: torch.dtype, bias_dtype: torch.dtype, in_features: int, rank: int,
    recast: bool, need: list[bool], strategy: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Body of linear_backward; a gradient ``need`` (x, bias, a, b, lora_bias) does not ask for is None."""
    need_x, need_bias, need_a, need_b, need_lora_bias = need
    lead, N = dy.shape[:-1], dy.shape[-1]
    dy = dy if dy.dim() == 2 else dy.reshape(math.prod(lead), N)
    M, factor = dy.shape[0], as_factor(scale, scale_tensor)
    plan = plan_for(M, N, in_features, rank, dy.dtype, adapter_dtype, p > 0.0, dy.device, strategy)
    dx = dbias = da = db = dlora_bias = ds = rows = None
    with without_autocast(dy.device):
        if need_bias or need_lora_bias:
            total = dy.sum(0, dtype=acc_dtype(dy.dtype))
            dbias = total.to(bias_dtype) if need_bias else None
            dlora_bias = (total * factor).to(adapter_dtype) if need_lora_bias else None
        if lowers := _lowers(plan, recast):
            plan = plan_for(M, N, in_features, rank, dy.dtype, dy.dtype, p > 0.0, dy.device, strategy)
            x, a, b = (None if t is None else t.to(dy.dtype) for t in (x, a, b))
        if need_x or need_a or need_b:
            needed_b = b if need_x or need_a else None
            ds, db = pieces.grad_b(plan, dy, needed_b, s if need_b else None, factor, rounded=True)
        mask = None if seed is None else pieces.Mask(seed, M, in_features, p)
        if need_a and x is not None:
            rows = pieces.operand(plan, x if x.dim() == 2 else x.reshape(M, in_features))
        if need_x and weight is not None and a is not None and ds is not None:
            dx, da = pieces.grad_xa(plan, dy, rows, pieces.operand(plan, weight), ds, a, mask, x_dtype)
            dx = dx if len(lead) == 1 else dx.view(*lead, in_features)
        elif rows is not None and ds is not None:
            da = pieces.grad_a(plan, rows, ds, mask)
        if lowers:
            da, db = (None if grad is None else grad.to(adapter_dtype) for grad in (da, db))
    return dx, dbias, da, db, dlora_bias


def _backward_op(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """:func:`backward` as an op, which returns no None but an empty tensor each: its outputs must not alias."""
    return tuple(dy.new_empty(0) if grad is None else grad for grad in backward(dy, *arguments))


def _forward_fake(x, weight, bias, a, b, lora_bias, scale, scale_tensor, seed, p, dtype, strategy):
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    return y, x.new_empty(math.prod(x.shape[:-1]), a.shape[0], dtype=acc_dtype(a.dtype))


def _backward_fake(
    dy, x, weight, a, b, s, scale, scale_tensor, seed, p,
    x_dtype, adapter_dtype, bias_dtype, in_features, rank, recast, need, strategy,
):  # fmt: skip
    N = dy.shape[-1]
    shapes = ((*dy.shape[:-1], in_features), (N,), (rank, in_features), (N, rank), (N,))
    dtypes = (x_dtype, bias_dtype, adapter_dtype, adapter_dtype, adapter_dtype)
    return tuple(
        dy.new_empty(shape, dtype=dtype) if wanted else dy.new_empty(0)
        for shape, dtype, wanted in zip(shapes, dtypes, need, strict=True)
    )


_library.impl("linear_forward", _forward_op, "CompositeExplicitAutograd")
_library.impl("linear_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::linear_forward", _forward_fake, lib=_library)
torch.library.register_fake("fused_lora::linear_backward", _backward_fake, lib=_library)


_PLAIN = (Tensor, torch.nn.Parameter)


def plain(t: Tensor) -> bool:
    """Whether a call on ``t`` may skip the dispatcher: no trace, no tensor subclass, no mode that must see the ops."""
    return type(t) in _PLAIN and not torch.compiler.is_compiling() and not watched()


def watched() -> bool:
    """Whether a mode is active that must see the ops whole: a tracer's; or selective checkpointing's, which keeps some
    results of what it sees and forbids in-place work on them."""
    if not modes_active():
        return False
    modules = ("torch.utils.checkpoint", "torch.fx.experimental.proxy_tensor")
    return any(type(mode).__module__ in modules for mode in _get_current_dispatch_mode_stack())


def run_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """:func:`forward`, through the dispatcher where that has to see it."""
    return (forward if plain(x) else torch.ops.fused_lora.linear_forward)(x, *arguments)


def run_backward(dy: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """:func:`backward`, through the dispatcher where that has to see it."""
    if plain(dy):
        return backward(dy, *arguments)
    grads, need = torch.ops.fused_lora.linear_backward(dy, *arguments), arguments[-2]
    return tuple(grad if wanted else None for grad, wanted in zip(grads, need, strict=True))


def keep(ctx: Any, inputs: Any, output: Any) -> None:
    """Saves what the backward needs of the forward's ``inputs`` and of its ``output`` (y, s)."""
    x, weight, bias, a, b, _, scale, scale_tensor, seed, p, dtype, strategy = inputs
    need_x, _, _, need_a, need_b, _ = ctx.needs_input_grad[:6]
    # x for da; and for the derivative of db with respect to x, which only exists where both are wanted.
    keep_x = need_a or (need_b and need_x)
    ctx.save_for_backward(
        x if keep_x else None,
        weight if need_x else None,
        a if need_x or need_b else None,
        b if need_x or need_a else None,
        output[1] if need_b else None,
        seed,
        scale_tensor,
    )
    bias_dtype = a.dtype if bias is None else bias.dtype
    recast = x.dtype != dtype or weight.dtype != dtype
    ctx.constants = (scale, p, x.dtype, a.dtype, bias_dtype, a.shape[1], a.shape[0], recast, strategy)


def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the forward's twelve inputs after :func:`keep`; None where none is asked for."""
    x, weight, a, b, s, seed, scale_tensor = ctx.saved_tensors
    scale, p, x_dtype, adapter_dtype, bias_dtype, in_features, rank, recast, strategy = ctx.constants
    need_x, _, need_bias, need_a, need_b, need_lora_bias = ctx.needs_input_grad[:6]
    need = [need_x, need_bias, need_a, need_b, need_lora_bias]
    if not torch.compiler.is_compiling() and expressions_wanted(dy):
        factor = as_factor(scale, scale_tensor)
        with without_autocast(dy.device):
            grads = differentiable_backward(
                dy, x, weight, a, b, s, factor, seed, p, x_dtype, adapter_dtype, bias_dtype, in_features, need
            )
    else:
        grads = run_backward(
            dy, x, weight, a, b, s, scale, scale_tensor, seed, p,
            x_dtype, adapter_dtype, bias_dtype, in_features, rank, recast, need, strategy,
        )  # fmt: skip
    dx, dbias, da, db, dlora_bias = grads
    return dx, None, dbias, da, db, dlora_bias, None, None, None, None, None, None


# Of the second order, for graphs; eager calls come to differentiable_backward at once.


def _keep_first(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    keep(ctx, inputs, output)


def _keep_second(ctx: Any, inputs: Any, output: Any) -> None:
    dy, x, weight, a, b, s, scale, scale_tensor, seed, *constants, _, _, need, _ = inputs
    ctx.save_for_backward(dy, x, weight, a, b, s, scale_tensor, seed)
    ctx.constants = scale, (*constants, need)


def _second_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the backward's inputs: those of :func:`differentiable_backward`, made again."""
    dy, x, weight, a, b, s, scale_tensor, seed = ctx.saved_tensors
    scale, constants = ctx.constants
    wanted = ctx.needs_input_grad[:5]
    with torch.enable_grad(), without_autocast(dy.device):
        inputs = [
            None if t is None else t.detach().requires_grad_(want)
            for t, want in zip((dy, x, weight, a, b), wanted, strict=True)
        ]
        factor = as_factor(scale, scale_tensor)
        results: Any = differentiable_backward(*(*inputs, s, factor, seed, *constants))
        made = [(r, g) for r, g in zip(results, grads, strict=True) if r is not None and r.requires_grad]
        of = [t for t in inputs if t is not None and t.requires_grad]
        outputs, seeds = zip(*made, strict=True)
        found = iter(torch.autograd.grad(outputs, of, seeds, allow_unused=True))
    return (*(next(found) if t is not None and t.requires_grad else None for t in inputs), *[None] * 13)


torch.library.register_autograd(
    "fused_lora::linear_forward", lambda ctx, dy, _: gradients(ctx, dy), setup_context=_keep_first, lib=_library
)
torch.library.register_autograd(
    "fused_lora::linear_backward", _second_gradients, setup_context=_keep_second, lib=_library
)
