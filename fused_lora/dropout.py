"""The dropout mask: a pure function of (seed, row, column), the same bits in torch and in the kernels.

M rows of x, K columns (in_features). Nothing M x K is ever stored: forward, dx and da each compute the
mask again from the seed. ``kernels/device.py`` holds the same arithmetic for the GPU; a test compares
the two bit for bit. Why these rounds are enough, and how it was tested: ``docs/numerics.md``.

The function, all in 32-bit unsigned arithmetic::

    key0, key1 = seed words, mixed                         once per call
    r0 = mix(row ^ key0)      r1 = mix(r0 + key1) | 1       once per row
    h  = col * GOLDEN + r0
    h  = (h ^ h >> 16) * r1
    h  = (h ^ h >> 15) * MIX2                               once per element
    keep = h > threshold(p)                                 as signed 32-bit integers
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

GOLDEN = 0x9E3779B1  # odd, 2**32 / golden ratio: neighbouring columns start far apart
MIX1 = 0x7FEB352D  # the multipliers of Wellons' lowbias32 integer hash
MIX2 = 0x846CA68B
_WORD = 0xFFFFFFFF
# Up to here Python's integers make the words of the rows faster than thirty operators on tiny tensors do.
_FEW_ROWS = 16


def check_p(p: float) -> float:
    """Return ``p`` as a float; raise ``ValueError`` unless it is in [0, 1]."""
    p = float(p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {p}; pass 0.0 for no dropout")
    return p


def threshold(p: float) -> int:
    """The signed 32-bit bound up to which an element is dropped: P(h <= threshold) = p to 2**-32, exact at p = 1."""
    return max(round(p * 2.0**32), 1) - 2**31 - 1


def keep_scale(p: float) -> float:
    """1 / (1 - p), and 0 at p = 1, where nothing is kept (as ``nn.Dropout`` does)."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


def draw_seed(device: torch.device | str) -> Tensor:
    """A fresh 0-d int64 seed on ``device`` from torch's default generator of that device."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def as_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """``seed`` as a 0-d int64 tensor on ``device``; ``None`` draws one.

    Raises:
        TypeError: seed is neither an int nor an int64 tensor with one element.
        ValueError: an int outside the signed 64-bit range.
    """
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                "seed must be an int or an int64 tensor with one element, "
                f"got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        return seed.reshape(()).to(device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in a signed 64-bit integer, got {seed}")
    # Not torch.tensor: its copy from the host would wait for a GPU, and fail while a CUDA graph is captured.
    return torch.full((), seed, dtype=torch.int64, device=device)


def _mix(h):
    """lowbias32 on Python ints or int64 tensors that hold unsigned 32-bit words."""
    h = ((h ^ (h >> 16)) * MIX1) & _WORD
    h = ((h ^ (h >> 15)) * MIX2) & _WORD
    return h ^ (h >> 16)


def _mix_(h: Tensor) -> Tensor:
    """:func:`_mix` of a tensor, in place: on a CPU its operators cost less than memory for their results."""
    carry = h >> 16
    h.bitwise_xor_(carry).mul_(MIX1).bitwise_and_(_WORD)
    h.bitwise_xor_(torch.bitwise_right_shift(h, 15, out=carry)).mul_(MIX2).bitwise_and_(_WORD)
    return h.bitwise_xor_(torch.bitwise_right_shift(h, 16, out=carry))


def _row_keys(seed: int | Tensor, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two words of every row, (r0, r1), int32 of shape (rows, 1)."""
    lo, hi = seed & _WORD, (seed >> 32) & _WORD
    key0 = _mix(lo ^ _mix(hi ^ GOLDEN))
    key1 = _mix(key0 ^ hi)
    if rows <= _FEW_ROWS and isinstance(key0, int) and isinstance(rows, int):
        words = [(first := _mix(row ^ key0), _mix((first + key1) & _WORD) | 1) for row in range(rows)]
        signed = [[word - ((word & 2**31) << 1) for word in row] for row in words]
        r0, r1 = torch.tensor(signed, dtype=torch.int32, device=device).reshape(rows, 2).split(1, dim=1)
        return r0, r1
    row = torch.arange(rows, dtype=torch.int64, device=device)
    r0 = _mix_(row.bitwise_xor_(key0))
    r1 = _mix_((r0 + key1).bitwise_and_(_WORD)).bitwise_or_(1)
    return r0.to(torch.int32)[:, None], r1.to(torch.int32)[:, None]


def _column_words(cols: int, device: torch.device) -> Tensor:
    """col * GOLDEN modulo 2**32, int32 of shape (cols,)."""
    return (torch.arange(cols, dtype=torch.int64, device=device) * GOLDEN).to(torch.int32)


