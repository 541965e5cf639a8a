"""What every LoRA layer shares: scale, switch, merge, and the way back to the base layer.

R rank.  weight, bias frozen;  lora_a, lora_b trained, in the shapes PEFT stores.  ΔW = scale · lora_b lora_a, seen as a
weight. lora_b (of an embedding, lora_a) starts at zero, so a new layer is its base layer.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from .checks import as_number, check_dtypes, check_switch, without_autocast
from .dropout import check_p

_LOW_PRECISION = (torch.bfloat16, torch.float16)
# What nn.Module keeps about hooks that run around forward and backward.
_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def default_adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 over bfloat16 and float16, as PEFT does it: the optimizer's small steps would be lost. Else ``dtype``."""
    return torch.float32 if dtype in _LOW_PRECISION else dtype


def lora_scale(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """lora_alpha / r, or lora_alpha / √r with rsLoRA (Kalajdzievski, arXiv 2312.03732).

    Raises:
        TypeError: r is not an int, or lora_alpha not a number.
        ValueError: r below 1; lora_alpha not finite.
    """
    check_rank(r)
    return check_alpha(lora_alpha) / (math.sqrt(r) if check_switch(use_rslora, "use_rslora") else r)


def check_rank(r: int, name: str = "r", least: int = 1) -> None:
    """Raise ``TypeError`` unless the rank is an int, ``ValueError`` where it is below ``least``."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"{name} must be an int, got {type(r).__name__} {r!r}")
    if r < least:
        raise ValueError(f"{name} must be at least {least}{'' if least else ' (0: no LoRA)'}, got {r}")


def check_alpha(lora_alpha: float, name: str = "lora_alpha") -> float:
    """lora_alpha as a float; raise ``TypeError`` unless it is a number, ``ValueError`` unless it is finite."""
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(lora_alpha).__name__} {lora_alpha!r}")
    if not math.isfinite(value := as_number(lora_alpha, name)):
        raise ValueError(f"{name} must be finite, got {lora_alpha}")
    return value


def check_init(init_lora_weights: bool | str) -> bool | str:
    """Return ``init_lora_weights``; raise ``ValueError`` unless it is True, False or "gaussian"."""
    if isinstance(init_lora_weights, bool):
        return init_lora_weights
    if isinstance(init_lora_weights, str) and init_lora_weights.lower() == "gaussian":
        return "gaussian"
    raise ValueError(
        f"init_lora_weights must be True (zero delta), 'gaussian' (zero delta, normal lora_a) or False (both random), "
        f"got {init_lora_weights!r}; inits that rewrite the base weight are not offered"
    )


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether this is the linear layer of GPT-2, whose weight is stored (K, N). transformers need not be installed."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"


def _hollow_copy(module: nn.Module) -> nn.Module:
    """A layer of the same type and settings without parameters and without hooks."""
    copy = module.__new__(type(module))
    nn.Module.__init__(copy)
    copy.__dict__.update({name: value for name, value in module.__dict__.items() if name not in copy.__dict__})
    copy._parameters.update(dict.fromkeys(module._parameters))
    return copy


def _refuse_computed(base: nn.Module) -> None:
    """Raise where hooks or a parametrization put another tensor in a parameter's place before each forward."""
    for name in ("weight", "bias"):
        if getattr(base, name, None) is not None and name not in base._parameters:
            others = [*base._modules, *base._buffers, *(n for n in base._parameters if n not in ("weight", "bias"))]
            raise ValueError(
                f"this {type(base).__name__} cannot get LoRA: its {name} is computed from other tensors "
                f"({', '.join(others) or 'none of them parameters'}); make it a parameter again first (prune.remove, "
                "remove_spectral_norm, remove_weight_norm, parametrize.remove_parametrizations)"
            )


class LoRAHolder(nn.Module):
    """A module that keeps LoRA layers of its own, which apply_lora and remove_lora must leave to it."""


class LoRALayer(nn.Module):
    """What every LoRA layer shares: the scale, the switch, merge and unmerge. Not for direct use.

    A subclass has the parameters weight, bias, lora_a, lora_b and defines ``_read_base``, ``_factor_shapes``,
    ``delta_weight``, ``_base_forward`` and ``_lora_forward``. The frozen weight is never written: merging makes a
    second tensor, so weights shared with other modules stay what they are and ``unmerge`` has nothing to compute.

    The base layer itself is kept, without its parameters and out of sight of ``modules()`` and ``state_dict()``: plain
    layers are made from it. Emptied, it holds no second reference to a weight that is moved or sharded later.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    magnitude: nn.Parameter | None  # of DoRA
    _merged_weight: Tensor | None
    _shell: tuple[nn.Module]  # in a tuple, so that it is not registered as a submodule

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool):
        super().__init__()
        self._scale = lora_scale(r, lora_alpha, use_rslora)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = check_p(lora_dropout, "lora_dropout")
        self.use_rslora = use_rslora
        self._enabled = True
        self.register_parameter("magnitude", None)
        self.register_buffer("_merged_weight", None, persistent=False)
        self._merged_from: tuple[int, ...] = ()

    def _adopt(self, base: nn.Module, adapter_dtype: torch.dtype | None, init_lora_weights: bool | str = True) -> None:
        """Last step of a constructor: take over and freeze a base layer's parameters, add the factors beside them."""
        self._read_base(base)
        _refuse_computed(base)
        self._shell = (_hollow_copy(base),)
        self.weight, self.bias = base.weight, getattr(base, "bias", None)  # type: ignore[assignment]
        check_dtypes(**{f"the dtype of the {type(base).__name__}'s weight": self.weight.dtype})
        check_dtypes(adapter_dtype=adapter_dtype)
        device, dtype = self.weight.device, adapter_dtype or default_adapter_dtype(self.weight.dtype)
        shape_a, shape_b = self._factor_shapes()
        self.lora_a = nn.Parameter(torch.empty(shape_a, device=device, dtype=dtype))
        self.lora_b = nn.Parameter(torch.empty(shape_b, device=device, dtype=dtype))
        self.reset_lora_parameters(init_lora_weights)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._place_scale()
        self.train(base.training)

    def _read_base(self, base: nn.Module) -> None:
        """Take over the settings of the base layer; refuse what forward would not honour."""
        raise NotImplementedError

    def _factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of lora_a and lora_b, as PEFT stores them."""
        raise NotImplementedError

    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Draw new factors, as PEFT does.

        True: lora_a Kaiming-uniform with a = √5, as nn.Linear starts, and lora_b zero. "gaussian": lora_a normal with
        standard deviation 1/r, lora_b zero. False: both Kaiming-uniform, so the layer does not start as its base.

        Raises:
            ValueError: none of the three.
        """
        init = check_init(init_lora_weights)
        if init == "gaussian":
            nn.init.normal_(self.lora_a, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(self.lora_b, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_b)

    def _place_scale(self) -> None:
        # The same value as ``_scale``, for compiled graphs: read at run time, so a new value recompiles nothing.
        device = self.lora_a.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # An inference tensor could not be written by a later set_scale.
        with torch.inference_mode(False):
            self._scale_tensor = torch.tensor(self._scale, dtype=dtype, device=device)

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALayer:
        super()._apply(fn, recurse)
        self._follow_device()
        # Converting the sum would round it twice, and the versions of converted parameters do not tell.
        self._remerge()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # With assign=True the parameters are other objects, perhaps on another device.
        self._follow_device()
        self._remerge()

    def _follow_device(self) -> None:
        # Only the device: where the parameters change their dtype, the scale keeps its own.
        if self._scale_tensor.device != self.lora_a.device:
            self._place_scale()

    @property
    def scale(self) -> float:
        """The factor on lora_b lora_a; change it with :meth:`set_scale` or :meth:`set_alpha`."""
        return self._scale

    def set_scale(self, scale: float) -> None:
        """Use ``scale`` from now on, merged or not; compiled graphs see it without recompiling. ``lora_alpha`` follows.

        Raises:
            TypeError: scale is not a number.
            ValueError: scale is not finite.
        """
        scale = as_number(scale, "scale")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        self._scale = scale
        self.lora_alpha = scale * (math.sqrt(self.r) if self.use_rslora else self.r)
        self._scale_tensor.fill_(scale)
        self._remerge()

    def set_alpha(self, lora_alpha: float) -> None:
        """Use lora_alpha / r (rsLoRA: / √r) as the scale from now on.

        Raises:
            TypeError: lora_alpha is not a number.
            ValueError: lora_alpha is not finite.
        """
        self.set_scale(lora_scale(self.r, lora_alpha, self.use_rslora))
        self.lora_alpha = lora_alpha

    @property
    def enabled(self) -> bool:
        """Whether the LoRA branch is added. Off, the output is the base layer's bit for bit, merged or not."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = check_switch(value, "enabled")

    @property
    def merged(self) -> bool:
        """Whether ΔW is inside the weight that forward uses; lora_a and lora_b then get no gradient, dropout rests."""
        return self._merged_weight is not None

    def delta_weight(self) -> Tensor:
        """ΔW = scale · lora_b lora_a in the shape of weight, in float32 (float64 for a float64 layer)."""
        raise NotImplementedError

    def _sum_weight(self) -> Tensor:
        """weight + ΔW, added in float32 or float64 and rounded once to the dtype of weight."""
        # A sum made under inference_mode could not be used in a later training step; leaving that mode turns grad on.
        with torch.inference_mode(False), torch.no_grad(), without_autocast(self.weight.device):
            return self._add_delta(self.delta_weight()).to(self.weight.dtype)

    def _add_delta(self, delta: Tensor) -> Tensor:
        return delta.add_(self.weight)

    def merge(self) -> None:
        """Fold ΔW into the weight that forward uses; a second call does nothing.

        Takes a second tensor of weight's size while merged. Outputs agree with the unmerged layer's to the rounding of
        weight's dtype: in bfloat16 an update smaller than 1/256 of a weight is partly rounded away.

        Where a factor changes while merged, eager forward notices and merges again; a compiled forward, and a write
        through ``.data``, do not: call ``unmerge()`` and ``merge()`` then.
        """
        if self._merged_weight is None:
            self._merged_weight = self._sum_weight()
            self._merged_from = self._versions()

    def unmerge(self) -> None:
        """Go back to weight and branch apart; weight is the very tensor it was."""
        self._merged_weight = None

    def _versions(self) -> tuple[int, ...]:
        names = ("weight", "lora_a", "lora_b", "magnitude")
        tensors: list[Tensor] = [t for name in names if (t := self._parameters.get(name)) is not None]
        if any(name not in self._parameters for name in names):
            # One is computed, by a parametrization or a hook, anew in every access: what it is made from tells.
            tensors = [*self.parameters(), *(t for t in self.buffers() if t is not self._merged_weight)]
        # Inference tensors count no versions: they cannot be written outside inference mode either.
        return tuple(count for t in tensors for count in (id(t), 0 if t.is_inference() else t._version))

    def trained(self) -> tuple[nn.Parameter, ...]:
        """lora_a, lora_b, and the magnitude of DoRA."""
        return (self.lora_a, self.lora_b, *([] if self.magnitude is None else [self.magnitude]))

    @property
    def base_type(self) -> type[nn.Module]:
        """The type of the layer underneath."""
        return type(self._shell[0])

    def to_base(self) -> nn.Module:
        """A plain layer of the base's type with the present behaviour: ΔW merged in, or the base alone where disabled.

        The weight is a copy (the base weight itself is shared only where the layer is disabled); the bias is shared.
        """
        base = _hollow_copy(self._shell[0])
        self._fill(base, nn.Parameter(self._sum_weight(), requires_grad=False) if self._enabled else self.weight)
        return base.train(self.training)

    def _fill(self, base: nn.Module, weight: nn.Parameter) -> None:
        base._parameters["weight"] = weight
        if "bias" in base._parameters:
            base._parameters["bias"] = self.bias

    def hold_base(self, base: nn.Module) -> None:
        """Keep this very layer, emptied, to give it back later; its hooks run on the LoRA layer. For ``apply_lora``."""
        base._parameters.update(dict.fromkeys(base._parameters))
        self._shell = (base,)
        # The same dictionaries: handles of hooks registered before go on working.
        self.__dict__.update({name: base.__dict__[name] for name in _CALL_HOOKS})

    def release_base(self, merge: bool) -> nn.Module:
        """The held base layer with its parameters, or with ΔW merged in. For ``remove_lora`` and ``merge_lora``."""
        base = self._shell[0]
        self._fill(base, nn.Parameter(self._sum_weight(), requires_grad=False) if merge else self.weight)
        base.__dict__["_is_full_backward_hook"] = self._is_full_backward_hook
        return base.train(self.training)

    def _remerge(self) -> None:
        if self._merged_weight is not None:
            self._merged_weight = None
            self.merge()

    def _base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _lora_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        """The base layer plus the LoRA branch; the base layer alone where ``enabled`` is False.

        ``input`` is another name for x: torch's own, for code that calls its layers so.

        Raises:
            TypeError: no x.
            ValueError: the layer is merged and weight requires grad, which it would not get.
        """
        if x is None:
            if input is None:
                raise TypeError("a LoRA layer needs x, the input of its base layer, got None")
            x = input
        if not self._enabled:
            return self._base_forward(x, self.weight)
        if self._merged_weight is not None:
            if self.weight.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    "weight requires grad, but the base layer is frozen here and would get no gradient: call "
                    f"weight.requires_grad_(False), or use {self.base_type.__name__} for a layer that trains in full"
                )
            # A checkpoint loaded or a step taken while merged would otherwise leave a stale sum behind.
            if not torch.compiler.is_compiling() and self._versions() != self._merged_from:
                self._remerge()
            return self._base_forward(x, self._merged_weight)
        return self._lora_forward(x)

    def _runtime_scale(self) -> float | Tensor:
        if not torch.compiler.is_compiling():
            return self._scale
        if self._scale_tensor.device != self.lora_a.device:  # a loader put the parameters in place of others by itself
            if torch.compiler.is_exporting():
                return self._scale  # an export writes no attribute
            self._place_scale()
        # A graph keeps the value it ran with: set_scale between forward and backward must not reach into it.
        return self._scale_tensor.clone()

    def _lora_repr(self) -> str:
        parts = [f"r={self.r}", f"lora_alpha={self.lora_alpha:g}", f"scale={self._scale:g}"]
        if self.lora_dropout:
            parts.append(f"lora_dropout={self.lora_dropout:g}")
        if self.use_rslora:
            parts.append("use_rslora=True")
        if self.magnitude is not None:
            parts.append("use_dora=True")
        if self.merged:
            parts.append("merged")
        if not self._enabled:
            parts.append("disabled")
        return ", ".join(parts)
