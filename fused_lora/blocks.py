"""How large tensors are worked through on the ``torch`` strategy: by blocks of rows, and which of them are small.

t (M, P), any tensor whose rows go through one after another.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements in a block of rows that is masked or cast. On a CPU the block and its scratch stay in the caches; on a GPU
# fewer, larger launches matter more than cache.
CPU_BLOCK = 1 << 19
GPU_BLOCK = 1 << 24
# Rows of a block are a multiple of this: whole groups of the mask (``dropout.GROUP``), so that none is hashed twice.
ROWS = 16
# Elements up to which a tensor on a CPU is tiny: a pass over it in the caches takes about as long as a dispatch.
TINY = 1 << 13


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in ``dtype``. Where it is so already this spares the dispatch of ``to``, a third of a small product."""
    return t if t.dtype == dtype else t.to(dtype)


def on_cpu(t: Tensor) -> bool:
    """Whether ``t`` takes the forms of a CPU. Asked here alone, as ``blocks.on_cpu``: a test without a GPU answers."""
    return t.is_cpu


def tiny(t: Tensor) -> bool:
    """Whether an operator on ``t`` takes longer to call than to compute: then the fewest operators win, not bytes."""
    return on_cpu(t) and t.numel() <= TINY


def part(t: Tensor, start: int, stop: int) -> Tensor:
    """Rows start..stop of t; t itself where that is all of it, for a slice costs as much as a small product."""
    return t if stop - start == t.shape[0] else t[start:stop]


def ranges(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive ranges of at most ``size`` that cover ``total``."""
    size = max(size, 1)
    for start in range(0, total, size):
        yield start, min(start + size, total)


def rows_of_a_block(t: Tensor) -> int:
    """Rows of a block of t; all of t may be fewer."""
    rows = (CPU_BLOCK if on_cpu(t) else GPU_BLOCK) // max(t.shape[1], 1)
    return max(rows - rows % ROWS, ROWS)


def row_blocks(t: Tensor) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of rows of t.

    A few rows that are left over join the last block. Alone they would cost as many operators, and a float32 product
    of one row with a matrix is summed another way: over 2048 terms it errs 3.5 times as much, over 128256 terms 11
    times (RMS; AMD EPYC, torch 2.13, 2026-11-29).
    """
    total, rows = t.shape[0], rows_of_a_block(t)
    start = 0
    while start < total:
        stop = start + rows if total - start - rows >= ROWS else total
        yield start, stop
        start = stop


def memory_for(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for each block of rows of t in turn: fresh memory costs a CPU more than the operator that fills it."""
    return t.new_empty(min(t.shape[0], rows_of_a_block(t) + ROWS - 1), t.shape[1], dtype=dtype)


def copied(t: Tensor, i: int, j: int, dtype: torch.dtype, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows i..j of t in ``dtype``, contiguous, in ``memory`` (:func:`memory_for`), which is made where there is none
    yet; and the memory."""
    memory = memory_for(t, dtype) if memory is None else memory
    return part(memory, 0, j - i).copy_(part(t, i, j)), memory
