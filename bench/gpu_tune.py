"""Which form and tile of each piece is fastest on this card: the measurements behind ``fused_lora/tuned.json``.

    python bench/gpu.py --tune --output bench/results/tune-h200.json    measure
    python bench/gpu_tune.py bench/results/tune-h200.json               put what was measured into fused_lora/tuned.json
    python bench/gpu_tune.py --compile bench/results/tune-h200.json     only tiles that this triton compiles clean too

Every piece is called by itself, as the operator calls it, in every form and in every tile of ``kernels/candidates.py``,
in turns, from CUDA graphs. What computes something else than the rule's choice is rejected; what wins by less than
``_CLEAR`` counts as the rule's choice; what does not compile clean (``kernel_health.py``) is not taken.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import gpu_state
import torch
from gpu_clean import COMPILERS, clean
from gpu_grid import STRATEGIES, cells, plan_of
from gpu_timing import Subject, _host_seconds, captured, eager_rounds, graph_rounds, launch_rounds
from providers import PROVIDERS, make_inputs
from shapes import SCALE, Case

from fused_lora import pieces, plan, tuned
from fused_lora.kernels import tiles
from fused_lora.kernels.candidates import candidates
from fused_lora.plan import PIECES, Plan
from fused_lora.tuned import Entry

_CLEAR = 0.98  # of the rule's time: below it a win is a win
_GATE = 1e-2  # relative difference from the rule's result: for mistakes, both were held to float64 before
_SECONDS = 0.25  # of rounds for one piece at one size
_EAGER_ROWS = 2048
_FOR_COMPILING = 60.0  # seconds kept at the end, for looking at what the compiler made of the winners
_FORMS = dict.fromkeys(("shrink", "grad_b", "grad_a"), ("torch", "triton"))
_FORMS |= dict.fromkeys(("expand", "grad_x"), ("torch", "beta1", "pointer", "descriptor"))


def sizes(quick: bool) -> list[Case]:
    """The cells to tune at: those of the table, once for both modes, ranks 16 and 64 (which stand for their tiles)."""
    grid = [case for case in cells(quick) if case.mode != "forward"]
    return [case for case in grid if quick or (case.rank in (16, 64) and case.shape_set != "llama-3.2-1b")]


def rule_of(case: Case, device: torch.device) -> Plan:
    """What the plan does without a table."""
    facts = plan_of(case, device, "triton").facts
    return plan.make_plan(replace(facts, device=replace(facts.device, tuned=None)), "triton")


def rule_form(case: Case, device: torch.device, piece: str) -> str:
    return getattr(rule_of(case, device), piece)


def choices(
    case: Case, device: torch.device, piece: str, quick: bool, red: Collection[str] = ()
) -> Iterator[tuple[str, Plan]]:
    """(form, plan with one tile) for all that can run a piece here, but the ``red`` forms; the rule's comes first."""
    rule = rule_of(case, device)
    own = getattr(rule, piece)
    for form in sorted(_FORMS[piece], key=lambda form: form != own):
        if form in red:
            continue
        try:
            forced = plan.make_plan(rule.facts, f"triton:{piece}={form}")
        except ValueError:
            continue
        if form == "torch":
            yield form, forced
            continue
        others = tuple(pair for pair in forced.tiles if pair[0] != piece)
        found = candidates(piece, form, plan._problem(rule.facts), plan._chip(rule.facts))
        for tile in found[:2] if quick else found:
            yield form, replace(forced, tiles=(*others, (piece, tile)))


class Tensors:
    """One layer's tensors, and the call of each piece on them.

    x (M, K)   w (N, K)   a (R, K)   b (N, R)   dy (M, N)   s, ds (M, R) float32
    """

    def __init__(self, case: Case, device: torch.device):
        inputs = make_inputs(case.M, case.K, case.N, case.rank, case.regime, device)
        self.x, self.dy, self.w, self.a, self.b = (
            t.detach() for t in (inputs.x, inputs.dy, inputs.weight, inputs.a, inputs.b)
        )
        self.s = torch.randn(case.M, case.rank, device=device)
        self.ds = torch.randn(case.M, case.rank, device=device)
        self.seed = torch.tensor(7, dtype=torch.int64, device=device)
        self.case = case

    def call(self, piece: str, chosen: Plan) -> Callable[[], list[torch.Tensor]]:
        x, dy, w, a, b, s, ds, case = self.x, self.dy, self.w, self.a, self.b, self.s, self.ds, self.case

        def mask() -> pieces.Mask | None:
            return pieces.Mask(self.seed, case.M, case.K, case.p) if case.p > 0.0 else None

        calls = {
            "shrink": lambda: [pieces.shrink(chosen, x, a, mask())],
            "expand": lambda: [pieces.expand(chosen, x, w, None, s, b, None, SCALE)],
            "grad_b": lambda: list(pieces.grad_b(chosen, dy, b, s, SCALE)),
            "grad_x": lambda: [pieces.grad_xa(chosen, dy, None, w, ds, a, mask(), x.dtype)[0]],
            "grad_a": lambda: [pieces.grad_a(chosen, x, ds, mask())],
        }
        return calls[piece]


