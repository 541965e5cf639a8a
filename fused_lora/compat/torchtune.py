"""torchtune's ``LoRALinear`` over the fused operator, and the functions of ``torchtune.modules.peft`` that go with it.

K in_dim, N out_dim, R rank.   weight (N, K)   bias (N,)   lora_a.weight (R, K)   lora_b.weight (N, R)

    from fused_lora.compat.torchtune import LoRALinear        # was: from torchtune.modules.peft import LoRALinear

Nothing here needs torchtune; ``quantize_base=True`` needs torchao. ``fuse(model)`` is for models that torchtune's
builders made. Reference: meta-pytorch/torchtune, ``torchtune/modules/peft`` at bd2a0fc.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Container, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_module
from ..dropout import check_p
from ..layer import check_alpha, check_rank
from . import route

# Where torchao keeps NF4, newest first.
_NF4_MODULES = ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor")


@runtime_checkable
class AdapterModule(Protocol):
    """A module that names its adapter's parameters; nothing has to inherit from it."""

    def adapter_params(self) -> list[str]:
        """The names, relative to the module, of the parameters that belong to the adapter."""
        ...


class LoRALinear(nn.Module):
    """torchtune's LoRA layer, fused: ``y = x Wᵀ + bias + alpha / rank · (drop(x) lora_aᵀ) lora_bᵀ``.

    Arguments, attributes, submodules, state-dict keys, initial values under a seed and the meta-device protocol
    (``to_empty``, ``initialize_parameters``) are torchtune's. As there, weight and bias are trainable until
    :func:`set_trainable_params` freezes them, and a call with a trainable weight is computed unfused
    (``route.py`` lists what else is). The dropout mask has nn.Dropout's distribution, not its bits.

    Args:
        in_dim, out_dim: K and N.
        rank: R, at least 1.
        alpha: the branch is scaled by alpha / rank, read in every call.
        dropout: probability of zeroing an element of x before lora_a.
        use_bias: whether the base layer has a bias.
        quantize_base: keep the weight as NF4 (torchao), dense only while a product is computed. It is frozen.
        quantization_kwargs: for torchao's ``to_nf4``: ``block_size``, ``scaler_block_size``.

    Shapes: x (..., K) -> (..., N).

    Raises:
        TypeError: rank is not an int; alpha or dropout not a number.
        ValueError: rank below 1; alpha not finite; dropout outside [0, 1]; quantization arguments without
            ``quantize_base``.
        ImportError: ``quantize_base`` without torchao.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_bias: bool = False,
        quantize_base: bool = False,
        **quantization_kwargs: Any,
    ):
        super().__init__()
        check_rank(rank, "rank")
        check_alpha(alpha, "alpha")
        dropout = check_p(dropout, "dropout")
        if not quantize_base and any(quantization_kwargs.values()):
            raise ValueError(
                f"``quantize_base`` is False, but received the following quantization arguments: {quantization_kwargs}"
            )
        self.in_dim, self.out_dim, self.rank, self.alpha = in_dim, out_dim, rank, alpha
        self.use_bias, self._quantize_base = use_bias, quantize_base
        self.disabled = self.merged = False
        # The three linears draw from the generator in torchtune's order, so that a seed starts a model the same way.
        linear = nn.Linear(in_dim, out_dim, bias=use_bias)
        weight = _nf4().to_nf4(linear.weight, **quantization_kwargs) if quantize_base else linear.weight
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", linear.bias)
        self.dropout = nn.Dropout(p=dropout) if dropout else nn.Identity()
        self.lora_a = nn.Linear(in_dim, rank, bias=False)
        self.lora_b = nn.Linear(rank, out_dim, bias=False)
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Start the factors again: lora_a Kaiming-uniform with a = √5, lora_b zero."""
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> LoRALinear:
        """Give the factors uninitialised memory on ``device``; weight and bias stay, for a checkpoint to fill."""
        self.lora_a.to_empty(device=device, recurse=recurse)
        self.lora_b.to_empty(device=device, recurse=recurse)
        return self

    def adapter_params(self) -> list[str]:
        """``["lora_a.weight", "lora_b.weight"]``."""
        return ["lora_a.weight", "lora_b.weight"]

    def _base_forward(self, x: Tensor) -> Tensor:
        if self._quantize_base and self.bias is not None:  # NF4's product takes no bias
            return F.linear(x, self.weight) + self.bias
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N); the base layer alone where ``disabled`` is True."""
        if self.disabled:
            return self._base_forward(x)
        scale = self.alpha / self.rank
        a, b = self.lora_a.weight, self.lora_b.weight
        if route.refusal(x, self.weight, self.bias, a, b, self.dropout, self.lora_a, self.lora_b):
            return self._base_forward(x) + scale * self.lora_b(self.lora_a(self.dropout(x)))
        return route.fused(x, self.weight, self.bias, a, b, scale, self.dropout)


def _nf4() -> Any:
    for name in _NF4_MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise ImportError("quantize_base=True keeps the weight as torchao's NF4: pip install torchao")


def get_adapter_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the ``adapter_params()`` of the model's modules name, by their names in the model.

    Raises:
        TypeError: not a module.
        ValueError: a module names a parameter that it does not have.
    """
    check_module(model)
    found = {}
    for path, module in model.named_modules():
        named = dict(module.named_parameters())
        for name in module.adapter_params() if isinstance(module, AdapterModule) else ():
            if name not in named:
                raise ValueError(f"adapter_params() of {path or 'the model'} names {name!r}; it has {', '.join(named)}")
            found[f"{path}.{name}" if path else name] = named[name]
    return found


