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
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .blocks import part
from .checks import as_number

GOLDEN = 0x9E3779B1  # odd, 2**32 / golden ratio: neighbouring columns start far apart
MIX1 = 0x7FEB352D  # the multipliers of Wellons' lowbias32 integer hash
MIX2 = 0x846CA68B
# L'Ecuyer, Tables of linear congruential generators of different sizes and good lattice structure (1999), for 2**32.
STEP = 1597334677
GROUP = 8
_WORD = 0xFFFFFFFF
# Up to here Python's integers make the words of the groups faster than thirty operators on tiny tensors do, and, the
# second, faster than numpy does.
_FEW_GROUPS = 32
_FEWER_GROUPS = 16
# Groups up to which their words are kept from a forward for its backward.
_KEPT_GROUPS = 1 << 10
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
    """lowbias32 on Python ints, arrays of uint32, or int64 tensors that hold unsigned 32-bit words."""
    h = ((h ^ (h >> 16)) * MIX1) & _WORD
    h = ((h ^ (h >> 15)) * MIX2) & _WORD
    return h ^ (h >> 16)


@functools.cache
def _numpy() -> Any:
    """numpy, or None where it, or torch's way to it, is missing: torch needs neither, so this package does not."""
    try:
        import numpy

        with _disable_current_modes():  # a fake tensor has no numpy
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


def _few_group_words(seed: int, groups: int) -> tuple[list[int], list[int]]:
    """Every r0 and every r1, in Python's integers."""
    key0, key1 = _seed_keys(seed)
    first = [_mix(group ^ key0) for group in range(groups)]
    return first, [_mix((word + key1) & _WORD) | 1 for word in first]


