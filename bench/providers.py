"""What is timed: the frozen layer, ours per strategy, and the ways LoRA is written elsewhere. One input for all.

    y = x Wᵀ + scale · (drop(x) Aᵀ) Bᵀ

x (M, K)   weight W (N, K) frozen   lora_a A (R, K)   lora_b B (N, R)   y, dy (M, N)   s = drop(x) Aᵀ (M, R)

Every layer takes x with requires_grad, as a layer inside a network does, and trains A and B; none of them gives W a
gradient. W is one tensor for all; A and B are equal copies. No bias: the models of ``shapes.py`` have none.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peers import loralib_layer, loralib_refusal, torchtune_layer, torchtune_refusal
from shapes import REGIMES, SCALE, Case
from torch import Tensor, nn

from fused_lora import lora_linear, reference
from fused_lora.plan import Facts, device_facts, interpreting, make_plan, triton_refusal


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case: x and dy as given to every provider, the values of W, A and B."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor


@functools.lru_cache(maxsize=1)
def make_inputs(M: int, K: int, N: int, rank: int, regime: str, device: torch.device) -> Inputs:
    """The same numbers for the same arguments; weights are divided by the root of their fan-in: y has unit scale."""
    dtype, adapter_dtype = REGIMES[regime].dtype, REGIMES[regime].adapter_dtype
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, cols: int, fan_in: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, cols, generator=generator, device=device).div_(fan_in**0.5).to(dtype)

    x = normal(M, K, 1, dtype).requires_grad_()
    dy = normal(M, N, 1, dtype)
    weight = normal(N, K, K, dtype)
    return Inputs(x, dy, weight, normal(rank, K, K, adapter_dtype), normal(N, rank, rank, adapter_dtype))


def frozen(weight: Tensor) -> nn.Linear:
    """``nn.Linear`` around ``weight``, which it shares and does not train."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class Layer(nn.Module):
    """W, A and B as parameters; what every hand-written layer below starts from."""

    def __init__(self, inputs: Inputs, p: float):
        super().__init__()
        self.base = frozen(inputs.weight)
        self.dropout = nn.Dropout(p) if p > 0.0 else nn.Identity()
        self.lora_a = nn.Parameter(inputs.a.clone())
        self.lora_b = nn.Parameter(inputs.b.clone())


class Ours(Layer):
    """``fused_lora.lora_linear`` with the given strategy; None lets the plan choose."""

    def __init__(self, inputs: Inputs, p: float, strategy: str | None):
        super().__init__(inputs, p)
        self.p = p
        self.strategy = strategy

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(
            x,
            self.base.weight,
            self.lora_a,
            self.lora_b,
            SCALE,
            dropout_p=self.p,
            training=self.training,
            strategy=self.strategy,
        )


class Plain(Layer):
    """LoRA as it is written down: two linears, a product with the scale, a sum. Casts where PEFT does."""

    def forward(self, x: Tensor) -> Tensor:
        branch = F.linear(F.linear(self.dropout(x.to(self.lora_a.dtype)), self.lora_a), self.lora_b)
        return (self.base(x) + branch * SCALE).to(x.dtype)


class AddmmFunction(torch.autograd.Function):
    """What eager fused layers do: a GEMM, the GEMM of s, ``addmm_`` into y; s is made again in the backward.

    ``dropped`` is drop(x), made outside, or None: then the low-rank part of dx is accumulated in place into dy W.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, a, b, scale):
        rows = x if dropped is None else dropped
        ctx.save_for_backward(x, dropped, weight, a, b)
        ctx.scale = scale
        return (x @ weight.t()).addmm_(rows @ a.t(), b.t(), alpha=scale)

    @staticmethod
    def backward(ctx, dy):
        x, dropped, weight, a, b = ctx.saved_tensors
        rows = x if dropped is None else dropped
        ds = dy @ b
        da = (ds.t() @ rows).mul_(ctx.scale)
        db = (dy.t() @ (rows @ a.t())).mul_(ctx.scale)
        dx = dy @ weight
        if dropped is None:
            return dx.addmm_(ds, a, alpha=ctx.scale), None, None, da, db, None
        return dx, (ds @ a).mul_(ctx.scale), None, da, db, None


class Addmm(Layer):
    """:class:`AddmmFunction`, ``nn.Dropout`` outside. Lowers float32 adapters to the dtype of x, as such layers do."""

    function: type[torch.autograd.Function] = AddmmFunction

    def forward(self, x: Tensor) -> Tensor:
        dropped = None if isinstance(self.dropout, nn.Identity) else self.dropout(x)
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)
        return self.function.apply(x, dropped, self.base.weight, a, b, SCALE)


class Beta1Function(torch.autograd.Function):
    """GEMMs that accumulate in place (alpha, beta = 1) and s kept, as Transformer Engine's fused ops do it.

    ``dropped`` as in :class:`AddmmFunction`; without it dy W is accumulated onto the low-rank part of dx.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, a, b, scale):
        rows = x if dropped is None else dropped
        s = rows @ a.t()
        ctx.save_for_backward(rows, s, weight, a, b)
        ctx.scale, ctx.is_dropped = scale, dropped is not None
        return (x @ weight.t()).addmm_(s, b.t(), alpha=scale, beta=1)

    @staticmethod
    def backward(ctx, dy):
        rows, s, weight, a, b = ctx.saved_tensors
        ds = torch.addmm(s, dy, b, alpha=ctx.scale, beta=0)  # beta = 0: s is not read, it only lends its shape
        db = torch.addmm(b, dy.t(), s, alpha=ctx.scale, beta=0)
        da = ds.t() @ rows
        if ctx.is_dropped:
            return dy @ weight, ds @ a, None, da, db, None
        return (ds @ a).addmm_(dy, weight), None, None, da, db, None


