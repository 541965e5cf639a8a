"""From facts to a plan: which strategy runs, in which form each piece, and why not the others.

``make_plan`` is pure: the same facts give the same plan, nothing is timed, no device is asked. ``device_facts`` asks
the device, once, and is cached; nothing here runs at import. What was measured on the device's chip (``tuned.py``)
is one of its facts: where it has an entry near the call, the entry decides, elsewhere the rule.

A request is a strategy, optionally with a form for single pieces::

    "torch"    "triton"    "triton:expand=pointer"    "triton:expand=descriptor,grad_x=descriptor,shrink=torch"

forms: ``torch`` (vendor GEMMs), ``triton`` (the kernel of a skinny piece); for expand and grad_x ``torch``, ``beta1``
(the vendor's GEMM accumulates onto a low-rank product made by a kernel), ``pointer`` and ``descriptor`` (one kernel).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from . import tuned
from .kernels import tiles  # pure Python: importing it imports no triton

STRATEGIES = ("torch", "triton", "reference")
PIECES = ("shrink", "expand", "grad_b", "grad_x", "grad_a")
MAX_TRITON_RANK = 512
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_SKINNY_FORMS = ("torch", "triton")
_GEMM_FORMS = ("torch", "beta1", "pointer", "descriptor")


@dataclass(frozen=True)
class DeviceFacts:
    """What the plan needs to know of a device."""

    type: str
    name: str
    capability: tuple[int, int]  # (0, 0) where it has none
    num_sms: int
    native: frozenset[torch.dtype]  # the dtypes whose GEMMs the device multiplies natively
    triton_reason: str  # why triton cannot run here; "" where it can
    interpreted: bool  # triton runs under its interpreter
    hip: bool = False  # a ROCm device
    tuned: tuned.Tuned | None = None  # what was measured on its chip


@dataclass(frozen=True)
class Facts:
    """Everything a plan is made from. M rows, N out_features, K in_features, R rank."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout: bool
    device: DeviceFacts


@dataclass(frozen=True)
class Plan:
    """A strategy, a form for each piece, and the reasons. ``print`` it."""

    facts: Facts
    strategy: str
    shrink: str
    expand: str
    grad_b: str
    grad_x: str
    grad_a: str
    upcast: bool  # the big GEMMs of the torch form run in float32 blocks
    reasons: tuple[str, ...]
    tiles: tuple[tuple[str, Any], ...] = ()  # (piece, tile) for the pieces that have a kernel

    def tile(self, piece: str) -> Any:
        """The tile a kernel runs the piece with (``kernels/tiles.py``)."""
        return dict(self.tiles)[piece]

    def __str__(self) -> str:
        f = self.facts
        lines = [
            f"fused-lora plan: {self.strategy}   (M {f.M}, N {f.N}, K {f.K}, rank {f.R}, {_short(f.dtype)}, "
            f"adapters {_short(f.adapter_dtype)}, dropout {'on' if f.dropout else 'off'}, {f.device.name})"
        ]
        if self.strategy != "reference":
            lines += [f"  {piece:<7} {describe_piece(self, piece)}" for piece in PIECES]
        lines += [f"  because {reason}" for reason in self.reasons]
        return "\n".join(lines)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def device_facts(device: torch.device, interpreted: bool) -> DeviceFacts:
    """Ask the device, once. ``interpreted``: whether TRITON_INTERPRET=1 is set."""
    triton_reason = ""
    if importlib.util.find_spec("triton") is None:
        triton_reason = "triton is not installed (pip install 'fused-lora[triton]')"
    capability, num_sms, name = (0, 0), 1, device.type
    native: set[torch.dtype] = {torch.float64, torch.float32, *_LOW_PRECISION}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, num_sms = properties.name, properties.multi_processor_count
        if torch.version.hip is None:
            capability = (properties.major, properties.minor)
            if capability < (8, 0) and not triton_reason:
                triton_reason = f"the kernels need compute capability 8.0, {name} has {capability[0]}.{capability[1]}"
    elif device.type == "cpu":
        native -= {dtype for dtype in _LOW_PRECISION if not _cpu_multiplies(dtype)}
        if interpreted:
            # The kernels are planned as for a small Hopper chip, so that every form can be interpreted.
            capability, num_sms = (9, 0), 16
        elif not triton_reason:
            triton_reason = (
                "the tensors are on the CPU (set TRITON_INTERPRET=1 before triton is imported to interpret the kernels)"
            )
    elif not triton_reason:
        triton_reason = f"the kernels do not run on {device.type} devices"
    return DeviceFacts(
        device.type,
        name,
        capability,
        num_sms,
        frozenset(native),
        triton_reason,
        interpreted and device.type == "cpu",
        hip=device.type == "cuda" and torch.version.hip is not None,
        tuned=tuned.table_for(name, capability) if capability != (0, 0) and device.type == "cuda" else None,
    )


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions that multiply ``dtype``; without them torch's own GEMM is many times slower."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = ("avx512_bf16", "amx_bf16", "bf16") if dtype == torch.bfloat16 else ("amx_fp16", "avx512_fp16", "fp16")
    return any(capabilities.get(name, False) for name in names)


