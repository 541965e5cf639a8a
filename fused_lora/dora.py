"""DoRA over a frozen linear layer, without ever building the dense update B A. For LoRALinear and for PEFT's layers.

    y = bias + mag ⊙ z    z = u + scale · s Bᵀ    u = x Wᵀ    s = x Aᵀ    mag = magnitude / ‖W + scale · B A‖ by row

    dz = dy ⊙ mag    dx = dz W + scale · (dz B) A    da = (scale · dy (mag ⊙ B))ᵀ x    db = mag ⊙ (scale · dyᵀ s)
    dmag = Σ_rows dy ⊙ z

x (..., K)   weight W (N, K) frozen   a (R, K)   b (N, R)   bias, mag (N,)   s (M, R)   u, y, z (..., N)

As in PEFT the norm is a constant for the gradient (Liu et al., DoRA, arXiv 2402.09353, section 4.3). Kept for the
backward: x (an alias), s, u. The factors' gradients come from dy, not from a rounded dz, so that float32 adapters over
a bfloat16 base get float32 gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .checks import without_autocast
from .derivatives import expressions_wanted
from .dropout import draw_seed, keep_mask, keep_scale
from .ops.linear import FusedLoRALinear
from .registered import run_backward

# Elements that are in the accumulation dtype at one time during a product with A.
_BLOCK = 1 << 22


class Adapter(NamedTuple):
    """What :func:`dora_forward` reads of an adapter: a (R, K), b (N, R), magnitude (N,), scale, probability p."""

    a: Tensor
    b: Tensor
    magnitude: Tensor
    scale: float | Tensor
    p: float


class Norms:
    """The norms ‖W + scale · B A‖ of one adapter on one layer, with what can be reused of them from call to call.

    ‖W‖² is kept as long as W is the same memory in the same version. On a CPU the whole result is kept too, as long
    as A, B and the scale have the same values: PEFT's hot swap writes factors through ``.data``, which no version
    counter shows, and on a GPU the comparison would wait for the device. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._weight_key: tuple[Any, ...] | None = None
        self._weight_squares: Tensor | None = None
        self._factors: tuple[Tensor, Tensor, float] | None = None
        self._result: Tensor | None = None

    def __reduce__(self) -> tuple[type[Norms], tuple[()]]:
        return Norms, ()

    # What is kept must serve a training step later, so no inference tensors are made.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, acc: torch.dtype) -> Tensor:
        """(N,) in ``acc``."""
        key = _key(weight, acc)
        if key is None or key != self._weight_key:
            self._weight_squares = torch.linalg.vector_norm(weight, dim=1, dtype=acc).to(_sums(weight)).square_()
            self._weight_key, self._factors = key, None
        if weight.device.type != "cpu":
            return self._compute(weight, a, b, scale, acc)
        scale = float(scale)
        known = self._factors
        if known is None or known[2] != scale or not (_same(known[0], a) and _same(known[1], b)):
            self._result = self._compute(weight, a, b, scale, acc)
            self._factors = (a.detach().clone(), b.detach().clone(), scale)
        assert self._result is not None
        return self._result

    def _compute(self, weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, acc: torch.dtype) -> Tensor:
        """‖w + scale · a b‖² = ‖w‖² + 2 scale · b·(a w) + scale² · b·(a aᵀ) b for each row w of W and b of B."""
        assert self._weight_squares is not None
        with without_autocast(weight.device):
            return _norms(self._weight_squares, weight, a, b, scale, acc)


def _key(weight: Tensor, acc: torch.dtype) -> tuple[Any, ...] | None:
    """What tells a W from another, or from itself changed in place; None for an inference tensor, which counts no
    versions. The weak reference keeps a freed memory's name, though not the memory, from being given to another."""
    if weight.is_inference():
        return None
    memory = StorageWeakRef(weight.untyped_storage())
    place = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight.device)
    return (memory, weight._version, *place, acc)


