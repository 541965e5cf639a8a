"""The dropout mask: a pure function of (seed, row, column), the same bits in torch and in the kernels.

M rows of x, K columns (in_features). Nothing M x K is ever stored: forward, dx and da each compute the
mask again from the seed. ``kernels/device.py`` holds the same arithmetic for the GPU; a test compares
the two bit for bit. Why these rounds are enough, and how it was tested: ``docs/numerics.md``.

The function, all in 32-bit unsigned arithmetic; eight rows share a group, g = row // 8, j = row % 8::

    key0, key1 = seed words, mixed                         once per call
    r0 = mix(g ^ key0)        r1 = mix(r0 + key1) | 1       once per group of rows
    u  = col * GOLDEN + r0
    u  = (u ^ u >> 16) * r1
    u  =  u ^ u >> 15                                       once per group and column
    h  = u * MIX2 * STEP**j                                 once per element
    keep = h > threshold(p)                                 as signed 32-bit integers

The eight rows of a group are eight successive values of a congruential generator that starts at u: of the hash, an
element of its own pays one product, which is what a CPU is short of.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from .blocks import part
from .checks import as_number, without_modes

GOLDEN = 0x9E3779B1  # odd, 2**32 / golden ratio: neighbouring columns start far apart
MIX1 = 0x7FEB352D  # the multipliers of Wellons' lowbias32 integer hash
MIX2 = 0x846CA68B
# L'Ecuyer, Tables of linear congruential generators of different sizes and good lattice structure (1999), for 2**32.
STEP = 1597334677
GROUP = 8
_WORD = 0xFFFFFFFF
# Groups of rows up to which Python's large integers make their words, in the order of a little-endian machine: more
# take operators on tensors less time.
_FEW_GROUPS = 1 << 10 if sys.byteorder == "little" else 0
# Elements up to which numpy, where it is installed, makes a whole mask faster than torch: its calls cost less.
_SMALL = 1 << 13
# Hashes of groups of rows made at once: 1 MiB, for eight times as many elements. More would not stay in the caches.
_HASHED = 1 << 18


def check_p(p: float, name: str = "dropout_p") -> float:
    """Return ``p`` as a float; raise ``TypeError`` unless it is a number, ``ValueError`` unless it is in [0, 1].

    ``name``: what the caller's argument is called.
    """
    if type(p) is not float:  # asked in every call, and this costs less than float(p)
        if p is True:  # False is taken for "none", as torch takes it; True would drop everything
            raise TypeError(f"{name} must be a number, got bool True: pass a probability")
        p = as_number(p, name)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {p}; pass 0.0 for no dropout")
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
    check_seed(seed)
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        return seed.reshape(()).to(device)
    # Not torch.tensor: its copy from the host would wait for a GPU, and fail while a CUDA graph is captured.
    return torch.full((), seed, dtype=torch.int64, device=device)


def check_seed(seed: int | Tensor | None) -> None:
    """Raise what :func:`as_seed` raises."""
    if seed is None:
        return
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                "seed must be an int or an int64 tensor with one element, "
                f"got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        return
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in a signed 64-bit integer, got {seed}")


def _mix(h):
    """lowbias32 on Python ints, or int64 tensors that hold unsigned 32-bit words."""
    h = ((h ^ (h >> 16)) * MIX1) & _WORD
    h = ((h ^ (h >> 15)) * MIX2) & _WORD
    return h ^ (h >> 16)


def _mix_lanes(h: int, low: int) -> int:
    """:func:`_mix` of every lane (:func:`_lanes`); ``low`` takes away what a shift brings in from the next one."""
    h = ((h ^ (h >> 16)) & low) * MIX1 & low
    h = ((h ^ (h >> 15)) & low) * MIX2 & low
    return (h ^ (h >> 16)) & low


@functools.cache
def _numpy() -> Any:
    """numpy, or None where it, or torch's way to it, is missing: torch needs neither, so this package does not."""
    try:
        import numpy

        with without_modes():  # a fake tensor has no numpy
            torch.from_numpy(numpy.zeros(1, numpy.int32)).numpy()
    except (ImportError, RuntimeError, TypeError):
        return None
    return numpy


