"""The fused LoRA linear: one autograd Function, one function; the ops below them are in ``registered.py``.

    y  = x Wᵀ + bias + scale · (s Bᵀ + lora_bias)        s  = drop(x) Aᵀ
    ds = scale · dy B      db = scale · dyᵀ s      da = dsᵀ drop(x)      dx = dy W + drop'(ds A)

x (..., K)   weight W (N, K) frozen   bias (N,)   lora_a A (R, K)   lora_b B (N, R)   y, dy (..., N)   s, ds (M, R)
M = rows of x. Kept for the backward: x (an alias), s, the seed; never a tensor of size M x K or M x N.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference, registered
from ..checks import check_operands, check_scale, check_switch
from ..derivatives import transformed
from ..dropout import as_seed, check_p, check_seed
from ..plan import Facts, Plan, device_facts, interpreting, make_plan, parse_request, plan_for


class FusedLoRALinear(torch.autograd.Function):
    """The autograd Function behind :func:`lora_linear`; ``apply`` takes the forward op's arguments in order.

    The backward computes what ``needs_input_grad`` asks for and nothing else. With ``create_graph=True`` it is made of
    differentiable expressions, so every higher derivative exists.
    """

    @staticmethod
    def forward(ctx, *inputs):
        y, s = registered.run_forward(*inputs)
        registered.keep(ctx, inputs, (y, s))
        return y

    @staticmethod
    def backward(ctx, dy):
        return registered.gradients(ctx, dy)


_function_apply: Any = super(torch.autograd.Function, FusedLoRALinear).apply


def apply_linear(x, weight, bias, a, b, lora_bias, *constants):
    """``FusedLoRALinear.apply``, in eager without the search for functorch's wrappers among all the arguments.

    That search takes as long as a product of a small layer. Wrappers that outlived their transform are looked for among
    the tensors that autograd follows; no transform is active here (:func:`transformed`).
    """
    if torch.compiler.is_compiling():  # the op has derivatives of its own, which an exported graph keeps
        return torch.ops.fused_lora.linear_forward(x, weight, bias, a, b, lora_bias, *constants)[0]
    alive = torch._C._functorch.unwrap_if_dead
    bias = None if bias is None else alive(bias)
    lora_bias = None if lora_bias is None else alive(lora_bias)
    return _function_apply(alive(x), alive(weight), bias, alive(a), alive(b), lora_bias, *constants)


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
        scale: float, or a 0-d tensor. In a compiled graph a tensor is a runtime value, a float a constant of the graph.
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
    composite = strategy == "reference" or transformed()
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
    return apply_linear(
        x, weight, bias, lora_a, lora_b, lora_bias, scale, scale_tensor, seed_tensor, p, dtype, strategy
    )


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
