"""Which task runs: what a call of ``tasks.Model`` selects, and how the layers inside find it.

A selection lives on its thread for as long as the call lasts, so threads that run different tasks do not see each
other's, and a call that raises leaves nothing behind.

Activation checkpointing runs layers again in backward, when the call is over, perhaps on another thread, perhaps with
calls of other tasks in between. What is known there is the autograd node being evaluated; the node was made during the
call in question, and autograd numbers the nodes of a thread in the order it makes them. So a call keeps the range of
numbers it used, for as long as the graph of its outputs lives, and a layer that runs in backward looks its selection up
by the number of the node. Whose range counts in this backward is learned from the gradients that arrive at outputs.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class One(NamedTuple):
    """One task for the whole batch; None: the base network."""

    name: str | None


class Several(NamedTuple):
    """The base network plus the weighted sum of the tasks' deltas."""

    names: tuple[str, ...]
    weights: tuple[float | Tensor, ...]


class PerRow:
    """A task, or None, for each row of the batch. Rows of one task form a group; groups run one after another."""

    def __init__(self, names: Sequence[str | None]):
        members: dict[str | None, list[int]] = {} if names else {None: []}
        for row, name in enumerate(names):
            members.setdefault(name, []).append(row)
        self.rows = len(names)
        self.names = tuple(members)
        self.sizes = [len(rows) for rows in members.values()]
        self._order = [row for rows in members.values() for row in rows]
        self._sorted = self._order == list(range(self.rows))
        self._indices: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.made_inside: Container[Tensor] = ()  # the tensors known not to come from the batch

    def _index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows in the order of the groups, and the way back."""
        cached = None if torch.compiler.is_compiling() else self._indices.get(device)
        if cached is not None:
            return cached
        order = torch.tensor(self._order, device=device)
        index = (order, torch.argsort(order))
        if not torch.compiler.is_compiling():
            self._indices[device] = index
        return index

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """The rows of each group, in the order of ``names``."""
        return (x if self._sorted else x.index_select(0, self._index(x.device)[0])).split(self.sizes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The groups' results as one batch, in the order of the rows."""
        y = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return y if self._sorted else y.index_select(0, self._index(y.device)[1])


Selection: TypeAlias = One | Several | PerRow


class _Frame:
    """A call in progress on this thread."""

    def __init__(self, selection: Selection):
        self.selection = selection
        self.first: float = 0
        self.graph_task = -1
        if not torch.compiler.is_compiling():
            self.first = torch._C._autograd._get_sequence_nr()
            self.graph_task = torch._C._current_graph_task_id()  # which backward the call is part of; -1: none


class _Running(threading.local):
    # A thread-local, not a context variable: torch.compile can read, write and guard it without a graph break, and a
    # forward does not await.
    frame: _Frame | None = None


class _Record:
    """The selection of a finished call, and the numbers of the nodes made during it."""

    def __init__(self, frame: _Frame):
        self.selection, self.first = frame.selection, frame.first
        self.end: int = torch._C._autograd._get_sequence_nr()
        self.thread = threading.get_ident()
        self.graph_tasks: set[int] = set()

    def arrived(self, _gradients: Any) -> None:
        """A gradient reached an output of the call: from now on the record counts in this backward."""
        self.graph_tasks.add(torch._C._current_graph_task_id())


_running = _Running()
_records: weakref.WeakSet[_Record] = weakref.WeakSet()  # kept alive by the graphs of the outputs
_records_lock = threading.Lock()


def run(selection: Selection, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``call(*args, **kwargs)`` with ``selection`` for the layers inside, in this call and in its backward."""
    outer, frame = _running.frame, _Frame(selection)
    _running.frame = frame
    try:
        output = call(*args, **kwargs)
    finally:
        _running.frame = outer
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        _remember(frame, output)
    return output


def enter(selection: Selection) -> Callable[[], None]:
    """Select for this thread until the function that is returned is called."""
    outer, frame = _running.frame, _Frame(selection)
    # No record will tell which nodes are made by other calls inside, so this frame claims none of them in backward.
    frame.first = math.inf
    _running.frame = frame

    def leave() -> None:
        _running.frame = outer

    return leave


def current(path: str) -> Selection:
    """The selection for a layer that is being called; ``path`` names the layer in errors.

    Raises:
        RuntimeError: nothing is selected here, or it cannot be told what was.
    """
    frame = _running.frame
    if torch.compiler.is_compiling():
        return _look_up(path, None) if frame is None else frame.selection
    # Another graph task than the frame's: a backward runs inside the call, or inside enter ... leave.
    if frame is not None and frame.graph_task == torch._C._current_graph_task_id():
        return frame.selection
    return _look_up(path, frame)


def task_may_run() -> bool:
    """Whether the call in progress selects a task, or a backward may be running a layer with one."""
    frame = _running.frame
    if frame is None:
        return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    return frame.selection != One(None)


def _remember(frame: _Frame, output: Any) -> None:
    nodes = {t.grad_fn for t in _tensors(output) if t.requires_grad and t.grad_fn is not None}
    if nodes:
        record = _Record(frame)
        for node in nodes:
            node.register_prehook(record.arrived)
        with _records_lock:
            _records.add(record)


def _tensors(output: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from _tensors(getattr(leaf, field.name))


@torch.compiler.disable
def _look_up(path: str, frame: _Frame | None) -> Selection:
    """The selection of the call that made the autograd node being evaluated: the innermost, where calls nest."""
    graph_task = torch._C._current_graph_task_id()
    node = torch._C._current_autograd_node() if graph_task != -1 else None
    if node is None:
        raise RuntimeError(
            f"layer {path!r} was called while no tasks.Model runs on this thread, so no task is selected: call the "
            "Model, or select one with `with model.using(task):`"
        )
    number = node._sequence_nr()
    with _records_lock:
        records = list(_records)
    found = [
        (r.first, r.thread, r.selection) for r in records if graph_task in r.graph_tasks and r.first <= number < r.end
    ]
    if frame is not None and frame.first <= number:
        found.append((frame.first, threading.get_ident(), frame.selection))
    # Threads number their nodes independently.
    ambiguous = len({thread for _, thread, _ in found}) > 1 and any(s != found[0][2] for _, _, s in found)
    if not found or ambiguous:
        raise RuntimeError(
            f"layer {path!r} runs again in backward (activation checkpointing), and it cannot be told which task its "
            "forward ran: call the Model (not a method inside `using`), compute the loss from what it returned, on the "
            "thread that called it, and use use_reentrant=False where checkpoints nest"
        )
    return max(found, key=lambda entry: entry[0])[2]