def set_trainable_params(model: nn.Module, adapter_params: Container[str]) -> None:
    """Train the parameters whose names are in ``adapter_params`` and freeze all others.

    Raises:
        TypeError: not a module.
    """
    check_module(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapter_params)


def _check_state_dict(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"state_dict must be a dict of tensors, got {type(value).__name__}: pass model.state_dict()")


def get_adapter_state_dict(state_dict: dict[str, Any], device: str | None = "cpu") -> dict[str, Any]:
    """The adapter's part of a model's state dict, on ``device`` (None: where it is).

    Raises:
        TypeError: state_dict is not a dict.
    """
    _check_state_dict(state_dict)
    return {name: t.to(device) for name, t in state_dict.items() if "lora" in name or "magnitude" in name}


def _mergeable(state_dict: Mapping[str, Any], rank: int) -> list[str]:
    """The prefixes of the layers that can be merged; raise ``ValueError`` where that is not all of them."""
    prefixes = [name.removesuffix("lora_a.weight") for name in state_dict if f".{name}".endswith(".lora_a.weight")]
    needed = [prefix + part for prefix in prefixes for part in ("weight", "lora_a.weight", "lora_b.weight")]
    known = {*needed, *(prefix + "magnitude" for prefix in prefixes)}
    strange = [name for name in state_dict if ("lora" in name or "magnitude" in name) and name not in known]
    missing = [name for name in needed if name not in state_dict]
    if strange or missing:
        raise ValueError(
            f"only LoRALinear and DoRALinear can be merged: {strange} belong to neither, {missing} are missing "
            "(torchtune's own function merges experts)"
        )
    found = {prefix: [state_dict[f"{prefix}lora_{f}.weight"] for f in "ab"] for prefix in prefixes}
    others = [
        f"{prefix}lora_a.weight {tuple(a.shape)} and {prefix}lora_b.weight {tuple(b.shape)}"
        for prefix, (a, b) in found.items()
        if a.shape[:1] != (rank,) or b.shape[1:] != (rank,)
    ]
    if others:
        raise ValueError(
            f"rank={rank} is not that of {'; '.join(others)}: pass the rank they were made with, for the scale is "
            "alpha / rank"
        )
    return prefixes


@torch.no_grad()
def get_merged_lora_ckpt(
    state_dict: dict[str, Any], rank: int, alpha: float, use_distributed_barriers: bool = False
) -> dict[str, Any]:
    """Merge every LoRA and DoRA layer of a state dict into its weight, in place, and return the dict.

    ``weight + alpha / rank · lora_b lora_a``, for DoRA with its rows brought to the length ``magnitude``; formed in
    float32 or wider and rounded once to the dtype of weight. The adapter's keys are removed. The dict gets new tensors:
    a model whose state dict it is keeps its weights. ``use_distributed_barriers``: keep the ranks together.

    Raises:
        TypeError: state_dict is not a dict, rank not an int, alpha not a number.
        ValueError: rank below 1 or not that of the factors, alpha not finite; a key of an adapter that is neither (LoRA
            on experts), or a layer without its other factor or its weight. The dict is then as it was.
    """
    _check_state_dict(state_dict)
    check_rank(rank, "rank")
    check_alpha(alpha, "alpha")
    for prefix in _mergeable(state_dict, rank):
        if use_distributed_barriers:
            torch.distributed.barrier()
        weight, a, b = state_dict[prefix + "weight"], *(state_dict.pop(f"{prefix}lora_{f}.weight") for f in "ab")
        acc = torch.promote_types(a.dtype, torch.float32)
        merged = torch.addmm(weight.to(acc), b.to(acc), a.to(acc), alpha=alpha / rank)
        if (magnitude := state_dict.pop(prefix + "magnitude", None)) is not None:
            merged *= (magnitude.to(acc) / torch.linalg.vector_norm(merged, dim=1))[:, None]
        state_dict[prefix + "weight"] = merged.to(weight.dtype)
    return state_dict


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Run the model's adapter modules as their base layers inside the ``with``, and as they were before after it.

    Raises:
        TypeError: not a module.
    """
    check_module(model)
    modules: list[Any] = [m for m in model.modules() if isinstance(m, AdapterModule) and hasattr(m, "disabled")]
    before = [module.disabled for module in modules]
    for module in modules:
        module.disabled = True
    try:
        yield
    finally:
        for module, disabled in zip(modules, before, strict=True):
            module.disabled = disabled


def fuse(model: nn.Module) -> int:
    """Make every ``LoRALinear`` that torchtune's builders put into a model run fused, in place; return how many.

    Only the layers' class changes, to a subclass of both: parameters, names, hooks and ``isinstance`` stay as they
    are. Call it before ``fully_shard``, which changes the class again; sharded layers are left alone.

    Raises:
        TypeError: not a module.
        ImportError: torchtune is not installed.
    """
    check_module(model)
    theirs = _their_class()
    layers = [module for module in model.modules() if type(module) is theirs]
    for layer in layers:
        layer.__class__ = _fused_class()
    return len(layers)


def _their_class() -> Any:
    try:
        return importlib.import_module("torchtune.modules.peft").LoRALinear
    except ImportError as error:
        raise ImportError("fuse() is for models built with torchtune, which is not installed") from error


@functools.cache
def _fused_class() -> Any:
    fused = type("FusedTorchtuneLinear", (LoRALinear, _their_class()), {"_get_name": lambda self: "LoRALinear"})
    fused.__module__, fused.__doc__ = __name__, "torchtune's ``LoRALinear`` with a fused forward; see :func:`fuse`."
    return fused


def __getattr__(name: str) -> Any:
    if name == "FusedTorchtuneLinear":  # pickle looks the class up here
        return _fused_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