def _signed(word: int) -> int:
    """The 32-bit word as a signed integer of the same bits."""
    return word - ((word & 2**31) << 1)


def _seed_keys(seed: Any) -> tuple[Any, Any]:
    """The two words of a seed, a Python int or a tensor."""
    low, high = seed & _WORD, (seed >> 32) & _WORD
    key0 = _mix(low ^ _mix(high ^ GOLDEN))
    return key0, _mix(key0 ^ high)


def _group_keys(seed: int | Tensor, groups: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """The two words of every group of rows, (r0, r1), int32 of shape (groups, 1)."""
    key0, key1 = _seed_keys(seed)
    group = torch.arange(groups, dtype=torch.int64, device=device)
    r0 = _mix(group ^ key0)  # not in place: under vmap the keys may be a batch
    r1 = _mix((r0 + key1) & _WORD) | 1
    return r0.to(torch.int32)[:, None], r1.to(torch.int32)[:, None]


@functools.lru_cache(maxsize=32)
def _lanes(groups: int) -> tuple[int, int, int]:
    """Python integers of ``groups`` lanes, 64 bits each. In every lane stands 1; its number; 2**32 - 1."""
    ones, numbers = (
        int.from_bytes(b"".join(number.to_bytes(8, "little") for number in lanes), "little")
        for lanes in ((1,) * groups, range(groups))
    )
    return ones, numbers, ones * _WORD


def _group_words(seed: int, groups: int) -> bytearray:
    """r0 and r1 of every group side by side, each in 32 bits.

    All groups at once in one large integer: products of 32 bits do not leave their lane of 64. 32 groups take a tenth
    of the time of numbers one by one, or of operators on small tensors.
    """
    ones, numbers, low = _lanes(groups)
    key0, key1 = _seed_keys(seed)
    r0 = _mix_lanes(numbers ^ ones * key0, low)
    r1 = _mix_lanes((r0 + ones * key1) & low, low) | ones
    return bytearray((r0 | r1 << 32).to_bytes(8 * groups, "little"))


@functools.lru_cache(maxsize=512)
def _kept_keys(seed: int, groups: int) -> tuple[Tensor, ...]:
    """:func:`_group_keys` of few groups on a CPU. The backward asks for those of its forward: 8 KiB at most for each of
    as many layers. Never written to."""
    with without_modes():
        words = torch.frombuffer(_group_words(seed, groups), dtype=torch.int32)
        return words.as_strided((groups, 1), (2, 1)), words.as_strided((groups, 1), (2, 1), 1)


def _column_words(cols: int, device: torch.device) -> Tensor:
    """col * GOLDEN modulo 2**32, int32 of shape (cols,)."""
    return (torch.arange(cols, dtype=torch.int64, device=device) * GOLDEN).to(torch.int32)


def _row_factors(device: torch.device) -> Tensor:
    """MIX2 * STEP**j for the rows j of a group, int32 of shape (GROUP, 1)."""
    # Made on the device: a copy from the host would wait for a GPU, and fail while a CUDA graph is captured.
    factors = torch.full((GROUP, 1), STEP, dtype=torch.int32, device=device)
    factors[0].fill_(_signed(MIX2))
    return factors.cumprod(0, dtype=torch.int32)


@functools.lru_cache(maxsize=32)
def _cpu_constants(cols: int) -> tuple[Tensor, Tensor]:
    """(:func:`_column_words`, :func:`_row_factors`) on the CPU, kept from call to call: models have few widths. Never
    written to."""
    device = torch.device("cpu")
    with without_modes():
        return _column_words(cols, device), _row_factors(device)


@functools.lru_cache(maxsize=64)
def _cpu_number(value: int) -> Tensor:
    """A number as operators on a CPU take it at once: of a Python number each call makes a tensor first."""
    with without_modes():
        return torch.tensor(value, dtype=torch.int32, device="cpu")


# Of the two steps of the hash; ``>>`` on int32 copies the sign, hence the masks after it.
_SHIFTS = (16, 0xFFFF, 15, 0x1FFFF)


@functools.cache
def _cpu_shifts() -> tuple[Tensor, ...]:
    return tuple(_cpu_number(value) for value in _SHIFTS)


def _hash(columns: Tensor, r0: Tensor, r1: Tensor, shifts: Any = _SHIFTS, spare: Tensor | None = None) -> Tensor:
    """u, int32 of shape (groups, cols). ``spare``: memory of that shape to work in."""
    first, first_mask, second, second_mask = shifts
    u = columns + r0
    u.bitwise_xor_(torch.bitwise_right_shift(u, first, out=spare).bitwise_and_(first_mask)).mul_(r1)
    return u.bitwise_xor_(torch.bitwise_right_shift(u, second, out=spare).bitwise_and_(second_mask))


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
    for name, size in (("rows", rows), ("cols", cols)):
        if isinstance(size, float) or size < 0:
            raise ValueError(f"{name} must be a whole number from 0 up, got {size!r}")
    if p == 0.0:
        return torch.ones(rows, cols, dtype=torch.bool, device=device)
    u = _hash(_column_words(cols, device), *_group_keys(as_seed(seed, device), -(-rows // GROUP), device))
    h = (u[:, None] * _row_factors(device)).flatten(0, 1)[:rows]
    return h > threshold(p)


@functools.lru_cache(maxsize=32)
def _numpy_constants(cols: int) -> tuple[Any, Any]:
    """:func:`_cpu_constants` as uint32 arrays."""
    columns, factors = _cpu_constants(cols)
    with without_modes():
        return columns.numpy().view("uint32"), factors.numpy().view("uint32")


@functools.lru_cache(maxsize=512)
def _small_dropped(seed: int, rows: int, cols: int, p: float) -> Any:
    """Where a whole mask of few rows drops, a bool array (rows, cols) that is kept like :func:`_kept_keys`."""
    numpy = _numpy()
    columns, factors = _numpy_constants(cols)
    words = numpy.frombuffer(_group_words(seed, -(-rows // GROUP)), "<u4").reshape(-1, 2)
    r0, r1 = words[:, :1], words[:, 1:]
    u = columns + r0
    u ^= u >> 16
    u *= r1
    u ^= u >> 15
    dropped = (u[:, None] * factors[:rows]).view(numpy.int32) <= threshold(p)
    dropped = dropped.reshape(-1, cols)[:rows]
    return dropped.copy() if rows > GROUP and rows % GROUP else dropped  # a view would keep the whole last group


class BlockMask:
    """The mask of one call, applied to blocks of rows without ever existing whole (the ``torch`` strategy).

    Its scratch is that of a block and reused from block to block, so the temporary memory does not grow with M.
    """

    def __init__(self, seed: Tensor, rows: int, cols: int, p: float):
        self._scratch: Tensor | None = None  # of h, int32
        self._small: Tensor | None = None
        self.scale = keep_scale(p)
        on_cpu = seed.is_cpu
        if on_cpu and 0 < rows * cols <= _SMALL and _numpy() is not None:
            self._small = torch.from_numpy(_small_dropped(int(seed), rows, cols, p))
            return
        groups = -(-rows // GROUP)
        if on_cpu:  # to read a GPU's seed would synchronise
            self._keys = (_kept_keys if 0 < groups <= _FEW_GROUPS else _group_keys)(int(seed), groups)
            self._columns, self._factors = _cpu_constants(cols)
            self._shifts: tuple[Any, ...] = _cpu_shifts()
        else:
            device = seed.device
            self._keys = _group_keys(seed, groups, device)
            self._columns, self._factors = _column_words(cols, device), _row_factors(device)
            self._shifts = _SHIFTS
        self._threshold = threshold(p)
        self._flags: Tensor | None = None  # where the rows of the last hashes are kept, in the memory after it
        self._flag_memory: Tensor | None = None
        self._hashed: tuple[int, int, Tensor] | None = None  # first and last group hashed, and their u

    def hashes(self, start: int, rows: int) -> Tensor:
        """What :meth:`zero_dropped` and :meth:`dropped` take for the rows start..: h, int32 (rows, cols), or where they
        drop if small.

        Lives in the scratch: the next call overwrites it.
        """
        if self._small is not None:
            return part(self._small, start, start + rows)
        self._flags = None
        first, skip = divmod(start, GROUP)
        groups = -(-(skip + rows) // GROUP)
        if self._scratch is None or self._scratch.shape[0] < groups * GROUP:
            # Made for each call: memory that the layers before have just freed is warmer than any that is kept.
            self._scratch = self._columns.new_empty(groups * GROUP, self._columns.shape[0])
        own = part(self._scratch, 0, groups * GROUP)
        u = self._group_hashes(first, first + groups, own)
        if groups == 1:  # a few rows: theirs alone
            return torch.mul(u, self._factors[skip : skip + rows], out=part(own, 0, rows))
        torch.mul(u[:, None], self._factors, out=own.view(groups, GROUP, own.shape[1]))
        return part(own, skip, skip + rows)

    def _group_hashes(self, first: int, last: int, spare: Tensor) -> Tensor:
        """u of the groups first..last, and of some that follow: calling its operators costs more than their work."""
        r0, r1 = self._keys
        if self._hashed is None or first < self._hashed[0] or last > self._hashed[1]:
            stop = min(max(last, first + _HASHED // max(self._columns.shape[0], 1)), r0.shape[0])
            free = part(spare, 0, stop - first) if stop - first <= spare.shape[0] else None
            self._hashed = (
                first, stop, _hash(self._columns, part(r0, first, stop), part(r1, first, stop), self._shifts, free)
            )  # fmt: skip
        start, _, u = self._hashed
        return part(u, first - start, last - start)

    def zero_dropped(self, block: Tensor, hashes: Tensor) -> Tensor:
        """``block`` (contiguous), in which the dropped elements become 0; survivors are not scaled.

        Words are zeroed, not numbers multiplied: a dropped Inf or NaN becomes 0 as well.
        """
        if self._small is not None:
            return block.masked_fill_(hashes, 0.0)
        words = block.view(_WORD_OF_SIZE[block.element_size()])
        self._zero(words, hashes, out=words)
        return block

    def dropped(self, block: Tensor, hashes: Tensor) -> Tensor:
        """What :meth:`zero_dropped` makes of ``block``, which stays as it is. It takes the memory of the hashes, or of
        the flags made of them, which is warm: the hashes are gone then, and the next ones overwrite the result."""
        if self._small is not None:
            return block.masked_fill(hashes, 0.0)
        words = block.view(_WORD_OF_SIZE[block.element_size()])
        memory = hashes if words.dtype == hashes.dtype else self._kept(hashes, words.dtype)
        self._zero(words, hashes, out=memory)
        self._flags = None
        return memory.view(block.dtype)

    def _zero(self, words: Tensor, hashes: Tensor, out: Tensor) -> None:
        if words.dtype == hashes.dtype:  # one pass: the words where h > threshold, else 0
            torch.ops.aten.threshold_backward.grad_input(words, hashes, self._threshold, grad_input=out)
        else:
            torch.mul(words, self._kept(hashes, words.dtype), out=out)

    def _kept(self, hashes: Tensor, dtype: torch.dtype) -> Tensor:
        """1 where an element is kept, else 0; one tensor for all blocks of these rows."""
        if self._flags is None or self._flags.dtype != dtype:
            if self._flag_memory is None or self._flag_memory.dtype != dtype or len(self._flag_memory) < len(hashes):
                self._flag_memory = torch.empty_like(hashes, dtype=dtype)
            least = _cpu_number(self._threshold) if hashes.is_cpu else self._threshold
            self._flags = torch.gt(hashes, least, out=part(self._flag_memory, 0, len(hashes)))
        return self._flags


_WORD_OF_SIZE = {8: torch.int64, 4: torch.int32, 2: torch.int16}