def _norms(squares: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, acc: torch.dtype) -> Tensor:
    """The root of ‖w‖² + 2 scale · b·(a w) + scale² · b·(a aᵀ) b for each row; squares are the ‖w‖²."""
    # Sums of a rank's length cost nothing in float64, and the three terms may cancel.
    products = _skinny(weight, a.to(acc)).to(_sums(weight))
    a, b = a.to(products.dtype), b.to(products.dtype)
    cross = (products * b).sum(1)
    square = (torch.mm(b, torch.mm(a, a.t())) * b).sum(1)
    # Rounding can leave a row that the update cancels slightly below zero.
    return (squares + 2 * scale * cross + scale * scale * square).clamp(min=0).sqrt().to(acc)


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """‖W + scale · B A‖ by row, (N,), in float32 (float64 for a float64 layer), without what Norms keeps."""
    acc = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad(), without_autocast(weight.device):
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=acc).to(_sums(weight)).square()
        return _norms(squares, weight, a.detach(), b.detach(), scale, acc)


def dora_formula(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """:func:`dora_forward` in plain differentiable operations, the same in every call: for torch.compile, functorch's
    transforms, and dispatch modes."""
    acc = torch.promote_types(weight.dtype, torch.float32)
    mag = adapter.magnitude.to(acc) / row_norms(weight, adapter.a, adapter.b, adapter.scale)
    with without_autocast(x.device):
        x, weight = x.to(dtype), weight.to(dtype)
        dropped = F.dropout(x, adapter.p)
        u = F.linear(dropped, weight)
        delta = F.linear(F.linear(dropped.to(acc), adapter.a.to(acc)) * adapter.scale, adapter.b.to(acc))
        y = (u + delta) * mag if not adapter.p else F.linear(x, weight) + u * (mag - 1) + delta * mag
        return (y if bias is None else y + bias.to(acc)).to(dtype)


def _sums(t: Tensor) -> torch.dtype:
    return torch.float32 if t.device.type == "mps" else torch.float64


def _same(known: Tensor, now: Tensor) -> bool:
    return known.dtype == now.dtype and torch.equal(known, now)


def _skinny(t: Tensor, a: Tensor) -> Tensor:
    """t aᵀ in the dtype of a, block by block, so that t (rows, K) never exists whole in that dtype."""
    blocks = t.split(max(_BLOCK // max(t.shape[1], 1), 1)) if t.dtype != a.dtype else (t,)
    return torch.cat([torch.mm(block.to(a.dtype), a.t()) for block in blocks])


class FusedDoRALinear(torch.autograd.Function):
    """y = bias + mag ⊙ (x Wᵀ + scale · (x Aᵀ) Bᵀ); mag is float32, or float64."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, mag, scale, scale_tensor, dtype):
        factor, acc = scale if scale_tensor is None else scale_tensor, mag.dtype
        with without_autocast(x.device):
            u = y = F.linear(x.to(dtype), weight.to(dtype), bias if dtype == acc else None)
            s = _skinny(x.reshape(x.shape[:-1].numel(), x.shape[-1]), a.to(acc))
            if bias is None:
                y = u * mag
            elif dtype == acc:
                # As PEFT does it: where mag is 1, as it starts, y is the frozen layer's output bit for bit.
                u = y - bias
                y = torch.addcmul(y, u, mag - 1)
            else:
                y = torch.addcmul(bias.to(acc), u, mag)
            y.view(s.shape[0], mag.shape[0]).addmm_(s * factor, (b.to(acc) * mag[:, None]).t())
        need_a, need_b, need_mag = ctx.needs_input_grad[3:6]
        keep_x = need_a or need_b or need_mag  # the last two for double backward
        keep_s, keep_u = need_b or need_mag, need_mag
        kept = (x if keep_x else None, weight, a, b, mag, s if keep_s else None, u if keep_u else None, scale_tensor)
        ctx.save_for_backward(*kept)
        ctx.constants = (scale, x.dtype, None if bias is None else bias.dtype)
        return y.to(dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, mag, s, u, scale_tensor = ctx.saved_tensors
        scale, x_dtype, bias_dtype = ctx.constants
        need_x, _, need_bias, need_a, need_b, need_mag = ctx.needs_input_grad[:6]
        if expressions_wanted(dy):
            factor = scale if scale_tensor is None else scale_tensor
            with without_autocast(dy.device):
                return _differentiable_backward(
                    dy, x, weight, a, b, mag, factor, x_dtype, bias_dtype, ctx.needs_input_grad
                )
        acc = mag.dtype
        mag_b = (b.to(acc) * mag[:, None]).to(b.dtype)
        constants = (x_dtype, b.dtype, b.dtype, weight.shape[1], b.shape[1], x_dtype != dy.dtype)
        dx = dbias = da = db = dmag = None
        if need_a or need_b:
            need = [False, False, need_a, need_b, False]
            _, _, da, db, _ = run_backward(
                dy, x, None, None, mag_b, s, scale, scale_tensor, None, 0.0, *constants, need, None
            )
            db = (db.to(acc) * mag[:, None]).to(b.dtype) if need_b and db is not None else None
        lead = tuple(range(dy.dim() - 1))
        if need_mag:
            t = s * (scale if scale_tensor is None else scale_tensor)
            z = torch.addmm(u.reshape(s.shape[0], mag.shape[0]).to(acc), t, b.to(acc).t())
            dmag = (dy.reshape(z.shape) * z).sum(0)
        if need_x:
            dz, need = (dy * mag).to(dy.dtype), [True, False, False, False, False]
            dx = run_backward(dz, None, weight, a, b, None, scale, scale_tensor, None, 0.0, *constants, need, None)[0]
        if need_bias:
            dbias = dy.sum(lead, dtype=acc).to(bias_dtype)
        return dx, None, dbias, da if need_a else None, db, dmag, None, None, None


def _differentiable_backward(dy, x, weight, a, b, mag, factor, x_dtype, bias_dtype, need):
    """The same gradients as expressions that can be differentiated again (create_graph=True), or mapped."""
    acc = mag.dtype
    lead = dy.shape[:-1]
    dy = dy.reshape(lead.numel(), dy.shape[-1]).to(acc)
    weight, a_acc, b_acc = weight.to(acc), a.to(acc), b.to(acc)
    dz = dy * mag
    ds = dz @ b_acc * factor
    dx = (dz @ weight + ds @ a_acc).to(x_dtype).reshape(*lead, weight.shape[1]) if need[0] else None
    dbias = dy.sum(0).to(bias_dtype) if need[2] else None
    da = db = dmag = None
    if x is not None:
        rows = x.reshape(dy.shape[0], x.shape[-1]).to(acc)
        s = rows @ a_acc.t()
        da = (ds.t() @ rows).to(a.dtype) if need[3] else None
        db = (dz.t() @ s * factor).to(b.dtype) if need[4] else None
        dmag = (dy * (rows @ weight.t() + s @ b_acc.t() * factor)).sum(0) if need[5] else None
    return dx, None, dbias, da, db, dmag, None, None, None


def dora_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, branch: Any, dtype: torch.dtype, norms: Norms
) -> Tensor:
    """DoRA's output for one adapter, an :class:`Adapter` or what has its attributes.

    With dropout the base layer runs on the dropped x as well, as in PEFT:
    ``y = x Wᵀ + bias + (mag - 1) ⊙ (xd Wᵀ) + scale · (xd Aᵀ)(mag ⊙ B)ᵀ`` with xd = drop(x), one mask.
    """
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    mag = branch.magnitude.to(acc) / norms(weight, branch.a, branch.b, branch.scale, acc)
    scale, scale_tensor = (1.0, branch.scale) if isinstance(branch.scale, Tensor) else (branch.scale, None)
    if not branch.p:
        arguments = (x, weight, bias, branch.a, branch.b, mag, scale, scale_tensor, dtype)
        return FusedDoRALinear.apply(*arguments)
    seed = draw_seed(x.device)
    keep = keep_mask(seed, x.shape[:-1].numel(), x.shape[-1], branch.p).view(x.shape)
    # In the adapter's dtype, as PEFT does it: the gradient of the magnitude has float32 quality there.
    wide = branch.a.dtype
    extra = F.linear(torch.where(keep, x, 0.0).to(wide), weight.to(wide)) * ((mag - 1) * keep_scale(branch.p))
    b = (branch.b * mag[:, None]).to(branch.b.dtype)
    y = FusedLoRALinear.apply(x, weight, bias, branch.a, b, None, scale, scale_tensor, seed, branch.p, dtype, None)
    return (y + extra).to(dtype)
