"""What an adapter meets: the layers of a model that carry or can carry LoRA, and the tensors of its base.

R rank.  lora_a, lora_b: in the shapes of ``modules.py`` and ``convolution.py``, which are those PEFT stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from . import inject
from .checks import check_module
from .layer import LoRALayer, default_adapter_dtype, is_transformers_conv1d

if TYPE_CHECKING:
    from .tasks import Model

_NAMELESS = "the model itself is one layer, which has no name in PEFT's files: put it into an nn.ModuleDict or such"
Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """One layer of the base model. ``r`` and ``scale`` are None where it has no LoRA yet.

    ``shapes(r)`` are those of lora_a and lora_b. ``refusal`` says why LoRA cannot go here. ``lost_in_peft``: what of a
    convolution PEFT does not give its lora_A, so that there the same factors compute something else.
    """

    names: tuple[str, ...]
    embedding: bool
    shapes: Callable[[int], Shapes]
    r: int | None = None
    scale: float | None = None
    lora: LoRALayer | None = None
    dtype: torch.dtype | None = None  # of the factors, or what they would be made in
    groups: int = 1
    dora: bool = False
    refusal: str = ""
    lost_in_peft: str = ""

    @property
    def path(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Target:
    """A model as an adapter sees it.

    ``kind``: "plain", "lora" (apply_lora), "task", "new task" or "peft". ``places``: by every name, the layers that
    have LoRA; in a plain model and for a new task, all that could. ``base``: the base model's own state dict.
    ``names``: every module's first name; ``aliases``: the first name for every name.
    """

    kind: str
    places: dict[str, Place]
    base: dict[str, Tensor]
    names: list[str]
    aliases: dict[str, str]

    @property
    def adapted(self) -> bool:
        """Whether every place has LoRA, so that an adapter must have a tensor for each."""
        return self.kind in ("lora", "task", "peft")

    def own_places(self) -> Iterator[Place]:
        """Each place once."""
        return (place for name, place in self.places.items() if name == place.path)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and data parallelism's wrappers, whose names files do not have."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and isinstance(model._modules.get("_orig_mod"), nn.Module):
            model = cast(nn.Module, model._modules["_orig_mod"])
        else:
            return model


def look(model: nn.Module, task: str | None, *, any_task: bool = False) -> Target:
    """What kind of model this is, and its layers. ``any_task``: with ``task`` None, any new task of a tasks.Model.

    Raises:
        TypeError: not a module; ``task`` for a model without tasks.
        ValueError: tasks.Model without ``task``; the model itself is one layer, which has no name.
    """
    check_module(model)
    model = unwrap(model)
    # Not isinstance: importing tasks takes a while, and who has such a model has imported it.
    if any(kind.__module__ == f"{__package__}.tasks" for kind in type(model).__mro__):
        return _look_at_tasks(cast("Model", model), "" if task is None and any_task else task)
    if task is not None:
        raise TypeError(f"task={task!r} goes with a tasks.Model, not with a {type(model).__name__}")
    if hasattr(model, "peft_config") and hasattr(model, "base_model"):
        return _look_at_peft(model)
    names = inject._named(model)
    adapted = any(isinstance(module, LoRALayer) for module in names)
    places = {}
    for module, all_names in names.items():
        place = None
        if not all_names[0]:
            if isinstance(module, LoRALayer):
                raise ValueError(_NAMELESS)
            continue
        if isinstance(module, LoRALayer):
            place = _of_lora(module, tuple(all_names))
        elif not adapted:
            place = _of_plain(module, tuple(all_names))
        if place is not None:
            places.update(dict.fromkeys(all_names, place))
    state = model.state_dict(keep_vars=True)
    base = {key: t for key, t in state.items() if isinstance(t, Tensor) and not _is_factor(model, key)}
    return Target("lora" if adapted else "plain", places, base, *_named(names))


def _named(names: Mapping[nn.Module, list[str]]) -> tuple[list[str], dict[str, str]]:
    """``names`` and ``aliases`` of a Target."""
    first = [all_names[0] for all_names in names.values() if all_names[0]]
    return first, {name: all_names[0] for all_names in names.values() for name in all_names if name}


def _is_factor(model: nn.Module, key: str) -> bool:
    path, _, name = key.rpartition(".")
    return name in ("lora_a", "lora_b", "magnitude") and isinstance(model.get_submodule(path), LoRALayer)


def _of_lora(layer: LoRALayer, names: tuple[str, ...]) -> Place:
    shapes = tuple(layer.lora_a.shape), tuple(layer.lora_b.shape)
    embedding = issubclass(layer.base_type, nn.Embedding)
    dora = layer.magnitude is not None
    known = (layer.r, layer.scale, layer, layer.lora_a.dtype)
    return Place(names, embedding, lambda r: shapes, *known, dora=dora, lost_in_peft=_lost_in_peft(layer))


def _lost_in_peft(layer: Any) -> str:
    """PEFT (0.18 to 0.21) makes lora_A with the kernel size, stride and padding of the convolution, and no more."""
    lost = []
    if any(
        k > 1 and d > 1 for k, d in zip(getattr(layer, "kernel_size", ()), getattr(layer, "dilation", ()), strict=True)
    ):
        lost.append("dilation")
    if getattr(layer, "padding_mode", "zeros") != "zeros" and any(layer._reversed_padding_repeated_twice):
        lost.append("padding mode")
    return " and ".join(lost)


def _of_plain(module: nn.Module, names: tuple[str, ...]) -> Place | None:
    """A place over a plain layer; None for modules of other kinds."""
    refusal = inject._refusal(module)
    groups = 1
    if is_transformers_conv1d(module):
        K, N = module.get_parameter("weight").shape
        shapes = _linear_shapes(K, N)
    elif isinstance(module, nn.Linear):
        shapes = _linear_shapes(module.in_features, module.out_features)
    elif isinstance(module, nn.Embedding):
        shapes = _linear_shapes(module.num_embeddings, module.embedding_dim)
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        C, N, groups, kernel = module.in_channels, module.out_channels, module.groups, module.kernel_size

        def shapes(r: int) -> Shapes:
            return (r, C, *kernel), (N, r // groups, *([1] * len(kernel)))
    else:
        return None
    weight = module._parameters.get("weight")
    dtype = None if weight is None else default_adapter_dtype(weight.dtype)
    embedding, lost = isinstance(module, nn.Embedding), _lost_in_peft(module)
    return Place(names, embedding, shapes, dtype=dtype, groups=groups, refusal=refusal, lost_in_peft=lost)


def _linear_shapes(inputs: int, outputs: int) -> Callable[[int], Shapes]:
    return lambda r: ((r, inputs), (outputs, r))


def _look_at_tasks(model: Model, task: str | None) -> Target:
    from . import task_state
    from .task_layer import TaskLayer

    if task is None:
        raise ValueError(f"a tasks.Model needs task=...; tasks: {', '.join(model.tasks) or 'none yet'}")
    new = task not in model.tasks
    places: dict[str, Place] = {}
    all_names: dict[nn.Module, list[str]] = {}
    paths = task_state._paths(model.model)
    for name, module in model.model.named_modules(remove_duplicate=False):
        plain = task_state._plain_key(name, paths)
        if plain is not None and not isinstance(module, TaskLayer):
            all_names.setdefault(module, []).append(plain)
    for layer in model.lora_layers():
        names = tuple(all_names[layer.base])
        if not names[0]:
            raise ValueError(_NAMELESS)
        if layer.registered:
            place: Place | None = Place(names, False, lambda r: ((), ()), refusal="it has a registered wrapper")
        elif new:
            place = _of_plain(layer.base, names)
        else:
            place = _of_lora(layer.tasks[task], names)  # type: ignore[arg-type]
        assert place is not None
        places.update(dict.fromkeys(names, place))
    state = task_state.base_state(model.model, "", True)
    base = {key: t for key, t in state.items() if isinstance(t, Tensor)}
    return Target("new task" if new else "task", places, base, *_named(all_names))


def _look_at_peft(model: Any) -> Target:
    """A PeftModel with its active adapter; for checks."""
    from peft.tuners.lora import LoraLayer

    adapter, root = model.active_adapter, model.base_model.model
    layers = {name: module for name, module in root.named_modules() if isinstance(module, LoraLayer)}
    places = {name: _of_peft(module, adapter, (name,)) for name, module in layers.items() if adapter in module.scaling}
    inside = tuple(f"{name}." for name in layers)
    names = [name for name, _ in root.named_modules() if name and not name.startswith(inside)]
    state = root.state_dict(keep_vars=True)
    base = {
        key.replace(".base_layer.", ".").replace(f".modules_to_save.{adapter}.", "."): tensor
        for key, tensor in state.items()
        if ".lora_" not in key and ".original_module." not in key
    }
    return Target("peft", places, base, names, {name: name for name in names})


def _of_peft(layer: Any, adapter: str, names: tuple[str, ...]) -> Place:
    embedding = adapter in layer.lora_embedding_A
    if embedding:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    shapes = tuple(a.shape), tuple(b.shape)
    r, scale, dora = layer.r[adapter], float(layer.scaling[adapter]), adapter in layer.lora_magnitude_vector
    lost = _lost_in_peft(layer.get_base_layer())
    return Place(names, embedding, lambda _: shapes, r, scale, dtype=a.dtype, dora=dora, lost_in_peft=lost)