# Asked in every call: ``os.environ.get`` of a variable that is not set raises and catches twice, a microsecond.
_environment = os.environ._data  # type: ignore[attr-defined]
_INTERPRET = os.environ.encodekey("TRITON_INTERPRET")
_ONE = os.environ.encodevalue("1")


def interpreting() -> bool:
    """Whether triton, when it is imported, interprets its kernels on the CPU."""
    return _environment.get(_INTERPRET) == _ONE


def plan_for(
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: bool,
    device: torch.device,
    request: str | None,
) -> Plan:
    """The cached plan of a call; arguments as in :class:`Facts`."""
    return _plan_for(M, N, K, R, dtype, adapter_dtype, dropout, device, request, interpreting())


@functools.lru_cache(maxsize=4096)
def _plan_for(M, N, K, R, dtype, adapter_dtype, dropout, device, request, interpreted) -> Plan:
    return make_plan(Facts(M, N, K, R, dtype, adapter_dtype, dropout, device_facts(device, interpreted)), request)


def parse_request(request: str | None) -> tuple[str | None, dict[str, str]]:
    """("triton", {"expand": "pointer"}) from "triton:expand=pointer".

    Raises:
        ValueError: an unknown strategy, piece or form; the message lists the known ones.
    """
    if request is None:
        return None, {}
    strategy, _, rest = request.partition(":") if isinstance(request, str) else (request, "", "")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be None or one of {', '.join(STRATEGIES)}, got {strategy!r}")
    forced: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        piece, _, form = item.partition("=")
        known = _GEMM_FORMS if piece in ("expand", "grad_x") else _SKINNY_FORMS
        if strategy != "triton" or piece not in PIECES:
            raise ValueError(f"cannot force {item!r}: only 'triton' takes forms, for the pieces {', '.join(PIECES)}")
        if form not in known:
            raise ValueError(f"{piece} has no form {form!r}; it has {', '.join(known)}")
        forced[piece] = form
    return strategy, forced


def triton_refusal(facts: Facts) -> str:
    """Why the ``triton`` strategy cannot take this call; "" where it can."""
    if facts.device.triton_reason:
        return facts.device.triton_reason
    if torch.float64 in (facts.dtype, facts.adapter_dtype):
        return "the kernels accumulate in float32 and would lower float64"
    if facts.R > MAX_TRITON_RANK:
        return f"the kernels take ranks up to {MAX_TRITON_RANK}, this one is {facts.R}"
    return ""


