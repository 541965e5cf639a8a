"""Which measured tiles compile clean (``kernel_health.py``): those that do not are left to the rule. Needs no GPU."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from dataclasses import replace

from fused_lora.kernels import tiles
from fused_lora.tuned import Entry

COMPILERS = max(1, min(14, (os.cpu_count() or 4) - 2))  # processes at a time


def _case_of(arch: str, entry: Entry) -> tuple:
    """The arguments of ``kernel_health.Case``; of N and K only whether 16 divides them, which is all Triton knows."""
    piece = {"expand": "lowrank_y", "grad_x": "lowrank_x"}[entry.piece] if entry.form == "beta1" else entry.piece
    masked = entry.dropout and piece in ("shrink", "grad_a", "grad_x", "lowrank_x")
    divided = (entry.N % 16 == 0, entry.K % 16 == 0)
    return arch, entry.regime, piece, tiles.in_code(entry.tile), masked, *divided


def _breaches(case: tuple, chip: tiles.Chip) -> list[str]:
    import kernel_health as health

    arch, regime, piece, tile, masked, n_divided, k_divided = case
    health.CHIPS.setdefault(arch, chip)
    sizes = (health.N if n_divided else health.ODD, health.K if k_divided else health.ODD)
    try:
        found = health.examine(health.Case(arch, regime, piece, tile, masked, *sizes))
    except Exception as error:  # what cannot be looked at is not clean
        return [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]
    return [breach for row in found for breach in row.breaches]


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Inside, processes that are started compile kernels, whatever this one does."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET")
        os.environ.update({} if before is None else {"TRITON_INTERPRET": before})


def _verdicts(cases: list[tuple], chip: tiles.Chip, deadline: float | None, sign: Callable[[], object]) -> dict:
    """The breaches of each case; what is not compiled by the deadline has that for one."""
    verdicts = {case: ["not compiled, for want of time"] for case in cases}
    left = None if deadline is None else max(0.0, deadline - time.time())
    if not cases or left == 0.0:
        return verdicts
    with _compiling():
        pool = ProcessPoolExecutor(min(COMPILERS, len(cases)), multiprocessing.get_context("spawn"))
        futures = {pool.submit(_breaches, case, chip): case for case in cases}  # starts the processes
    with contextlib.suppress(TimeoutError):
        for future in as_completed(futures, left):
            error = future.exception()  # a process that ended
            verdicts[futures[future]] = future.result() if error is None else [f"{type(error).__name__}: {error}"]
            sign()
    pool.shutdown(wait=False, cancel_futures=True)
    return verdicts


def clean(
    entries: list[Entry], chip: tiles.Chip, deadline: float | None = None, sign: Callable[[], object] = lambda: None
) -> tuple[list[Entry], list[str]]:
    """(the entries, those whose tiles do not compile clean turned into the rule's choice; what is wrong with these).

    ``deadline``: seconds since the epoch. ``sign``: called after each compilation.
    """
    arch = "".join(map(str, chip.capability))
    cases = dict.fromkeys(_case_of(arch, entry) for entry in entries if entry.tile is not None)
    verdicts = _verdicts(list(cases), chip, deadline, sign)
    kept = []
    for entry in entries:
        if entry.tile is not None and verdicts[_case_of(arch, entry)]:
            usual = "beta1" if entry.piece in ("expand", "grad_x") else "triton"
            entry = replace(entry, form=usual, tile=None, seconds=entry.rule_seconds)
        kept.append(entry)
    return kept, [f"{case}: {'; '.join(breaches)}" for case, breaches in verdicts.items() if breaches]