def agree(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(
        ((a.float() - b.float()).norm() <= _GATE * b.float().norm()).item() for a, b in zip(one, other, strict=True)
    )


def seconds_of(calls: dict[str, Callable[[], object]], device: torch.device, quick: bool) -> dict[str, float]:
    """The median seconds of each call, in turns."""
    if device.type != "cuda":
        return {name: min(_host_seconds(call) for _ in range(2)) for name, call in calls.items()}
    replays = {}
    pool = torch.cuda.graph_pool_handle()
    for name, call in calls.items():
        replays[name] = captured(call, pool)
    return {name: median(times) for name, times in launch_rounds(replays, 0.02 if quick else _SECONDS).items()}


def tune_piece(worker, tensors: Tensors, piece: str) -> Entry | None:
    """The fastest choice for one piece at one size; None where the rule's choice is out."""
    case, quick = tensors.case, worker.options.quick
    verdicts = worker.state["correctness"]
    red = [form for form in _FORMS[piece] if verdicts.get(f"{piece} {form} | {case.regime}", {}).get("red")]
    options = list(choices(case, worker.device, piece, quick, red))
    calls, wanted = {}, None
    for number, (form, chosen) in enumerate(options):
        call = tensors.call(piece, chosen)
        what = f"{case.id} | {piece} {form} {dict(chosen.tiles).get(piece)}"
        if any(crash["at"] == what for crash in worker.state["crashes"]):
            continue
        worker.at(what)
        try:
            got = call()
        except Exception as error:  # a tile that does not compile or launch is a finding
            worker.state["rejected"].append(f"{what}: {worker.lost(what, error)}")
            continue
        wanted = got if wanted is None else wanted
        if agree(got, wanted):
            calls[number] = call
        else:
            worker.state["rejected"].append(f"{what}: its result is another")
    if 0 not in calls or options[0][0] != rule_form(case, worker.device, piece):
        return None  # the rule's own choice cannot run: there is nothing to be faster than
    worker.at(f"{case.id} | {piece} turns")
    times = seconds_of(calls, worker.device, quick)
    if piece == "grad_b":
        times |= _paired_halves(worker, tensors, options, times, quick)
    best = min(times, key=times.__getitem__)
    best = best if times[best] < _CLEAR * times[0] else 0
    form, chosen = options[best]
    tile = None if best == 0 else dict(chosen.tiles).get(piece)  # the rule's own tile follows the size by itself
    regime = plan._problem(chosen.facts).regime
    return Entry(
        piece, regime, case.M, case.N, case.K, case.rank, case.p > 0.0, form, tile, times[best], times[0]
    )  # fmt: skip


def _paired_halves(worker, tensors: Tensors, options: list, times: dict, quick: bool) -> dict[int, float]:
    """The best ds half and the best db half of a two-pass grad_b were found apart: time them together."""
    halves = {n: dict(options[n][1].tiles)["grad_b"] for n in times if options[n][0] == "triton"}
    halves = {n: tile for n, tile in halves.items() if tile.both is None}
    if not halves:
        return {}
    usual = min(halves)
    ds = min((n for n in halves if halves[n].db == halves[usual].db), key=times.__getitem__)
    db = min((n for n in halves if halves[n].ds == halves[usual].ds), key=times.__getitem__)
    tile = tiles.GradBTile(None, halves[ds].ds, halves[db].db)
    chosen = options[ds][1]
    others = tuple(pair for pair in chosen.tiles if pair[0] != "grad_b")
    options.append(("triton", replace(chosen, tiles=(*others, ("grad_b", tile)))))
    call = tensors.call("grad_b", options[-1][1])
    call()
    return {len(options) - 1: seconds_of({"both": call}, worker.device, quick)["both"]}


def tune_strategy(worker, case: Case, entries: list[Entry]) -> Entry:
    """Whether the whole operator is faster from vendor GEMMs alone, with what was found for its pieces so far."""
    inputs = make_inputs(case.M, case.K, case.N, case.rank, case.regime, worker.device)
    subjects = {}
    with following(entries):
        for name, request in (("triton", "triton"), ("torch", STRATEGIES["ours-torch"])):
            worker.at(f"{case.id} | strategy {name}")
            layer = PROVIDERS["ours"].build(inputs, case.p)
            layer.strategy = request
            subjects[name] = Subject(layer, inputs, case.mode)
        seconds = 0.02 if worker.options.quick else _SECONDS
        if worker.device.type == "cuda" and case.M > _EAGER_ROWS:
            pool = torch.cuda.graph_pool_handle()
            for subject in subjects.values():
                subject.capture(pool)
            times = graph_rounds(subjects, seconds)
        else:
            times = eager_rounds(subjects, seconds)
    took = {name: median(values) for name, values in times.items()}
    form = "torch" if took["torch"] < _CLEAR * took["triton"] else "triton"
    regime = plan._problem(plan_of(case, worker.device).facts).regime
    return Entry(
        "strategy", regime, case.M, case.N, case.K, case.rank, case.p > 0.0, form, None, took[form], took["triton"]
    )  # fmt: skip


class following:
    """Inside, every plan follows these entries instead of the committed table."""

    def __init__(self, entries: list[Entry]):
        self.table = tuned.Tuned("this card", "this run", tuple(entries))

    def __enter__(self) -> None:
        self.asked = plan.device_facts
        plan.device_facts = lambda device, interpreted: replace(self.asked(device, interpreted), tuned=self.table)
        plan._plan_for.cache_clear()

    def __exit__(self, *error: object) -> None:
        plan.device_facts = self.asked
        plan._plan_for.cache_clear()


def warm(worker, number: int) -> None:
    """Call every choice once at a few sizes, so that the kernels are in Triton's cache; one of several processes."""
    count = 0
    for case in sizes(False):
        if (case.linear, case.shape_set) != ("q,o", "llama-3-8b") or case.M not in (8192, 512, 64):
            continue
        tensors = None
        for piece in PIECES:
            for _, chosen in choices(case, worker.device, piece, False):
                count += 1
                if count % COMPILERS != number:
                    continue
                if worker.late():
                    return
                tensors = tensors or Tensors(case, worker.device)
                try:
                    tensors.call(piece, chosen)()
                except Exception as error:  # found again, and noted, where it is measured
                    print(f"{case.id} {piece}: {error}", file=sys.stderr)


def _warm_all(worker) -> None:
    deadline = time.time() + 0.3 * (worker.options.deadline - time.time())
    command = [sys.executable, __file__, "--warm", "--output", str(worker.output), "--device", str(worker.device)]
    processes = [
        subprocess.Popen([*command, "--deadline", str(deadline), "--number", str(number)])
        for number in range(COMPILERS)
    ]
    for process in processes:
        while process.poll() is None and time.time() < deadline + 15:
            worker.at("compiling")
            time.sleep(0.2)
        process.kill()
        process.wait()


def tune_size(worker, case: Case, entries: list[Entry]) -> list[Entry]:
    """What won at one size: the pieces, then the strategy, which follows them and all entries from before."""
    tensors = Tensors(case, worker.device)
    wanted = [piece for piece in PIECES if case.p == 0.0 or piece not in ("expand", "grad_b")]
    found = [entry for piece in wanted if (entry := tune_piece(worker, tensors, piece)) is not None]
    if not worker.why_not("ours", case):
        found.append(tune_strategy(worker, case, [*entries, *found]))
    return found


def tune(worker) -> None:
    """Sizes until the time is up; writes what ``fused_lora/tuned.json`` takes under "chips"."""
    state, device = worker.state, worker.device
    for name in ("rejected", "entries", "tuned_sizes"):
        state.setdefault(name, [])
    if device.type == "cuda" and not state["tuned_sizes"] and not state.get("warmed"):
        _warm_all(worker)
        state["warmed"] = True
        worker.write()
    entries = [tuned.entry_of(fields) for fields in state["entries"]]
    grid = sizes(worker.options.quick)
    reserve, longest = (0.0 if worker.options.quick else _FOR_COMPILING), 0.0
    for case in grid:
        if case.id in state["tuned_sizes"] or any(_ended(crash, case) for crash in state["crashes"]):
            continue
        start = time.time()
        if start + longest > worker.options.deadline - reserve:
            break
        found = tune_size(worker, case, entries)
        entries += found
        longest = max(longest, time.time() - start)
        state["entries"] = [entry.as_dict() for entry in entries]
        state["tuned_sizes"].append(case.id)
        _write_chip(worker, entries)
        shown = ", ".join(f"{entry.piece} {entry.form} {entry.gain:.2f}" for entry in found)
        print(f"{case.id}: {shown}", file=sys.stderr, flush=True)
    left = [case.id for case in grid if case.id not in state["tuned_sizes"]]
    state["skipped_for_time"] = {"count": len(left), "ids": " ".join(left)}
    _conclude(worker, entries)


def _write_chip(worker, entries: list[Entry], compiles_clean: bool = False) -> None:
    """Write the record: ``install`` takes what there is of it, wherever this is stopped."""
    state, facts = worker.state, plan.device_facts(torch.empty(0, device=worker.device).device, plan.interpreting())
    source = (
        f"{state['date'][:10]}, torch {state['torch']}, triton {state['triton']}, commit {str(state['commit'])[:7]}"
    )
    chip = {"name": facts.name, "capability": list(facts.capability), "source": source}
    state["version"] = tuned.VERSION
    state["chips"] = [{**chip, "entries": [entry.as_dict() for entry in entries]}]
    state["compiles_clean"] = compiles_clean
    worker.write()


def _conclude(worker, entries: list[Entry]) -> None:
    """Write the chip's table, first as measured, then with what compiles clean."""
    if worker.device.type != "cuda":
        _write_chip(worker, entries, compiles_clean=True)  # interpreted kernels need not compile
        return
    _write_chip(worker, entries)
    facts = plan.device_facts(torch.empty(0, device=worker.device).device, plan.interpreting())
    sign = functools.partial(worker.at, "kernel health")
    sign()
    on = tiles.Chip(facts.num_sms, facts.capability, facts.hip)
    entries, rejected = clean(entries, on, worker.options.deadline, sign)
    worker.state["rejected"] += rejected
    _write_chip(worker, entries, compiles_clean=True)


def _ended(crash: dict, case: Case) -> bool:
    """Whether a crash came at this size where no single tile can be blamed."""
    at, _, what = crash["at"].partition(" | ")
    return at == case.id and (what.endswith("turns") or what.startswith("strategy"))


def install(record: Path, table: Path = tuned.PATH, compile_here: bool = False) -> list[str]:
    """Put the chips of a record into a table, in place of what it had of the same chips; returns what was left out.

    ``compile_here``: leave out what the triton of this process, maybe another than measured it, does not compile clean.

    Raises:
        ValueError: the tuner was stopped before it had compiled the tiles, and they are not to be compiled here.
    """
    table, measured, rejected = table.resolve(), tuned.read(record), []
    if not compile_here and not json.loads(record.read_text()).get("compiles_clean"):
        raise ValueError(f"{record}: it was stopped before its tiles were looked at; --compile does it here")
    for chip in measured if compile_here else ():
        on = tiles.Chip(1, tuple(chip["capability"]))
        entries, breaches = clean(list(map(tuned.entry_of, chip["entries"])), on)
        chip["entries"] = [entry.as_dict() for entry in entries]
        rejected += breaches
    names = {chip["name"] for chip in measured}
    kept = [chip for chip in tuned.read(table) if chip["name"] not in names]
    gpu_state.write(table, {"version": tuned.VERSION, "chips": [*kept, *measured]})
    return rejected


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put the measurements of gpu.py --tune into fused_lora/tuned.json.")
    parser.add_argument("record", type=Path, nargs="?", help="the JSON of gpu.py --tune")
    parser.add_argument("--table", type=Path, default=tuned.PATH, help="default: fused_lora/tuned.json")
    parser.add_argument("--compile", action="store_true", help="only tiles that the triton here compiles clean")
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    for name, kind in (("output", Path), ("device", str), ("deadline", float), ("number", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.warm:
        from gpu_worker import Worker

        warm(Worker(options), options.number)
    elif options.record is None:
        parser.error("name the JSON that gpu.py --tune wrote")
    else:
        for breach in install(options.record, options.table, options.compile):
            print(breach)


if __name__ == "__main__":
    main()
