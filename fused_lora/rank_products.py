"""Products with the rank among their sizes, as a CPU makes them fastest.

M rows, R rank, P and K columns: t (M, R), f (R, P), x (M, K).

float32: MKL multiplies matrices that are R wide slowly when they are given to it whole: it cuts them for its threads
and its caches where they are narrow. Cut into a batch by us, tᵀ x takes 55 to 80 % of the time, t f with few ranks 45
to 80 % (AMD EPYC, 2 threads, torch 2.13, 2026-11-25). bfloat16: oneDNN makes a result that is R high in 45 to 70 % of
the time of one R wide at ranks 8 and 16, in the same time at 48 (another AMD EPYC, 2 threads, torch 2.13, 2026-11-29).
More in docs/tuning-notes.md. Memory that is written for block after block is cut by rows, as the threads cut what is
written, so that each reads what it wrote: to write what another core has read can take longer than cold memory.

Each element is summed in float32 over the same terms either way. Elsewhere these are the plain products.
"""

from __future__ import annotations

import functools
from typing import TypeGuard

import torch
from torch import Tensor

from . import blocks
from .blocks import copied, in_dtype, part, row_blocks, rows_of_a_block
from .checks import without_modes

# Columns of a part of tᵀ x: the nearest divisor of K to 128 within these.
_NARROWEST, _WIDTH, _WIDEST = 64, 128, 160
# Rows that a part of a block has at least.
_LEAST_HEIGHT = 32
# Ranks up to which a bfloat16 product R columns wide is made R rows high and turned, and elements of x from which it
# is: with fewer, turning it costs what that saves.
_NARROW = 32
_MANY = 1 << 20
# Ranks up to which a bfloat16 result of more than ``blocks.CPU_BLOCK`` elements takes float32 factors as bfloat16
# halves.
_FEW_RANKS = 32
_LEAST_SCALE = torch.finfo(torch.float32).tiny
# Columns up to which tᵀ x is summed over so many rows at a time: over all rows in one run, as MKL does with 4 to 10
# columns and 16 ranks and more, 16384 of them cost 7 times the error (RMS) of xᵀ t and 4 to 6 times the time.
_FEW_COLUMNS, _RUN = 16, 256
# Elements of x, or of t f, below which one product is as fast.
_LEAST = 1 << 16


@functools.cache
def _mkl() -> bool:
    return torch.backends.mkl.is_available()


@functools.lru_cache(maxsize=64)
def _column_parts(columns: int) -> int:
    """Into how many parts of equal width the columns of x are cut; 1 where no fitting width divides them."""
    widths = [width for width in range(_NARROWEST, _WIDEST + 1) if columns % width == 0]
    return columns // min(widths, key=lambda width: abs(width - _WIDTH)) if columns and widths else 1


def _parts_of_a_block(x: Tensor, rank: int) -> int:
    """Into how many parts of its rows a block of x is cut that shares its memory with the blocks before it: one for
    each thread; 1 where there is but one block, or where the sums of such parts would be large next to it."""
    rows, threads = rows_of_a_block(x), torch.get_num_threads()
    return threads if x.shape[0] > rows >= threads * max(_LEAST_HEIGHT, 4 * rank) else 1


def _batches(t: Tensor, dtype: torch.dtype) -> bool:
    return blocks.on_cpu(t) and dtype == torch.float32 and t.numel() >= _LEAST and _mkl()


def _rows_of_a_part(rows: int, rank: int) -> int:
    """Rows of t in a part of t f; 0: it is left whole."""
    if rank <= 16:
        return 16
    return 64 if rows <= 256 else 0


def _add_at_once(y: Tensor, t: Tensor, f: Tensor, alpha: float, keep: bool) -> Tensor:
    """:func:`add_product` of factors in the dtype of y."""
    beta = 1.0 if keep else 0.0
    rows, rank = t.shape
    height = _rows_of_a_part(rows, rank) if _batches(y, y.dtype) else 0
    parts = rows // height if height else 0
    if parts < 2:
        return y.addmm_(t, f, beta=beta, alpha=alpha)
    whole, batch = parts * height, y
    if whole < rows:
        y[whole:].addmm_(t[whole:], f, beta=beta, alpha=alpha)
        batch, t = y[:whole], t[:whole]
    batch.view(parts, height, f.shape[1]).baddbmm_(
        t.view(parts, height, rank), f.expand(parts, -1, -1), beta=beta, alpha=alpha
    )
    return y


@functools.lru_cache(maxsize=4)
def _one_element(dtype: torch.dtype) -> Tensor:
    with without_modes():
        return torch.zeros(1, dtype=dtype, device="cpu")


def _unread(t: Tensor) -> Tensor:
    """What a product with beta = 0 takes for the sum it adds to, and does not read."""
    return _one_element(t.dtype) if blocks.on_cpu(t) else t.new_empty(1)


