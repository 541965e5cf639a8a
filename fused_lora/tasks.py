"""tasks.Model: one frozen network, many LoRA tasks, chosen call by call.

model = Model(network)
model.add_task("minimalist")
model(x)                                    the base network, bit for bit
model(x, task="minimalist")                 one task
model(x, tasks={"anime": 1.0, "pokemon": 0.5})   the sum of several tasks' deltas
model(x, task=["anime", None, "anime"])     a task per row
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import inject, task_state
from .checks import check_module
from .config import LoRAConfig
from .task_layer import TaskLayer
from .task_positions import MadeInside
from .task_selection import One, PerRow, Selection, Several, enter, run
from .task_wrapping import choose, constructor_of, make_task, register_base_module_wrapper

__all__ = ["Model", "register_base_module_wrapper"]

_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_SHAPE = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights")

_WATCHED = 1000  # combinations of shapes to remember


class Model(nn.Module):
    """A network with any number of LoRA tasks, trained and run side by side.

    Every chosen layer is replaced, in place, by a TaskLayer that holds it and one LoRA layer per task around the same
    weight: Linear, Conv1D of transformers, Embedding, Conv1d, Conv2d, Conv3d, of exactly these types, and the types of
    :func:`register_base_module_wrapper`. A layer with several names is wrapped once. The base network is frozen;
    ``requires_grad_(True)`` unfreezes it (it then trains beside the tasks).

    A call chooses its task; nothing of the choice outlives the call or leaves its thread. Activation checkpointing
    inside the network finds the task again in backward, as long as the loss is computed from what the call returned. A
    wrapped layer called outside any call raises; :meth:`using` is for methods of the network other than forward.

    Args:
        model: the network; load its checkpoint before or after.
        r, lora_alpha, lora_dropout, use_rslora: of new tasks; ``add_task`` can differ.
        target_modules: which layers, as :class:`LoRAConfig` reads it; None: every layer that can get LoRA.
        settings: exclude_modules, layers_to_transform, layers_pattern, rank_pattern, alpha_pattern, init_lora_weights,
            as in LoRAConfig.

    Raises:
        TypeError: ``model`` is not a module; an unknown setting.
        ValueError: ``model`` holds tasks or LoRA layers already; no layer is chosen; a chosen layer cannot get LoRA.

    Attribute ``model`` is the network. Buffers of the base, such as those of batch norm, follow train() and eval().
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        target_modules: Any = None,
        **settings: Any,
    ):
        super().__init__()
        check_module(model)
        _check_settings(settings, (*_CHOICE, *_SHAPE))
        self._everything = target_modules is None
        self._config = LoRAConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            target_modules=r"(?s:.*)" if self._everything else target_modules,
            **settings,
        )
        self._names: list[str] = []
        self._watched: set[tuple[Any, ...]] = set()
        chosen = choose(model, self._config, self._everything)
        model.requires_grad_(False)
        for module, names in chosen.items():
            layer = TaskLayer(module, names[0] or type(module).__name__, constructor_of(module) is not None)
            if module is model:
                model = layer
            else:
                inject._replace(model, names, layer)
        self.model = model
        self.training = model.training

    register_base_module_wrapper = staticmethod(register_base_module_wrapper)

    def lora_layers(self) -> Iterator[TaskLayer]:
        """The wrapped layers, each once; ``layer.path`` is its name in the network, ``layer.tasks[name]`` a task's."""
        return (layer for _, layer in task_state.task_layers(self.model))

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, oldest first."""
        return list(self._names)

    def add_task(self, task: str, **settings: Any) -> Model:
        """Add a task that starts with zero delta and trains; returns the model.

        Args:
            task: its name: not empty, without dots and slashes.
            settings: r, lora_alpha, lora_dropout, use_rslora, rank_pattern, alpha_pattern, init_lora_weights where
                they differ from the model's.

        Device is that of each layer's weight; the factors are float32 over bfloat16 and float16, else of the weight's
        dtype. What a registered constructor makes is moved to the device of its module.

        Raises:
            TypeError: an unknown setting; a constructor that returns no module.
            ValueError: the name is taken or not allowed; a rank does not go with a convolution's groups.
        """
        if not isinstance(task, str) or not task or "." in task or "/" in task:
            raise ValueError(f"a task's name must be a string, not empty, without '.' and '/', got {task!r}")
        if task in self._names:
            raise ValueError(f"there is a task {task!r} already; tasks: {', '.join(self._names)}")
        _check_settings(settings, _SHAPE)
        config = dataclasses.replace(self._config, **settings)
        flags = {p: p.requires_grad for p in self.parameters()}
        try:
            made = [(layer, make_task(layer, config)) for layer in self.lora_layers()]
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
        for layer, module in made:
            layer.add_task(task, module)
        self._names.append(task)
        return self

    def remove_task(self, task: str) -> Model:
        """Drop a task and its parameters; returns the model.

        Raises:
            ValueError: no such task.
        """
        self._check_known(task)
        for layer in self.lora_layers():
            del layer.tasks[task]
        self._names.remove(task)
        return self

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """The parameters of one task, for an optimizer.

        Raises:
            ValueError: no such task.
        """
        self._check_known(task)
        return [parameter for layer in self.lora_layers() for parameter in layer.own_parameters(task)]

    def requires_grad_(self, requires_grad: bool = True, task: str | None = None) -> Model:
        """Freeze or unfreeze the base network (``task`` None: tasks keep what they have) or one task.

        Raises:
            ValueError: no such task.
        """
        if task is None:
            of_tasks = {id(p) for name in self._names for p in self.task_parameters(name)}
            parameters = [p for p in self.parameters() if id(p) not in of_tasks]
        else:
            parameters = self.task_parameters(task)
        for parameter in parameters:
            parameter.requires_grad_(requires_grad)
        return self

    def forward(
        self,
        *args: Any,
        task: str | Sequence[str | None] | None = None,
        tasks: Sequence[str] | Mapping[str, float | Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The network's output with the chosen task; all arguments but ``task`` and ``tasks`` go to the network.

        Args:
            task: None: the base network bit for bit. A name: that task. A list of names and None: row i of the batch
                runs with ``task[i]`` as if alone; the batch must be the first dimension of what every wrapped layer
                gets (indices (1, ...) of an embedding count for every row). Embeddings of positions or distances that
                have no such dimension are refused: leave them out with exclude_modules.
            tasks: several at once: the base plus the sum of the tasks' deltas; as a dict, weighted by floats or 0-d
                tensors, which may require grad.

        Raises:
            TypeError: something else for ``task`` or ``tasks``; several tasks over a registered wrapper.
            ValueError: an unknown task; ``task`` and ``tasks`` together; a list whose length is not the batch's.
        """
        selection = self._select(task, tasks)
        if isinstance(selection, PerRow):
            leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
            if leaves and all(leaf.shape[0] != selection.rows for leaf in leaves):
                shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
                raise ValueError(
                    f"task lists {selection.rows} rows, but no input has so many: shapes {shapes}; give one name or "
                    "None for each row of the batch, the first dimension"
                )
            with self._watch_positions(selection, leaves):
                return run(selection, self.model, args, kwargs)
        return run(selection, self.model, args, kwargs)

    @contextlib.contextmanager
    def _watch_positions(self, selection: PerRow, leaves: Sequence[Tensor]) -> Iterator[None]:
        """See ``task_positions.py``. Watching takes time: once for each combination of the inputs' shapes."""
        shapes = (selection.rows, *(leaf.shape for leaf in leaves))
        if torch.compiler.is_compiling() or shapes in self._watched:
            yield
            return
        embeddings = any(isinstance(layer.base, nn.Embedding) for layer in self.lora_layers())
        with MadeInside() if embeddings else contextlib.nullcontext(()) as selection.made_inside:
            yield
        if len(self._watched) >= _WATCHED:
            self._watched.clear()
        self._watched.add(shapes)

    @contextlib.contextmanager
    def using(
        self,
        task: str | Sequence[str | None] | None = None,
        *,
        tasks: Sequence[str] | Mapping[str, float | Tensor] | None = None,
    ) -> Iterator[nn.Module]:
        """Choose for everything this thread runs inside the block, for methods other than forward; yields the network.

        ``with model.using("anime") as network: network.generate(ids)``. Arguments and errors as in :meth:`forward`.
        To train with activation checkpointing call the model instead: layers that ran here raise when they are run
        again in backward.
        """
        leave = enter(self._select(task, tasks))
        try:
            yield self.model
        finally:
            leave()

    def _select(self, task: Any, tasks: Any) -> Selection:
        if tasks is not None:
            if task is not None:
                raise ValueError(f"give task or tasks, not both: got task={task!r} and tasks={tasks!r}")
            return self._select_several(tasks)
        if task is None:
            return One(None)
        if isinstance(task, str):
            self._check_known(task)
            return One(task)
        if not isinstance(task, (list, tuple)):
            raise TypeError(f"task must be a name, None, or a list of them for the rows, got {type(task).__name__}")
        for name in task:
            if name is not None:
                self._check_known(name)
        return PerRow(task)

    def _select_several(self, tasks: Any) -> Several:
        if not isinstance(tasks, (list, tuple, Mapping)):
            raise TypeError(f"tasks must be a list of names or a dict from names to weights, got {tasks!r}")
        names = tuple(tasks)
        for name in names:
            self._check_known(name)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"tasks must name at least one task and none twice, got {list(names)}")
        if not isinstance(tasks, Mapping):
            return Several(names, (1.0,) * len(names))
        weights = tuple(tasks.values())
        for name, weight in zip(names, weights, strict=True):
            _check_weight(name, weight)
        return Several(names, weights)

    def _check_known(self, task: Any) -> None:
        if task not in self._names:
            known = f"tasks: {', '.join(self._names)}" if self._names else "there are none yet, add_task makes one"
            raise ValueError(f"unknown task {task!r}; {known}")

    def state_dict(
        self, task: str | None = None, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """The base network's state dict, with its own keys, so that it loads into the plain network; or one task's.

        A task's keys are ``<layer>.<task>.lora_a`` and ``.lora_b``, of a registered wrapper ``<layer>.<task>.<its
        key>``. They hold nothing of the base.

        With ``destination``, as a module around this one asks for it, everything: base and all tasks, with the keys of
        ``named_parameters()``, which is what that module's own load_state_dict wants.

        Raises:
            ValueError: no such task.
        """
        if destination is not None:
            return super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if task is None:
            return task_state.base_state(self.model, prefix, keep_vars)
        self._check_known(task)
        return task_state.task_state(self.model, task, prefix, keep_vars)

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], task: str | None = None, strict: bool = True
    ) -> Any:
        """Load what ``state_dict(task)`` gives, all or nothing.

        To load a task under another name, add that task and rename the keys.

        Returns:
            ``(missing_keys, unexpected_keys)``, empty unless ``strict`` is False.

        Raises:
            ValueError (a RuntimeError too): keys that are missing or extra (with ``strict``), shapes that differ,
                integers, NaN or infinity in a parameter, all in one message; nothing was loaded then. No such task.
            TypeError: not a mapping.
        """
        if task is None:
            return task_state.load_base_state(self.model, state_dict, strict)
        self._check_known(task)
        return task_state.load_task_state(self.model, task, state_dict, strict)

    def extra_repr(self) -> str:
        return f"tasks={self._names}"


def _check_settings(settings: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for name in settings:
        if name not in allowed:
            raise TypeError(f"unknown setting {name!r}; settings: {', '.join(allowed)}")


def _check_weight(name: str, weight: Any) -> None:
    if isinstance(weight, Tensor):
        if weight.dim() or not weight.is_floating_point():
            raise ValueError(
                f"the weight of task {name!r} must be a 0-d floating tensor, got shape {tuple(weight.shape)}"
            )
    elif isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"the weight of task {name!r} must be a number or a 0-d tensor, got {type(weight).__name__}")
    elif not math.isfinite(weight):
        raise ValueError(f"the weight of task {name!r} must be finite, got {weight}")
