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


def row_blocks(t: Tensor) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of rows of t; the first is the largest."""
    rows = (CPU_BLOCK if on_cpu(t) else GPU_BLOCK) // max(t.shape[1], 1)
    return ranges(t.shape[0], max(rows - rows % ROWS, ROWS))


def memory_for(block: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for one block after another: fresh memory costs a CPU more than the operator that fills it."""
    return block.new_empty(block.shape, dtype=dtype)