def narrow_product(x: Tensor, f: Tensor, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """alpha · x f, (M, R), contiguous, in the dtype of both; f is (K, R). ``out``: where to."""
    if f.shape[1] <= _NARROW and blocks.on_cpu(x) and x.dtype == torch.bfloat16 and x.numel() >= _MANY:
        turned = _product(f.t(), x.t(), alpha).t()
        return turned.contiguous() if out is None else out.copy_(turned)
    return _product(x, f, alpha, out)


def _product(x: Tensor, f: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    if alpha == 1.0:
        return torch.mm(x, f, out=out)
    return torch.addmm(_unread(x), x, f, beta=0, alpha=alpha, out=out)


def _cut_by_rows(t: Tensor, x: Tensor, parts: int, height: int) -> tuple[Tensor, Tensor]:
    """The factors of tᵀ x of the first ``parts`` times ``height`` rows, as a batch."""
    t, x = part(t, 0, parts * height), part(x, 0, parts * height)
    return t.view(parts, height, t.shape[1]).transpose(1, 2), x.view(parts, height, x.shape[1])


def _product_in_runs(t: Tensor, x: Tensor, alpha: float) -> Tensor:
    """alpha · tᵀ x, summed over ``_RUN`` rows at a time, then over those sums."""
    rows, runs = x.shape[0], x.shape[0] // _RUN
    if runs < 2:
        return _product(t.t(), x, alpha)
    whole = runs * _RUN
    total = torch.baddbmm(_unread(x), *_cut_by_rows(t, x, runs, _RUN), beta=0, alpha=alpha).sum(0)
    return total if whole == rows else total.addmm_(t[whole:].t(), x[whole:], alpha=alpha)


def scale_inside(scale: float | Tensor) -> TypeGuard[float]:
    """Whether a product may multiply by the scale itself. Not at NaN, nor where float32 makes it 0: BLAS then skips the
    product, where Inf in it makes NaN."""
    return not isinstance(scale, Tensor) and abs(scale) >= _LEAST_SCALE


def scaled_product(t: Tensor, f: Tensor, scale: float | Tensor, out: Tensor | None = None) -> Tensor:
    """scale · t f in the dtype of both; rounded once where the scale goes inside. ``out``: where to.

    Inside it costs nothing, while an operator that multiplies by a number takes as long as three small products.
    """
    if scale_inside(scale):
        return narrow_product(t, f, scale, out)
    return narrow_product(t, f, out=out).mul_(scale)


def with_rank(t: Tensor, b: Tensor, factor: float | Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """t and b with one more rank, which adds factor · vector to every row of t bᵀ: no pass over y, no rounding of y."""
    return torch.cat([t, torch.ones_like(t[:, :1]) * factor], dim=1), torch.cat([b, vector[:, None]], dim=1)


def rank_product(t: Tensor, f: Tensor, dtype: torch.dtype) -> Tensor:
    """t f, (M, R) x (R, P), rounded once to ``dtype``; t is float32. float16 cannot hold t's range."""
    if dtype != torch.bfloat16:
        return torch.mm(t, f.to(t.dtype)).to(dtype)
    return torch.mm(*_rank_factors(t, f, dtype))


def _rank_factors(t: Tensor, f: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors in ``dtype`` whose product is t f, (M, R) x (R, P).

    bfloat16: t and a float32 f are split into high and low halves that stand side by side along R, so one bfloat16 GEMM
    loses nothing of them and no float32 (M, P) tensor exists. On a CPU, where each rank of that GEMM counts, a t that
    goes with a bfloat16 f is rounded, as the plain layer rounds s.
    """
    if dtype != torch.bfloat16:
        return t, in_dtype(f, dtype)
    t_high = in_dtype(t, dtype)
    if f.dtype == dtype and (t.dtype == dtype or blocks.on_cpu(t)):
        return t_high, f
    turned = f.stride(0) == 1  # a transposed factor stays one: copying it row by row would take longer than the product
    f = f.t() if turned else f
    f_high = in_dtype(f, dtype)
    left, right = [t_high, (t - t_high).to(dtype)], [f_high, f_high]
    if f.dtype != dtype:
        left.append(t_high)
        right.append((f - f_high).to(dtype))
    factor = torch.cat(right, dim=1 if turned else 0)
    return torch.cat(left, dim=1), factor.t() if turned else factor


def add_product(y: Tensor, t: Tensor, f: Tensor, alpha: float = 1.0, keep: bool = True) -> Tensor:
    """y += alpha · t f, in place, y (M, P) contiguous; without ``keep`` what y held is not read.

    float32 factors of a bfloat16 y lose nothing.
    """
    widened = keep and y.dtype == torch.bfloat16 and t.dtype == f.dtype == torch.float32 and blocks.on_cpu(y)
    if not widened or (y.numel() > blocks.CPU_BLOCK and len(f) <= _FEW_RANKS):
        return _add_at_once(y, *_rank_factors(t, f, y.dtype), alpha, keep)
    # y itself becomes float32, block by block: two casts in the caches cost less than splitting two factors into
    # halves, and each rank a third of what three halves do.
    memory: Tensor | None = None
    for i, j in row_blocks(y):
        block = part(y, i, j)
        wide, memory = copied(y, i, j, torch.float32, memory)
        block.copy_(_add_at_once(wide, part(t, i, j), f, alpha, keep))
    return y


class RowSum:
    """scale · tᵀ x, (R, K), summed over blocks of rows of t (M, R) and x (M, K) in their accumulation dtype ``acc``.

    ``operands`` is the dtype that the products read, ``acc`` or a lower one. ``in_blocks``: x is added block by block,
    mostly each in the memory of the one before it.
    """

    def __init__(
        self,
        rank: int,
        x: Tensor,
        acc: torch.dtype,
        operands: torch.dtype,
        scale: float | Tensor = 1.0,
        in_blocks: bool = True,
    ):
        self.operands = operands
        self._alpha: float = 1.0
        self._factor: float | Tensor | None = scale
        if scale_inside(scale):
            self._alpha, self._factor = scale, None
        self._shape, self._acc, self._device = (rank, x.shape[1]), acc, x.device
        self._in_runs = blocks.on_cpu(x) and acc == operands and x.shape[1] <= _FEW_COLUMNS
        self._column_parts = self._row_parts = 1  # not more than one of them is above 1
        if not self._in_runs and _batches(x, operands):
            self._row_parts = _parts_of_a_block(x, rank) if in_blocks else 1
            self._column_parts = _column_parts(x.shape[1]) if self._row_parts == 1 else 1
        self._sum: Tensor | None = None  # (R, K), (column parts, R, K / column parts) or (row parts, R, K)

    def add(self, t: Tensor, x: Tensor) -> None:
        """Adds scale · tᵀ x of some rows; both in ``operands``."""
        left, total, alpha = t.t(), self._sum, self._alpha
        if self._row_parts > 1:
            self._add_row_parts(t, x)
        elif self._in_runs:
            product = _product_in_runs(t, x, alpha)
            self._sum = product if total is None else total.add_(product)
        elif self._column_parts > 1:
            left = left.expand(self._column_parts, -1, -1)
            x = x.view(x.shape[0], self._column_parts, x.shape[1] // self._column_parts).transpose(0, 1)
            self._add_batch(left, x)
        elif total is None:
            self._sum = _product(left, x, alpha)  # in ``operands`` while it is the only one: to cast it tells no more
        elif self._acc == self.operands:
            total.addmm_(left, x, alpha=alpha)
        else:
            self._sum = total.to(self._acc).add_(_product(left, x, alpha))

    def _add_batch(self, left: Tensor, right: Tensor) -> None:
        if self._sum is None:
            self._sum = torch.baddbmm(_unread(right), left, right, beta=0, alpha=self._alpha)
        else:
            self._sum.baddbmm_(left, right, alpha=self._alpha)

    def _add_row_parts(self, t: Tensor, x: Tensor) -> None:
        """The rows that the parts leave over, fewer than parts, go to the first part's sum."""
        parts, height = self._row_parts, x.shape[0] // self._row_parts
        whole = parts * height
        self._add_batch(*_cut_by_rows(t, x, parts, height))
        if whole < x.shape[0] and self._sum is not None:
            self._sum[0].addmm_(t[whole:].t(), x[whole:], alpha=self._alpha)

    def total(self) -> Tensor:
        """The sum, (R, K), contiguous, as its one product rounded it if there was but one; 0 where no row was added."""
        return self._scaled(self._whole())

    def turned(self) -> Tensor:
        """The sum as xᵀ t, (K, R), contiguous."""
        if self._column_parts > 1 and self._sum is not None:
            return self._scaled(self._sum.transpose(1, 2).flatten(0, 1))
        return self._scaled(self._whole().t().contiguous())

    def _whole(self) -> Tensor:
        if self._sum is None:
            return torch.zeros(self._shape, dtype=self._acc, device=self._device)
        if self._row_parts > 1:
            return self._sum.sum(0)
        return self._sum if self._column_parts == 1 else self._sum.transpose(0, 1).flatten(1)

    def _scaled(self, total: Tensor) -> Tensor:
        return total if self._factor is None else total * self._factor


def row_sum(t: Tensor, x: Tensor, scale: float | Tensor = 1.0) -> RowSum:
    """scale · tᵀ x in one go, both in their accumulation dtype."""
    whole = RowSum(t.shape[1], x, x.dtype, x.dtype, scale, in_blocks=False)
    whole.add(t, x)
    return whole
