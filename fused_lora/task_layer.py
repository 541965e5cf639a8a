"""TaskLayer: a frozen layer and one LoRA layer per task, run as the selection says.

x (..., K), (B, C, ...) or indices (...), B rows of the batch, R rank.  weight, lora_a, lora_b: as in ``modules.py`` and
``convolution.py``.  Several tasks: y = base(x) + Σ weight_i · scale_i · lora_b_i lora_a_i x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .convolution import LoRAConv
from .layer import _CALL_HOOKS, LoRAHolder, LoRALayer
from .modules import LoRAEmbedding, LoRALinear
from .ops.linear import lora_linear
from .task_positions import differ_by_row
from .task_selection import One, PerRow, Several, current, task_may_run

_FACT_NAMES = "device dtype grad_fn is_cuda is_leaf is_meta layout ndim requires_grad shape"
_FACTS = {getattr(Tensor, name).__get__ for name in _FACT_NAMES.split()}
_FACTS |= {Tensor.dim, Tensor.numel, Tensor.size, Tensor.element_size, Tensor.is_floating_point}


class _BaseWeight(Tensor):
    """The base weight as code sees it that reads ``layer.weight`` while a task runs: it tells its dtype, shape and
    device, and refuses to be computed with. nn.TransformerEncoderLayer, which reads weights in evaluation, calls its
    layers instead when it meets such a tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _FACTS:
            raise RuntimeError(
                f"{getattr(func, '__name__', func)} on the weight of a layer while a task runs: the task is not in it, "
                "only in the output of the layer; call the layer, or leave it out with exclude_modules"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class TaskLayer(LoRAHolder):
    """Stands where ``base`` stood. ``base`` is the replaced module itself; ``tasks`` maps names to the tasks' layers.

    Attributes this class does not have are those of ``base``. Hooks registered on ``base`` before run here, once per
    call, whatever is selected; they get the TaskLayer as their module.

    ``path`` names the layer in messages; ``registered`` says that its tasks come from a registered wrapper.
    """

    base: nn.Module
    tasks: nn.ModuleDict

    def __init__(self, base: nn.Module, path: str, registered: bool):
        super().__init__()
        self.base, self.tasks = base, nn.ModuleDict()
        self.path, self.registered = path, registered
        self.training = base.training
        # The same dictionaries, so that handles go on working; base's forward is called past them.
        self.__dict__.update({name: base.__dict__[name] for name in _CALL_HOOKS})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not what copy and pickle ask for: a base with its own __deepcopy__ would answer in place of this layer.
            if name.startswith("__") or "base" not in self.__dict__.get("_modules", ()):
                raise
        return getattr(self.base, name)

    @property
    def weight(self) -> Any:
        """The base's weight; while a task runs, only its dtype, shape and device (an embedding's: all of it)."""
        weight = self.base.weight
        if isinstance(self.base, nn.Embedding) or not isinstance(weight, Tensor) or not task_may_run():
            return weight
        return weight.detach().as_subclass(_BaseWeight)

    def add_task(self, name: str, layer: nn.Module) -> None:
        # Past ModuleDict's own check, which refuses names such as "train" and "keys".
        self.tasks._modules[name] = layer

    def own_state(self, name: str) -> dict[str, Any]:
        """What the state dict of the task's layer holds beside the base's own tensors."""
        shared = {id(t) for t in (*self.base.parameters(), *self.base.buffers())}
        state = self._task(name).state_dict(keep_vars=True)
        return {key: value for key, value in state.items() if id(value) not in shared}

    def own_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of the task's layer that are not the base's."""
        shared = {id(p) for p in self.base.parameters()}
        return [p for p in self._task(name).parameters() if id(p) not in shared]

    def _apply(self, fn: Any, recurse: bool = True) -> TaskLayer:
        super()._apply(fn, recurse)
        for layer in self.tasks.values():
            if isinstance(layer, LoRALayer):
                # A conversion may have made new parameters, one for each place that shares one.
                layer._parameters.update(self.base._parameters)
        return self

    def _task(self, name: str) -> nn.Module:
        if name not in self.tasks._modules:
            raise ValueError(f"layer {self.path!r} has no task {name!r}: it was removed while it was in use")
        return self.tasks[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``base`` takes and returns, with the selected task or tasks."""
        selection = current(self.path)
        if isinstance(selection, One):
            return self._one(selection.name, args, kwargs)
        if isinstance(selection, Several):
            return self._several(selection, args, kwargs)
        if self.registered:
            return self._per_row_of_wrapper(selection, args, kwargs)
        x = self._check_rows(_only(args, kwargs), selection)
        parts = zip(selection.names, selection.split(x), strict=True)
        return selection.join([self._one(name, (part,), {}) for name, part in parts])

    def _one(self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name is None:
            return self.base.forward(*args, **kwargs)
        layer = self._task(name)
        if not isinstance(layer, LoRALayer):
            return layer(*args, **kwargs)
        x = _only(args, kwargs)
        # The fused layer gives a weight no gradient; a base that was unfrozen trains beside the task.
        if layer.weight.requires_grad and isinstance(layer, LoRALinear) and layer.enabled:
            return self._base_plus([layer], (1.0,), x)
        return layer(x)

    def _several(self, selection: Several, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        layers, weights = [], []
        for name, weight in zip(selection.names, selection.weights, strict=True):
            layer = self._task(name)
            if not isinstance(layer, LoRALayer):
                raise TypeError(
                    f"layer {self.path!r}: several tasks at once add up LoRA deltas, and the registered wrapper of "
                    f"{type(self.base).__name__} gives a {type(layer).__name__}, which has none; run its tasks one "
                    "at a time, task=..."
                )
            if layer.enabled:
                layers.append(layer)
                weights.append(weight)
        x = _only(args, kwargs)
        if not layers:
            return self.base.forward(x)
        dropout = any(layer.training and layer.lora_dropout for layer in layers)
        if not isinstance(layers[0], LoRALinear) or dropout or layers[0].weight.requires_grad:
            return self._base_plus(layers, weights, x)
        return _fused_sum(layers[0], layers, weights, x)

    def _base_plus(self, layers: Sequence[LoRALayer], weights: Sequence[float | Tensor], x: Tensor) -> Tensor:
        y = self.base.forward(x)
        total: Tensor | float = 0.0
        for layer, weight in zip(layers, weights, strict=True):
            total = _branch(layer, x, layer._runtime_scale() * weight) + total
        return (y + total).to(y.dtype)

    def _check_rows(self, x: Tensor, selection: PerRow) -> Tensor:
        rows, embedding = selection.rows, isinstance(self.base, nn.Embedding)
        if embedding and x.dim() > 1 and x.shape[0] == 1:
            return x.expand(rows, *x.shape[1:])  # positions that all rows share
        # Without a batch dimension: (K,) of a linear layer, (C, ...) of a convolution.
        least = 1 if embedding else len(getattr(self.base, "kernel_size", ())) + 2
        shared = embedding and x.dim() and x in selection.made_inside and differ_by_row(x)
        if x.dim() < least or x.shape[0] != rows or shared:
            raise ValueError(
                f"a task per row was given for {rows} rows, but layer {self.path!r} got an input of shape "
                f"{tuple(x.shape)}{', positions that the network made' if shared else ''}: its first dimension must be "
                "the batch; leave the layer out with exclude_modules, or run the rows of each task on their own"
            )
        return x

    def _per_row_of_wrapper(self, selection: PerRow, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        parts = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.dim() == 0 or leaf.shape[0] != selection.rows:
                    raise ValueError(
                        f"a task per row was given for {selection.rows} rows, but layer {self.path!r}, a registered "
                        f"{type(self.base).__name__}, got a tensor of shape {tuple(leaf.shape)}: the first dimension "
                        "of all its tensors must be the batch"
                    )
                parts.append(selection.split(leaf))
            else:
                parts.append([leaf] * len(selection.names))
        outputs = []
        for group, name in enumerate(selection.names):
            inputs, keywords = tree_unflatten([part[group] for part in parts], spec)
            outputs.append(tree_flatten(self._one(name, inputs, keywords)))
        leaves_out, specs = zip(*outputs, strict=True)
        for results, size, out_spec in zip(leaves_out, selection.sizes, specs, strict=True):
            if out_spec != specs[0] or not all(isinstance(t, Tensor) and t.dim() and len(t) == size for t in results):
                raise TypeError(
                    f"layer {self.path!r}, a registered {type(self.base).__name__}, does not return tensors whose "
                    "first dimension is the batch: a task per row cannot be put together again"
                )
        return tree_unflatten([selection.join(results) for results in zip(*leaves_out, strict=True)], specs[0])


def _only(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one input of a built-in layer, by position or by whatever name the layer has for it."""
    return args[0] if args else next(iter(kwargs.values()))


def _fused_sum(base: LoRALinear, layers: Sequence[LoRALayer], weights: Sequence[float | Tensor], x: Tensor) -> Tensor:
    """Tasks side by side along the rank: one call of the operator whatever their number."""
    acc = torch.promote_types(base.lora_a.dtype, torch.float32)
    scales = [layer._runtime_scale() * w for layer, w in zip(layers, weights, strict=True)]
    a = torch.cat([layer.lora_a.to(acc) for layer in layers])  # (ΣR, K)
    b = torch.cat([layer.lora_b.to(acc) * scale for layer, scale in zip(layers, scales, strict=True)], dim=1)  # (N, ΣR)
    return lora_linear(x, base.weight.t() if base.fan_in_fan_out else base.weight, a, b, 1.0, base.bias)


def _branch(layer: LoRALayer, x: Tensor, factor: float | Tensor) -> Tensor:
    """factor · lora_b lora_a drop(x), in the dtype of the factors or wider."""
    a, b = layer.lora_a, layer.lora_b
    if isinstance(layer, LoRAEmbedding):
        acc = torch.promote_types(a.dtype, torch.float32)
        return F.linear(layer._base_forward(x, a.t()).to(acc) * factor, b.to(acc))
    dropped = F.dropout(x, layer.lora_dropout, layer.training)
    if isinstance(layer, LoRAConv):
        s = layer._convolve(layer._padded(dropped).to(a.dtype), a, None, 1) * factor  # (B, R, ...)
        return type(layer)._convolution(s, b, groups=layer.groups)
    return F.linear(F.linear(dropped.to(a.dtype), a) * factor, b)