def make_plan(facts: Facts, request: str | None = None) -> Plan:
    """The plan for these facts; ``request`` as in the module's docstring.

    Raises:
        ValueError: the request cannot be met; the message says why.
    """
    strategy, forced = parse_request(request)
    refusal = triton_refusal(facts)
    reasons: list[str] = []
    if strategy == "triton" and refusal:
        raise ValueError(f"strategy='triton' cannot run here: {refusal}; use strategy=None or 'torch'")
    if strategy is not None:
        reasons.append(f"strategy {strategy!r} was asked for")
    elif refusal:
        strategy, reasons = "torch", [f"not triton: {refusal}"]
    elif facts.device.interpreted:
        strategy, reasons = "torch", ["not triton: its interpreter is for tests; ask for strategy='triton' to use it"]
    elif facts.device.hip:
        strategy = "torch"
        reasons = [
            "not triton: the kernels compile for AMD's gfx942 but no run on an AMD chip such as "
            f"{facts.device.name} has been recorded; ask for strategy='triton' to use them"
        ]
    elif (entry := _entry(facts, "strategy")) is not None and entry.form == "torch":
        strategy = "torch"
        reasons.append(f"torch as a whole: {_as_measured(facts, entry)}")
    else:
        strategy = "triton"
        reasons.append("the skinny products are bound by memory: one kernel each reads x or dy once, dropout included")
    return _with_forms(facts, strategy, forced, reasons)


def _with_forms(facts: Facts, strategy: str, forced: dict[str, str], reasons: list[str]) -> Plan:
    upcast = facts.dtype not in facts.device.native
    if strategy != "triton":
        if strategy == "torch" and upcast:
            reasons.append(
                f"this CPU does not multiply {_short(facts.dtype)}: the GEMMs run on float32 blocks and round once"
            )
        forms: dict[str, Any] = dict.fromkeys(PIECES, "torch")
        return Plan(facts=facts, strategy=strategy, upcast=upcast, reasons=tuple(reasons), **forms)
    forms = dict.fromkeys(PIECES, "triton")
    for piece in ("expand", "grad_x"):
        # The interpreter has no vendor's GEMM to be faster than: there the fused form is what wants testing.
        forms[piece] = "pointer" if facts.device.interpreted and not _rounds_twice(facts) else "beta1"
    picked = {}
    for piece in PIECES:
        entry = _entry(facts, piece)
        if entry is not None and forced.get(piece, entry.form) == entry.form and _usable(facts, entry, reasons):
            forms[piece] = entry.form
            if entry.tile is not None:
                picked[piece] = tuned.fit(entry, _problem(facts), _chip(facts))
        elif piece in ("expand", "grad_x") and piece not in forced and not facts.device.interpreted:
            reasons.append(
                f"{piece}: the vendor GEMM accumulates onto the low-rank product, until a committed measurement on "
                f"{facts.device.name} shows a fused kernel ahead"
            )
    forms.update(forced)
    for piece in PIECES:
        if piece not in picked and (tile := _pick_tile(facts, piece, forms[piece])) is not None:
            picked[piece] = tile
    ordered = tuple((piece, picked[piece]) for piece in PIECES if piece in picked)
    return Plan(facts=facts, strategy=strategy, upcast=upcast, reasons=tuple(reasons), tiles=ordered, **forms)


def _problem(facts: Facts) -> tiles.Problem:
    dtype, adapter_dtype = _short(facts.dtype), _short(facts.adapter_dtype)
    return tiles.Problem(facts.M, facts.N, facts.K, facts.R, dtype, adapter_dtype, facts.dropout)


def _chip(facts: Facts) -> tiles.Chip:
    return tiles.Chip(facts.device.num_sms, facts.device.capability, facts.device.hip)


def _entry(facts: Facts, piece: str) -> tuned.Entry | None:
    table = facts.device.tuned
    return None if table is None else table.find(piece, _problem(facts))