def _group_keys(seed: int | Tensor, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two words of every group of rows, (r0, r1), int32 of shape (groups, 1)."""
    if isinstance(seed, int) and isinstance(groups, int) and (groups <= _FEW_GROUPS or _numpy() is not None):
        r0, r1 = (_kept_words if groups <= _KEPT_GROUPS else _host_words)(seed, groups)
        if _numpy() is not None:  # each for itself: to take one tensor apart costs more
            return torch.from_numpy(r0).to(device), torch.from_numpy(r1).to(device)
        r0, r1 = torch.tensor((r0, r1), dtype=torch.int32, device="cpu").view(2, groups, 1)
        return r0.to(device), r1.to(device)
    key0, key1 = _seed_keys(seed)
    group = torch.arange(groups, dtype=torch.int64, device=device)
    r0 = _mix(group ^ key0)  # not in place: under vmap the keys may be a batch
    r1 = _mix((r0 + key1) & _WORD) | 1
    return r0.to(torch.int32)[:, None], r1.to(torch.int32)[:, None]


def _host_words(seed: int, groups: int) -> Any:
    """Every r0 and r1, without thirty operators on a small tensor: they cost ten times this.

    An int32 array (2, groups, 1), or where numpy is missing two lists.
    """
    numpy = _numpy()
    if groups <= (_FEW_GROUPS if numpy is None else _FEWER_GROUPS):
        words = _few_group_words(seed, groups)
        if numpy is None:
            return [[_signed(word) for word in kind] for kind in words]
        return numpy.array(words, numpy.uint32)[:, :, None].view(numpy.int32)
    key0, key1 = _seed_keys(seed)
    first = _mix(numpy.arange(groups, dtype=numpy.uint32) ^ key0)  # arrays of uint32 wrap around by themselves
    return numpy.stack((first, _mix(first + key1) | 1)).view(numpy.int32)[:, :, None]


# The backward asks for the words of its forward: 8 KiB at most for each of as many layers.
_kept_words = functools.lru_cache(maxsize=512)(_host_words)


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
    with _disable_current_modes():  # a fake tensor, kept, would serve real calls later
        return _column_words(cols, device), _row_factors(device)


def _hash(columns: Tensor, r0: Tensor, r1: Tensor, spare: Tensor | None = None) -> Tensor:
    """u, int32 of shape (groups, cols). ``>>`` on int32 copies the sign, hence the masks after it.

    ``spare``: memory of that shape to work in.
    """
    u = columns + r0
    u.bitwise_xor_(torch.bitwise_right_shift(u, 16, out=spare).bitwise_and_(0xFFFF)).mul_(r1)
    return u.bitwise_xor_(torch.bitwise_right_shift(u, 15, out=spare).bitwise_and_(0x1FFFF))


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
    return columns.numpy().view("uint32"), factors.numpy().view("uint32")


@functools.lru_cache(maxsize=512)
def _small_dropped(seed: int, rows: int, cols: int, p: float) -> Any:
    """Where a whole mask of few rows drops, a bool array (rows, cols) that is kept like :data:`_kept_words`."""
    numpy = _numpy()
    columns, factors = _numpy_constants(cols)
    r0, r1 = _host_words(seed, -(-rows // GROUP)).view(numpy.uint32)
    u = columns + r0
    u ^= u >> 16
    u *= r1
    u ^= u >> 15
    dropped = (u[:, None] * factors).view(numpy.int32) <= threshold(p)
    dropped = dropped.reshape(-1, cols)[:rows]
    return dropped.copy() if rows % GROUP else dropped  # a view would keep the rows of the whole group


class BlockMask:
    """The mask of one call, applied to blocks of rows without ever existing whole (the ``torch`` strategy).

    Its scratch is that of a block and reused from block to block, so the temporary memory does not grow with M.
    """

    def __init__(self, seed: Tensor, rows: int, cols: int, p: float):
        self._scratch: Tensor | None = None  # of h, int32
        self._small: Tensor | None = None
        self.scale = keep_scale(p)
        self._device = device = seed.device
        on_cpu = device.type == "cpu"
        if on_cpu and 0 < rows * cols <= _SMALL and _numpy() is not None:
            self._small = torch.from_numpy(_small_dropped(int(seed), rows, cols, p))
            return
        # On a CPU as Python's integers, which cost less than 0-d tensors; to read a GPU's seed would synchronise.
        self._keys = _group_keys(int(seed) if on_cpu else seed, -(-rows // GROUP), device)
        constants = _cpu_constants(cols) if on_cpu else (_column_words(cols, device), _row_factors(device))
        self._columns, self._factors = constants
        self._threshold = threshold(p)
        self._flags: Tensor | None = None  # where the rows of the last hashes are kept, in the memory after it
        self._flag_memory: Tensor | None = None
        self._hashed: tuple[int, int, Tensor] | None = None  # first and last group hashed, and their u

    def hashes(self, start: int, rows: int) -> Tensor:
        """What :meth:`zero_dropped` takes for the rows start..: h, int32 (rows, cols), or where they drop if small.

        Lives in the scratch: the next call overwrites it.
        """
        if self._small is not None:
            return part(self._small, start, start + rows)
        self._flags = None
        first, skip = divmod(start, GROUP)
        groups = -(-(skip + rows) // GROUP)
        if self._scratch is None or self._scratch.shape[0] < groups * GROUP:
            # Made for each call: memory that the layers before have just freed is warmer than any that is kept.
            self._scratch = torch.empty(groups * GROUP, self._columns.shape[0], dtype=torch.int32, device=self._device)
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
            stop = min(max(last, first + _HASHED // max(len(self._columns), 1)), len(r0))
            free = spare[: stop - first] if stop - first <= len(spare) else None
            self._hashed = first, stop, _hash(self._columns, part(r0, first, stop), part(r1, first, stop), free)
        start, _, u = self._hashed
        return part(u, first - start, last - start)

    def zero_dropped(self, block: Tensor, hashes: Tensor, out: Tensor | None = None) -> Tensor:
        """``block`` (contiguous) with its dropped elements 0; survivors unscaled. ``out``: where to, also ``block``.

        Words are zeroed, not numbers multiplied: a dropped Inf or NaN becomes 0 as well.
        """
        if self._small is not None:
            if out is None:
                return block.masked_fill(hashes, 0.0)
            return (out if out is block else out.copy_(block)).masked_fill_(hashes, 0.0)
        out = torch.empty_like(block) if out is None else out
        dtype = _WORD_OF_SIZE[block.element_size()]
        target = out.view(dtype)
        words = target if out is block else block.view(dtype)
        if dtype == torch.int32:  # one pass: the words where h > threshold, else 0
            torch.ops.aten.threshold_backward.grad_input(words, hashes, self._threshold, grad_input=target)
        else:
            torch.mul(words, self._kept(hashes, dtype), out=target)
        return out

    def _kept(self, hashes: Tensor, dtype: torch.dtype) -> Tensor:
        """1 where an element is kept, else 0; one tensor for all blocks of these rows."""
        if self._flags is None or self._flags.dtype != dtype:
            if self._flag_memory is None or self._flag_memory.dtype != dtype or len(self._flag_memory) < len(hashes):
                self._flag_memory = torch.empty_like(hashes, dtype=dtype)
            self._flags = torch.gt(hashes, self._threshold, out=part(self._flag_memory, 0, len(hashes)))
        return self._flags


_WORD_OF_SIZE = {8: torch.int64, 4: torch.int32, 2: torch.int16}
