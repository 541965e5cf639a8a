"""The fused LoRA linear: two torch.library ops, one autograd Function, one function.

    y  = x Wᵀ + bias + scale · (s Bᵀ + lora_bias)        s  = drop(x) Aᵀ
    ds = scale · dy B      db = scale · dyᵀ s      da = dsᵀ drop(x)      dx = dy W + drop'(ds A)

x (..., K)   weight W (N, K) frozen   bias (N,)   lora_a A (R, K)   lora_b B (N, R)   y, dy (..., N)   s, ds (M, R)
M = rows of x. Kept for the backward: x (an alias), s, the seed; never a tensor of size M x K or M x N.

Eager calls on plain tensors go straight to the bodies; a trace (compile, export, fake tensors) sees the registered ops.
Autocast's choice of dtype is an argument of the ops, so that x and W are kept as they are and cast inside, in passing.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from .. import pieces, reference
from ..checks import autocasting, check_operands, check_scale, check_switch
from ..derivatives import differentiable_backward
from ..dropout import as_seed, check_p, check_seed
from ..plan import Facts, Plan, device_facts, interpreting, make_plan, parse_request, plan_for
from ..vendor import acc_dtype

_library = torch.library.Library("fused_lora", "DEF")
_library.define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? lora_bias, "
    "float scale, Tensor? scale_tensor, Tensor? seed, float p, ScalarType dtype, str? strategy) "
    "-> (Tensor y, Tensor s)"
)
_library.define(
    "linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_a, Tensor? lora_b, Tensor? s, float scale, "
    "Tensor? scale_tensor, Tensor? seed, float p, ScalarType x_dtype, ScalarType adapter_dtype, ScalarType bias_dtype, "
    "SymInt in_features, SymInt rank, bool[] need, str? strategy) "
    "-> (Tensor dx, Tensor dbias, Tensor da, Tensor db, Tensor dlora_bias)"
)


def _factor(scale: float, scale_tensor: Tensor | None) -> float | Tensor:
    """The scale as one runtime value: a float where no device has to be asked for it."""
    if scale_tensor is None:
        return scale
    if scale_tensor.device.type == "cpu":
        return scale * scale_tensor.item()
    return scale_tensor if scale == 1.0 else scale_tensor * scale


def _lowers(plan: Plan, x_dtype: torch.dtype, weight: Tensor | None) -> bool:
    """Whether the branch runs in autocast's dtype, as the plain layer's does under autocast (x or weight tells of it).

    On a CPU alone, where products of float32 take several times as long as bfloat16's; kernels lose no time by float32.
    """
    facts = plan.facts
    return (
        (x_dtype != facts.dtype or (weight is not None and weight.dtype != facts.dtype))
        and facts.dtype == torch.bfloat16 != facts.adapter_dtype
        and plan.strategy == "torch"
        and facts.device.type == "cpu"
        and not plan.upcast
    )


_NOTHING = contextlib.nullcontext()


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The bodies choose their dtypes themselves."""
    if torch._C._is_any_autocast_enabled() and autocasting(device.type):  # the name of a device takes longer to ask for
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


def _forward(
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
    factor = _factor(scale, scale_tensor)
    mask = None if seed is None else pieces.Mask(seed, rows.shape[0], K, p)
    with _without_autocast(x.device):
        rows = pieces.operand(plan, rows)
        if _lowers(plan, x.dtype, weight):
            rows, a, b = rows.to(dtype), a.to(dtype), b.to(dtype)
            lora_bias = None if lora_bias is None else lora_bias.to(dtype)
        s = pieces.shrink(plan, rows, a, mask, rounded=True)
        y = pieces.expand(plan, rows, pieces.operand(plan, weight), bias, s, b, lora_bias, factor)
    if x.dim() != 2:
        # Not .view: autograd forbids in-place work (an activation, += residual) on a view made inside a Function.
        y = torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], N))
    return y, s


def _forward_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    """:func:`_forward` as an op, whose s has one dtype whatever the plan: the accumulation dtype."""
    y, s = _forward(*arguments)
    return y, pieces.summed(s)