@functools.lru_cache(maxsize=32)
def _cpu_column_words(cols: int) -> Tensor:
    """:func:`_column_words` on the CPU, kept from call to call: models have few widths. Never written to."""
    return _column_words(cols, torch.device("cpu"))


def _hash(words: Tensor, r0: Tensor, r1: Tensor, out: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
    """The per-element hash, int32 of shape (rows, cols). ``>>`` on int32 copies the sign, hence the masks after it."""
    h = torch.add(words, r0, out=out)
    for shift, factor in ((16, r1), (15, MIX2 - 2**32)):
        carry = torch.bitwise_right_shift(h, shift, out=scratch)
        carry &= (1 << (32 - shift)) - 1
        h ^= carry
        h *= factor
    return h


def keep_mask(seed: int | Tensor, rows: int, cols: int, p: float, device: torch.device | str | None = None) -> Tensor:
    """The mask every strategy uses for this seed: True where an element of x survives.

    Args:
        seed: int or int64 tensor with one element.
        rows, cols: M (rows of the flattened x) and K (in_features).
        p: probability of dropping an element, in [0, 1].
        device: where to build it; default: the seed's device, or the CPU.

    Returns:
        Bool tensor (rows, cols). ``keep_mask(seed, M, K, p)[:m]`` equals ``keep_mask(seed, m, K, p)``: the mask
        of a row depends on nothing but the seed, its index and p.
    """
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    device = torch.device(device)
    p = check_p(p)
    if p == 0.0:
        return torch.ones(rows, cols, dtype=torch.bool, device=device)
    h = _hash(_column_words(cols, device), *_row_keys(as_seed(seed, device), rows, device))
    return h > threshold(p)


def part(t: Tensor, start: int, stop: int) -> Tensor:
    """Rows start..stop of t; t itself where that is all of it, for a slice costs as much as a small product."""
    return t if stop - start == t.shape[0] else t[start:stop]


class BlockMask:
    """The mask of one call, applied to blocks of rows without ever existing whole (the ``torch`` strategy).

    A block of int32 scratch is reused from block to block, so the temporary memory does not grow with M.
    """

    def __init__(self, seed: Tensor, rows: int, cols: int, p: float):
        device = seed.device
        # Python integers cost less than 0-d tensors; reading a GPU's seed would synchronise.
        words = int(seed) if device.type == "cpu" else seed
        self._row_keys = _row_keys(words, rows, device)
        self._column_words = _cpu_column_words(cols) if device.type == "cpu" else _column_words(cols, device)
        self._threshold = threshold(p)
        self._scratch: tuple[Tensor, Tensor] | None = None
        self.scale = keep_scale(p)

    def bits(self, start: int, rows: int) -> Tensor:
        """int32 (rows, cols) for rows start..: -1 (all bits set) where an element is kept, 0 where it is dropped.

        Lives in the scratch: the next call overwrites it.
        """
        if self._scratch is None or self._scratch[0].shape[0] < rows:
            # Made for each call: memory that the layers before have just freed is warmer than any that is kept.
            first = torch.empty(rows, self._column_words.shape[0], dtype=torch.int32, device=self._column_words.device)
            self._scratch = (first, torch.empty_like(first))
        first, second = self._scratch
        h, scratch = part(first, 0, rows), part(second, 0, rows)
        r0, r1 = self._row_keys
        r0, r1 = part(r0, start, start + rows), part(r1, start, start + rows)
        _hash(self._column_words, r0, r1, out=h, scratch=scratch)
        # Comparing into int32 (1 or 0, then negated) is vectorised on a CPU, into bool it is not.
        return torch.gt(h, self._threshold, out=scratch).neg_()

    def spare(self, bits: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Memory of the shape of ``bits`` in ``dtype`` that is free until the next call of :meth:`bits`, or None.

        Fresh memory costs a CPU more than the operator that fills it.
        """
        if self._scratch is None or dtype.itemsize > 4:
            return None
        return self._scratch[0].view(-1).view(dtype)[: bits.numel()].view(bits.shape)


_WORD_OF_SIZE = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def zero_dropped(block: Tensor, bits: Tensor, *, in_place: bool = False, out: Tensor | None = None) -> Tensor:
    """``block`` (contiguous) with the elements whose ``bits`` are 0 set to 0; survivors unscaled.

    Bits are ANDed instead of multiplied: it is faster, and a dropped Inf or NaN becomes 0. ``out``: where to, in the
    dtype of ``block``.
    """
    word = _WORD_OF_SIZE[block.element_size()]
    words, bits = block.view(word), bits if bits.dtype == word else bits.to(word)
    target = words if in_place else None if out is None else out.view(word)
    return torch.bitwise_and(words, bits, out=target).view(block.dtype)
