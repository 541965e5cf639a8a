"""What one launch of each kernel reads and writes, and the same counted in the interpreter.

t (M, C)   f (R, C) or (R, P)   u, v, s (M, R)   g (C, R)   x (M, Q)   w (Q, P)   out (M, P)     as in kernels/

Two figures per tensor. **distinct**: each byte once per launch, what a cache that forgets nothing within the launch
would ask of the memory. **issued**: what the programs load and store, masked elements left out; a tile that several
programs load counts as often. The factors below are read off the grids and loops of ``kernels/skinny.py`` and
``kernels/gemm.py``: a program that owns one block of rows loads the whole row-independent operand, and so on.
:func:`interpreted` counts both figures from the addresses themselves; ``tests/test_traffic.py`` holds them equal.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor


@dataclass(frozen=True)
class Access:
    """A tensor that a launch or an operator reads or writes; ``issued`` is None where it cannot be known."""

    op: str
    kind: str  # "read" or "write"
    shape: tuple[int, ...]
    dtype: str
    distinct: int
    issued: int | None = None


def distinct_bytes(t: Tensor) -> int:
    """Bytes of memory behind a tensor: a dimension of stride 0 is one element."""
    sizes = (size for size, stride in zip(t.shape, t.stride(), strict=True) if stride != 0 or size == 0)
    return math.prod(sizes) * t.element_size()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _shrink(a: dict[str, Any], programs: int) -> dict[str, tuple[str, int]]:
    """Row blocks x chunks of ranks x parts of C: t once per chunk, f once per row block."""
    chunks, blocks = cdiv(a["R"], a["BLOCK_R"]), cdiv(a["M"], a["BLOCK_M"])
    return {
        "t_ptr": ("read", chunks), "f_ptr": ("read", blocks), "u_ptr": ("write", 1),
        "seed_ptr": ("read", programs), "scale": ("read", programs),
    }  # fmt: skip


def _outer(a: dict[str, Any], programs: int) -> dict[str, tuple[str, int]]:
    """Column blocks x chunks of ranks x parts of M: t once per chunk, u once per column block."""
    chunks, blocks = cdiv(a["R"], a["BLOCK_R"]), cdiv(a["C"], a["BLOCK_C"])
    return {
        "t_ptr": ("read", chunks), "u_ptr": ("read", blocks), "g_ptr": ("write", 1),
        "seed_ptr": ("read", programs), "scale": ("read", programs),
    }  # fmt: skip


def _both(a: dict[str, Any], programs: int) -> dict[str, tuple[str, int]]:
    """Column blocks x chunks of ranks x parts of M: as outer, f once per part, one share of v per column block."""
    chunks, blocks = cdiv(a["R"], a["BLOCK_R"]), cdiv(a["C"], a["BLOCK_C"])
    return {
        "t_ptr": ("read", chunks), "u_ptr": ("read", blocks), "f_ptr": ("read", programs // (chunks * blocks)),
        "v_ptr": ("write", 1), "g_ptr": ("write", 1), "scale": ("read", programs),
    }  # fmt: skip


def _reduce(a: dict[str, Any], programs: int) -> dict[str, tuple[str, int]]:
    """Every part once. A second workspace of no elements is not there."""
    found = {"parts0_ptr": ("read", 1), "out0_ptr": ("write", 1)}
    return found | ({"parts1_ptr": ("read", 1), "out1_ptr": ("write", 1)} if a["numel1"] else {})


def _lowrank(a: dict[str, Any], programs: int) -> dict[str, tuple[str, int]]:
    """Row blocks x column blocks of out, all ranks in each."""
    blocks_m, blocks_p = cdiv(a["M"], a["BLOCK_M"]), cdiv(a["P"], a["BLOCK_P"])
    return {
        "s_ptr": ("read", blocks_p), "f_ptr": ("read", blocks_m), "bias_ptr": ("read", blocks_m),
        "lora_bias_ptr": ("read", blocks_m), "parts_ptr": ("read", 1), "out_ptr": ("write", 1),
        "seed_ptr": ("read", programs), "scale": ("read", programs),
    }  # fmt: skip


def _gemm(a: dict[str, Any], programs: int) -> dict[str, tuple[str, int]]:
    """As lowrank, with x once per column block and w once per row block; a split part loads its share of Q alone."""
    found = _lowrank(a, programs)
    found |= {"x_ptr": ("read", found["s_ptr"][1]), "w_ptr": ("read", found["f_ptr"][1])}
    if a["s_ptr"] is None:  # the bare partial product
        del found["f_ptr"], found["scale"]
    return found


def _gemm_descriptor(a: dict[str, Any], programs: int) -> dict[str, tuple[str, int]]:
    """As gemm, by persistent programs: the scale once per program, the seed once per block."""
    found = _lowrank(a, programs)
    blocks_m, blocks_p = found["f_ptr"][1], found["s_ptr"][1]
    return found | {
        "x_desc": ("read", blocks_p), "w_desc": ("read", blocks_m), "out_desc": ("write", 1),
        "seed_ptr": ("read", blocks_m * blocks_p),
    }  # fmt: skip


_FACTORS: dict[str, Callable[[dict[str, Any], int], dict[str, tuple[str, int]]]] = {
    "_shrink_kernel": _shrink, "_outer_kernel": _outer, "_both_kernel": _both, "_reduce_kernel": _reduce,
    "_lowrank_kernel": _lowrank, "_gemm_kernel": _gemm, "_gemm_descriptor_kernel": _gemm_descriptor,
}  # fmt: skip


def _tensor(value: Any) -> Tensor | None:
    """The tensor behind an argument: itself, or what a descriptor addresses."""
    value = getattr(value, "base", value) if type(value).__name__ == "TensorDescriptor" else value
    return value if isinstance(value, Tensor) else None


def accesses(kernel: str, arguments: dict[str, Any], programs: int) -> list[Access]:
    """What one launch moves, from its arguments by name and its number of programs.

    Raises:
        KeyError: a kernel this file has no factors for.
    """
    found = []
    for name, (kind, times) in _FACTORS[kernel](arguments, programs).items():
        t = _tensor(arguments.get(name))
        if t is not None:
            size = distinct_bytes(t)
            dtype = str(t.dtype).removeprefix("torch.")
            found.append(Access(f"{kernel} {name}", kind, tuple(t.shape), dtype, size, times * size))
    return found


@contextlib.contextmanager
def launches(on_launch: Callable[[str, dict[str, Any], int], None], *, run: bool) -> Iterator[None]:
    """Call ``on_launch(kernel name, arguments by name, programs)`` for every launch inside; ``run`` it afterwards?"""
    from fused_lora.kernels import skinny

    kind = type(skinny._shrink_kernel)  # JITFunction, or InterpretedFunction under TRITON_INTERPRET=1
    launch = kind.run

    def noted(self, *args, grid, warmup, **options):
        on_launch(self.__name__, dict(zip(self.arg_names, args, strict=False)), math.prod(grid))
        return launch(self, *args, grid=grid, warmup=warmup, **options) if run else None

    with mock.patch.object(kind, "run", noted):
        yield


@contextlib.contextmanager
def interpreted(found: list[tuple[str, list[Access]]]) -> Iterator[None]:
    """Inside, kernels run in Triton's interpreter, and what each launch touches is appended to ``found``.

    Counted from the addresses of every load and store whose mask is true, looked up among the launch's tensors. For
    small tensors: the interpreter works element by element.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was not set before triton was imported.
    """
    import numpy as np
    from triton.runtime import interpreter

    from fused_lora.kernels import skinny

    if not isinstance(skinny._shrink_kernel, interpreter.InterpretedFunction):
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported: the kernels here are compiled ones")
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    touched: dict[tuple[str, str], list[Any]] = {}
    spans: list[tuple[str, Tensor, int, int]] = []

    def note(kind: str, ptrs, mask) -> None:
        addresses = np.asarray(ptrs.data)[np.broadcast_to(np.asarray(mask.data, dtype=bool), np.shape(ptrs.data))]
        if addresses.size:
            name = next(name for name, _, low, high in spans if low <= int(addresses.min()) < high)
            touched.setdefault((name, kind), []).append(addresses.ravel())

    def counted_load(self, ptrs, mask, *args, **kwargs):
        note("read", ptrs, mask)
        return load(self, ptrs, mask, *args, **kwargs)

    def counted_store(self, ptrs, value, mask, *args, **kwargs):
        note("write", ptrs, mask)
        return store(self, ptrs, value, mask, *args, **kwargs)

    def close() -> None:
        if not found:
            return
        for (name, kind), parts in touched.items():
            t = next(t for own, t, _, _ in spans if own == name)
            addresses, size = np.concatenate(parts), t.element_size()
            dtype, distinct = str(t.dtype).removeprefix("torch."), len(np.unique(addresses)) * size
            kernel = found[-1][0]
            entry = Access(f"{kernel} {name}", kind, tuple(t.shape), dtype, distinct, len(addresses) * size)
            found[-1][1].append(entry)
        touched.clear()

    def begin(kernel: str, arguments: dict[str, Any], programs: int) -> None:
        close()
        found.append((kernel, []))
        spans[:] = []
        for name, value in arguments.items():
            if (t := _tensor(value)) is not None:
                extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
                spans.append((name, t, t.data_ptr(), t.data_ptr() + extent * t.element_size()))

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        launches(begin, run=True),
    ):
        yield
        close()