def _backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, a: Tensor | None, b: Tensor | None, s: Tensor | None,
    scale: float, scale_tensor: Tensor | None, seed: Tensor | None, p: float,
    x_dtype: torch.dtype, adapter_dtype: torch.dtype, bias_dtype: torch.dtype, in_features: int, rank: int,
    need: list[bool], strategy: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Body of linear_backward; a gradient ``need`` (x, bias, a, b, lora_bias) does not ask for is None."""
    need_x, need_bias, need_a, need_b, need_lora_bias = need
    lead, N = dy.shape[:-1], dy.shape[-1]
    dy = dy if dy.dim() == 2 else dy.reshape(math.prod(lead), N)
    M, factor = dy.shape[0], _factor(scale, scale_tensor)
    plan = plan_for(M, N, in_features, rank, dy.dtype, adapter_dtype, p > 0.0, dy.device, strategy)
    dx = dbias = da = db = dlora_bias = ds = rows = None
    with _without_autocast(dy.device):
        if need_bias or need_lora_bias:
            total = dy.sum(0, dtype=acc_dtype(dy.dtype))
            dbias = total.to(bias_dtype) if need_bias else None
            dlora_bias = (total * factor).to(adapter_dtype) if need_lora_bias else None
        if lowers := _lowers(plan, x_dtype, weight):
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
    """:func:`_backward` as an op, which returns no None but an empty tensor each: its outputs must not alias."""
    return tuple(dy.new_empty(0) if grad is None else grad for grad in _backward(dy, *arguments))


def _forward_fake(x, weight, bias, a, b, lora_bias, scale, scale_tensor, seed, p, dtype, strategy):
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    return y, x.new_empty(math.prod(x.shape[:-1]), a.shape[0], dtype=acc_dtype(a.dtype))


def _backward_fake(
    dy, x, weight, a, b, s, scale, scale_tensor, seed, p,
    x_dtype, adapter_dtype, bias_dtype, in_features, rank, need, strategy,
):  # fmt: skip
    N = dy.shape[-1]
    shapes = ((*dy.shape[:-1], in_features), (N,), (rank, in_features), (N, rank), (N,))
    dtypes = (x_dtype, bias_dtype, adapter_dtype, adapter_dtype, adapter_dtype)
    return tuple(
        dy.new_empty(shape, dtype=dtype) if wanted else dy.new_empty(0)
        for shape, dtype, wanted in zip(shapes, dtypes, need, strict=True)
    )


# Without grad: an exported graph calls the ops outside the Function that differentiates them.
_library.impl("linear_forward", torch.no_grad()(_forward_op), "CompositeExplicitAutograd")
_library.impl("linear_backward", torch.no_grad()(_backward_op), "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::linear_forward", _forward_fake, lib=_library)
torch.library.register_fake("fused_lora::linear_backward", _backward_fake, lib=_library)


def _plain(t: Tensor) -> bool:
    """Whether an eager call on ``t`` may skip the dispatcher: no trace, no tensor subclass."""
    return type(t) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _batched(t: Tensor) -> bool:
    """Whether autograd passes many gradients at once (``is_grads_batched=True``): no in-place work on those."""
    return torch._C._functorch.is_legacy_batchedtensor(t)


class FusedLoRALinear(torch.autograd.Function):
    """The autograd Function behind :func:`lora_linear`; ``apply`` takes the forward op's arguments in order.

    The backward computes what ``needs_input_grad`` asks for and nothing else. With ``create_graph=True`` it is made of
    differentiable expressions, so every higher derivative exists.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, lora_bias, scale, scale_tensor, seed, p, dtype, strategy):
        op = _forward if _plain(x) else torch.ops.fused_lora.linear_forward
        y, s = op(x, weight, bias, a, b, lora_bias, scale, scale_tensor, seed, p, dtype, strategy)
        need_x, _, _, need_a, need_b, _ = ctx.needs_input_grad[:6]
        # x for da; and for the derivative of db with respect to x, which only exists where both are wanted.
        keep_x = need_a or (need_b and need_x)
        ctx.save_for_backward(
            x if keep_x else None,
            weight if need_x or weight.dtype != dtype else None,  # its dtype tells the backward of autocast
            a if need_x or need_b else None,
            b if need_x or need_a else None,
            s if need_b else None,
            seed,
            scale_tensor,
        )
        bias_dtype = a.dtype if bias is None else bias.dtype
        ctx.constants = (scale, p, x.dtype, a.dtype, bias_dtype, a.shape[1], a.shape[0], strategy)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, s, seed, scale_tensor = ctx.saved_tensors
        scale, p, x_dtype, adapter_dtype, bias_dtype, in_features, rank, strategy = ctx.constants
        need_x, _, need_bias, need_a, need_b, need_lora_bias = ctx.needs_input_grad[:6]
        need = [need_x, need_bias, need_a, need_b, need_lora_bias]
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or _batched(dy)):
            factor = _factor(scale, scale_tensor)
            with _without_autocast(dy.device):
                grads = differentiable_backward(
                    dy, x, weight, a, b, s, factor, seed, p, x_dtype, adapter_dtype, bias_dtype, in_features, need
                )
        else:
            op = _backward if _plain(dy) else torch.ops.fused_lora.linear_backward
            grads = op(
                dy, x, weight, a, b, s, scale, scale_tensor, seed, p,
                x_dtype, adapter_dtype, bias_dtype, in_features, rank, need, strategy,
            )  # fmt: skip
        dx, dbias, da, db, dlora_bias = (g if wanted else None for g, wanted in zip(grads, need, strict=True))
        return dx, None, dbias, da, db, dlora_bias, None, None, None, None, None, None


