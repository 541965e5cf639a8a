"""Count what a layer moves: every operator and every kernel launch of a pass, on tensors that hold no data.

The pass runs on the ``meta`` device, so any shape costs nothing, and what is counted is the GPU form: code that
branches on the device takes the branch of "not the CPU", the plan is made for a stated chip, ``F.dropout`` is the one
fused operator that CUDA runs (a byte per element for its mask), and a kernel launch is noted instead of run.

What an operator of PyTorch moves: each input read once, each output written once, in bytes of distinct memory. Views
and allocations move nothing; an in-place operator reads and writes its tensor, except where it only overwrites it
(``copy_``, ``zero_``, ``out=``, ``addmm`` with beta = 0). That is the least a kernel of its own can move: tiles of a
vendor GEMM that miss the L2 and are read again are not seen. Kernels of this package: ``launches.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from launches import Access, accesses, distinct_bytes, launches
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fused_lora import plan

CHIP = plan.DeviceFacts(
    "cuda", "H200 (sm_90, 132 SMs, assumed)", (9, 0), 132,
    frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16)), "", False,
)  # fmt: skip

_ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_OVERWRITE = {"copy_", "zero_", "fill_", "bernoulli_", "uniform_", "normal_", "random_"}
# Their tensor lends its shape and dtype; it is not read.
_LIKE = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
_ACCUMULATE = {"addmm", "addmm_", "addmv", "addmv_", "baddbmm", "baddbmm_", "addbmm", "addbmm_"}


@dataclass
class Count:
    """What one pass did."""

    launches: int = 0
    moved: list[Access] = field(default_factory=list)
    peak: int = 0  # the most bytes alive at once of what the pass itself allocated, its results included

    @property
    def distinct(self) -> int:
        return sum(access.distinct for access in self.moved)

    @property
    def issued(self) -> int | None:
        """None where a vendor's kernel is among them: what it loads twice is not known."""
        known = [access.issued for access in self.moved]
        return None if None in known else sum(issued for issued in known if issued is not None)


class Meter(TorchDispatchMode):
    """Inside, every operator is counted into ``counts[phase]``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"forward": Count(), "backward": Count()}
        self.phase = "forward"
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._note(func, args, kwargs or {}, out)
        return out

    def _note(self, func, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        given = [*zip(func._schema.arguments, args, strict=False)]
        given += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
        inputs = [(argument, t) for argument, value in given for t in tree_iter(value) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for _, t in inputs}
        fresh = [t for t in tree_iter(out) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in storages]
        written = [t for argument, t in inputs if argument.alias_info is not None and argument.alias_info.is_write]
        self._allocate(fresh)
        name = func.overloadpacket.__name__
        if name in _ALLOCATE or not (fresh or written) or (name == "copy_" and _same_memory(*args[:2])):
            return
        beta = kwargs.get("beta", 1) if name in _ACCUMULATE else 1
        read = [
            t
            for position, (argument, t) in enumerate(inputs)
            if not argument.is_out and not (position == 0 and (beta == 0 or name in _OVERWRITE or name in _LIKE))
        ]
        moved = [*_each_once(name, "read", read), *_each_once(name, "write", [*written, *fresh])]
        if any(access.distinct for access in moved):
            self.counts[self.phase].launches += 1
            self.counts[self.phase].moved += moved

    def launch(self, kernel: str, arguments: dict[str, Any], programs: int) -> None:
        """Count the launch of a kernel of this package."""
        self.counts[self.phase].launches += 1
        self.counts[self.phase].moved += accesses(kernel, arguments, programs)

    def _allocate(self, tensors: list[Tensor]) -> None:
        if not tensors:
            return
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for t in tensors:
            storage = t.untyped_storage()
            self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        count = self.counts[self.phase]
        count.peak = max(count.peak, sum(size for _, size in self._live.values()))


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """A copy of a tensor onto itself, as ``t[i:j] += u`` ends with: PyTorch returns at once."""
    return _place(one) == _place(other)


def _place(t: Tensor) -> tuple:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype


def _each_once(op: str, kind: str, tensors: list[Tensor]) -> list[Access]:
    found = {_place(t): t for t in tensors}
    return [
        Access(op, kind, tuple(t.shape), str(t.dtype).removeprefix("torch."), distinct_bytes(t)) for t in found.values()
    ]


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """``F.dropout`` as CUDA runs it in training; its choice of kernel asks the device, and meta is not CUDA."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0.0 else x


@contextlib.contextmanager
def as_on_a_gpu(on_launch: Callable[[str, dict[str, Any], int], None] = lambda *launch: None) -> Iterator[None]:
    """Inside, plans are made for :data:`CHIP`, dropout is CUDA's, and a launch is only told to ``on_launch``."""
    plan._plan_for.cache_clear()
    try:
        with (
            mock.patch.object(plan, "device_facts", lambda device, interpreted: CHIP),
            mock.patch.object(torch.nn.functional, "dropout", _dropout),
            launches(on_launch, run=False),
        ):
            yield
    finally:
        plan._plan_for.cache_clear()


def count_pass(layer: torch.nn.Module, x: Tensor, dy: Tensor) -> dict[str, Count]:
    """Forward and backward of ``layer`` on meta tensors, counted; x requires grad."""
    meter = Meter()
    with as_on_a_gpu(meter.launch), meter:
        y = layer(x)
        meter.phase = "backward"
        y.backward(dy)
    return meter.counts