class Beta1(Addmm):
    """:class:`Beta1Function`; dropout and dtypes as :class:`Addmm`."""

    function = Beta1Function


def _peft(inputs: Inputs, p: float) -> nn.Module:
    """PEFT's own layer, taken out of the model that ``get_peft_model`` makes: its per-model wrapper is not timed."""
    import peft

    config = peft.LoraConfig(
        r=inputs.a.shape[0],
        lora_alpha=SCALE * inputs.a.shape[0],
        lora_dropout=p,
        target_modules=["linear"],
        init_lora_weights=False,
    )
    model = nn.Module()
    model.linear = frozen(inputs.weight)
    lower = inputs.a.dtype != torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that a bare module has no configuration
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=not lower)
    layer = wrapped.base_model.model.linear
    with torch.no_grad():
        for parameter, value in zip(_factors(layer), (inputs.a, inputs.b), strict=True):
            if parameter.dtype != value.dtype:
                raise RuntimeError(f"PEFT made {parameter.dtype} adapters where {value.dtype} were wanted")
            parameter.copy_(value)
    return layer


def _factors(layer: nn.Module) -> list[nn.Parameter]:
    """A and B of a layer, in this order: the parameters that train."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def _ours(strategy: str | None) -> Callable[[Inputs, float], nn.Module]:
    return lambda inputs, p: Ours(inputs, p, strategy)


def _facts(case: Case, device: torch.device) -> Facts:
    asked = device_facts(torch.empty(0, device=device).device, interpreting())
    return Facts(case.M, case.N, case.K, case.rank, case.dtype, case.adapter_dtype, case.p > 0.0, asked)


def _no_triton(case: Case, device: torch.device) -> str:
    facts = _facts(case, device)
    if facts.device.interpreted:
        return "triton's interpreter is for tests; its speed says nothing"
    return triton_refusal(facts)


def _torch_is_planned(case: Case, device: torch.device) -> str:
    return "the plan chooses it here: it is the provider 'ours'" if planned(case, device) == "torch" else ""


def _no_peft(case: Case, device: torch.device) -> str:
    return "" if importlib.util.find_spec("peft") else "not installed (pip install 'fused-lora[peft]')"


def planned(case: Case, device: torch.device) -> str:
    """The strategy that ours follows when none is forced."""
    return make_plan(_facts(case, device)).strategy


@dataclass(frozen=True)
class Provider:
    """A layer to time: how it is built from (inputs, p), and why it cannot be timed on a case ("" where it can)."""

    name: str
    label: str
    make: Callable[[Inputs, float], nn.Module]
    refusal: Callable[[Case, torch.device], str] = lambda case, device: ""

    def build(self, inputs: Inputs, p: float) -> nn.Module:
        layer = self.make(inputs, p)
        layer.train()  # loralib's returns None
        return layer


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("frozen", "frozen nn.Linear, the floor", lambda inputs, p: frozen(inputs.weight)),
        Provider("ours", "fused-lora, planned", _ours(None)),
        Provider("ours-torch", "fused-lora, torch", _ours("torch"), _torch_is_planned),
        Provider("ours-triton", "fused-lora, triton", _ours("triton"), _no_triton),
        Provider("plain", "plain PyTorch LoRA", Plain),
        Provider("peft", "PEFT", _peft, _no_peft),
        Provider("addmm", "addmm-style eager", Addmm),
        Provider("beta1", "beta = 1 style (Transformer Engine)", Beta1),
        Provider("torchtune", "torchtune", torchtune_layer, torchtune_refusal),
        Provider("loralib", "loralib", loralib_layer, loralib_refusal),
    )
}


def available(case: Case, device: torch.device, left_out: dict[str, str]) -> list[Provider]:
    """The providers that can run this case; the others are written into ``left_out`` with the reason."""
    usable = []
    for provider in PROVIDERS.values():
        reason = provider.refusal(case, device)
        if reason:
            left_out[provider.name] = reason
        else:
            usable.append(provider)
    return usable


@functools.cache
def check(name: str, regime: str, device: torch.device) -> None:
    """Refuse to time a layer that computes something else: y and every gradient against float64, then dropout.

    The bound is a gate for mistakes of wiring (a lost gradient, a scale twice), not a statement on accuracy.

    Raises:
        RuntimeError: a result is off, or dropout does nothing; the message names the provider and the tensor.
    """
    inputs = make_inputs(24, 40, 32, 4, regime, device)
    layer = PROVIDERS[name].build(inputs, 0.0)
    leaves = [inputs.x, *_factors(layer)]
    y = layer(inputs.x)
    found = [y, *torch.autograd.grad(y, leaves, inputs.dy)]
    wide = [t.detach().double().requires_grad_() for t in (inputs.x, inputs.a, inputs.b)]
    scale = 0.0 if name == "frozen" else SCALE
    truth = reference.lora_linear(wide[0], inputs.weight.double(), wide[1], wide[2], scale)
    wanted = [truth, *torch.autograd.grad(truth, wide, inputs.dy.double())]
    bound = 1e-5 if REGIMES[regime].dtype == torch.float32 else 3e-2
    for tensor, got, want in zip(("y", "dx", "da", "db"), found, wanted, strict=False):
        error = ((got.double() - want).norm() / want.norm()).item()
        if not error < bound:
            raise RuntimeError(
                f"{name} ({regime}) is not timed: {tensor} is off by {error:.1e} of its norm, the gate is {bound:.0e}"
            )
    layer = PROVIDERS[name].build(inputs, 0.5)
    if name != "frozen" and torch.equal(layer(inputs.x), layer(inputs.x)):
        raise RuntimeError(f"{name} ({regime}) is not timed: its dropout does nothing in training mode")