_function_apply: Any = super(torch.autograd.Function, FusedLoRALinear).apply


def _apply(x, weight, bias, a, b, lora_bias, *constants):
    """``FusedLoRALinear.apply``, in eager without the search for functorch's wrappers among all the arguments.

    That search takes as long as a product of a small layer. Wrappers that outlived their transform are looked for among
    the tensors that autograd follows; no transform is active here (:func:`_transformed`).
    """
    if torch.compiler.is_compiling():
        return FusedLoRALinear.apply(x, weight, bias, a, b, lora_bias, *constants)
    alive = torch._C._functorch.unwrap_if_dead
    bias = None if bias is None else alive(bias)
    lora_bias = None if lora_bias is None else alive(lora_bias)
    return _function_apply(alive(x), alive(weight), bias, alive(a), alive(b), lora_bias, *constants)


def _transformed() -> bool:
    """Whether a functorch transform or forward-mode AD is active: they differentiate the formula itself."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


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
    """LoRA linear, fused forward and backward.

    ``y = x Wᵀ + bias + scale · ((drop(x) Aᵀ) Bᵀ + lora_bias)``

    Args:
        x: (..., K), float64, float32, bfloat16 or float16, any strides, any number of rows (0 included).
        weight: (N, K), frozen, in the dtype of x (or any but float64 under autocast).
        lora_a: (R, K), in the dtype the layer computes in, or float32 over bfloat16 and float16 (PEFT's default).
        lora_b: (N, R), same dtype as lora_a.
        scale: float, or a 0-d tensor; a runtime value, so another scale compiles nothing.
        bias: (N,), frozen or trainable, or None.
        dropout_p: probability of zeroing an element of x before A, in [0, 1].
        training: dropout is applied only when True.
        lora_bias: (N,), scaled like the rest of the branch (PEFT's ``lora_bias``), or None.
        seed: of the dropout mask (:func:`fused_lora.dropout.keep_mask`): int, or int64 tensor with one element.
            None draws one from torch's default generator of x's device.
        strategy: None lets the plan choose; ``"torch"``, ``"triton"`` or ``"reference"`` forces (``plan.py`` lists
            the forms).

    Returns:
        y (..., N) in the dtype of x, or autocast's. Sums are kept in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: dtypes that do not go together; a scale or seed of another type.
        ValueError: shapes or devices that do not fit; dropout_p outside [0, 1]; a scale that is not finite; a weight
            that requires grad; an unknown strategy, or one that cannot run here (the message says why).

    Source: Hu et al., LoRA, arXiv 2106.09685, equation 3. Gradients: ``docs/math.md``. Numerics: ``docs/numerics.md``.
    """
    dtype = check_operands(x, weight, lora_a, lora_b, bias, lora_bias)
    scale, scale_tensor = check_scale(scale, x.device)
    p = check_p(dropout_p)
    p = p if check_switch(training, "training") else 0.0
    check_seed(seed)
    composite = strategy == "reference" or _transformed()
    if strategy is not None and (composite or not torch.compiler.is_compiling()):
        # A request that cannot be met is refused here, before any work; in a compiled graph the op refuses it.
        parse_request(strategy)
        if not composite:
            N, K = weight.shape
            plan_for(0, N, K, lora_a.shape[0], dtype, lora_a.dtype, p > 0.0, x.device, strategy)
    seed_tensor = as_seed(seed, x.device) if p > 0.0 else None
    if composite:
        factor = scale if scale_tensor is None else scale_tensor
        return reference.lora_linear(
            x, weight, lora_a, lora_b, factor, bias, dropout_p=p, lora_bias=lora_bias, seed=seed_tensor
        )
    return _apply(x, weight, bias, lora_a, lora_b, lora_bias, scale, scale_tensor, seed_tensor, p, dtype, strategy)


def explain(
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
) -> Plan:
    """The plan :func:`lora_linear` would follow for these arguments, with its reasons; nothing runs. ``print`` it.

    Same arguments, checks and errors as :func:`lora_linear`.
    """
    dtype = check_operands(x, weight, lora_a, lora_b, bias, lora_bias)
    check_scale(scale, x.device)
    p = check_p(dropout_p)
    check_seed(seed)
    N, K = weight.shape
    dropout = check_switch(training, "training") and p > 0.0
    device = device_facts(x.device, interpreting())
    facts = Facts(math.prod(x.shape[:-1]), N, K, lora_a.shape[0], dtype, lora_a.dtype, dropout, device)
    return make_plan(facts, strategy)