def _as_measured(facts: Facts, entry: tuned.Entry) -> str:
    table = facts.device.tuned
    assert table is not None
    at = f"M {entry.M}, N {entry.N}, K {entry.K}, rank {entry.R}"
    return f"{entry.gain:.2f} x as fast as the rule on {table.chip} at {at} ({table.source})"


def _vectors(facts: Facts, *lengths: int) -> list[bool]:
    """Whether rows of each length load as vectors: of those that do not, large tiles spill registers."""
    problem = _problem(facts)
    return [problem.vectors(length) for length in lengths]


def _rounds_twice(facts: Facts) -> bool:
    """Whether a fused GEMM rounds both sides of the low-rank product as far as its result.

    Float32 adapters over float16: to tf32, which has float16's bits. Over a few ranks the errors do not average out.
    """
    return facts.dtype == torch.float16 != facts.adapter_dtype and facts.R < 4


def _usable(facts: Facts, entry: tuned.Entry, reasons: list[str]) -> bool:
    """Whether the plan may follow an entry; says in ``reasons`` what was measured, or why it is ignored."""
    piece, form = entry.piece, entry.form
    refusal = ""
    if form not in (_GEMM_FORMS if piece in ("expand", "grad_x") else _SKINNY_FORMS):
        refusal = f"{piece} has no such form"
    elif form in ("pointer", "descriptor") and _rounds_twice(facts):
        refusal = "with float32 adapters over float16 and fewer than 4 ranks it errs more than the plain layer may"
    elif form == "descriptor":
        refusal = _descriptor_refusal(facts)
    elif entry.tile is not None and _vectors(facts, facts.N, facts.K) != _vectors(facts, entry.N, entry.K):
        refusal = f"its tile is for N {entry.N}, K {entry.K}; 16-bit rows that 16 does not divide load one by one"
    if not refusal and entry.tile is not None:
        refusal = tuned.tile_refusal(piece, form, entry.tile, _problem(facts), _chip(facts))
    if refusal:
        reasons.append(f"{piece}: the measured form {form!r} is ignored: {refusal}")
    else:
        reasons.append(f"{piece}: {form} was measured {_as_measured(facts, entry)}")
    return not refusal


def _pick_tile(facts: Facts, piece: str, form: str) -> Any:
    """The kernel's tile for a piece in this form; None where no kernel runs.

    Raises:
        ValueError: the descriptor form, on a chip without TMA or sizes it cannot address.
    """
    if form == "torch":
        return None
    problem, chip = _problem(facts), _chip(facts)
    if form == "beta1":
        return tiles.pick_lowrank_y(problem, chip) if piece == "expand" else tiles.pick_lowrank_x(problem, chip)
    if form == "descriptor":
        if refusal := _descriptor_refusal(facts):
            raise ValueError(f"{piece}=descriptor cannot run here: {refusal}; use {piece}=pointer")
        pick = tiles.pick_expand if piece == "expand" else tiles.pick_grad_x
        return pick(problem, chip, descriptor=True)
    return getattr(tiles, f"pick_{piece}")(problem, chip)


def _descriptor_refusal(facts: Facts) -> str:
    """Why the descriptor form cannot take these sizes here; "" where it can."""
    if not (_chip(facts).descriptors or facts.device.interpreted):
        return f"{facts.device.name} has no TMA (compute capability 9.0 and newer)"
    if _problem(facts).itemsize != 2:
        return f"it is for 16-bit dtypes, not {_short(facts.dtype)}"
    if facts.N % 8 or facts.K % 8 or 0 in (facts.N, facts.K):
        return f"N = {facts.N} and K = {facts.K} must be positive multiples of 8 (rows of 16 bytes)"
    return ""


def describe_piece(plan: Plan, piece: str) -> str:
    """One line on how a piece runs, with its tile where a kernel does it."""
    tile = dict(plan.tiles).get(piece)
    return getattr(plan, piece) + (f"  {tile}" if tile is not None else "")
