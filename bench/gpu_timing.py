"""How ``gpu.py`` times: providers in turns, the L2 cache flushed, as CUDA graphs (no launches) and eagerly (launches).

    graph   one pass captured once and replayed; the time between two events in the graph (``Captured``)
    eager   one pass as a training loop calls it, from an idle device to an idle device, by the host's clock

Both say what a layer costs: ``graph`` what the GPU does, ``eager`` what the host adds where there are few rows. On a
CPU there is only ``eager``.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter

import torch
from measure import Pass, _flush_buffer, kept_bytes
from providers import Inputs
from torch import nn

_WARM_UP = 2
_FEWEST, _MOST = 7, 31  # rounds
_HEAD_START = 3  # flushes that keep the GPU busy while the host enqueues the first launch of a round
Marks = tuple[torch.cuda.Event, torch.cuda.Event]


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and number of values, in seconds or as a ratio."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": float(f"{median:.6g}"), "q1": float(f"{q1:.6g}"), "q3": float(f"{q3:.6g}"), "rounds": len(values)}


def paired(times: dict[str, list[float]], name: str, other: str) -> dict[str, float]:
    """name / other, each ratio formed within a round."""
    return spread([one / two for one, two in zip(times[name], times[other], strict=True)])


def rounds_for(once: float, seconds: float) -> int:
    """Rounds that fit into ``seconds``, where one round of all providers takes ``once``."""
    fewest = _FEWEST if seconds > 0.1 else 2  # --quick
    return max(fewest, min(_MOST, int(seconds / max(once, 1e-9))))


class Subject:
    """One provider on one case: its eager pass and, on a GPU, the graph of the same pass."""

    def __init__(self, layer: nn.Module, inputs: Inputs, mode: str):
        self.layer, self.inputs = layer, inputs
        self.run = Pass(layer, inputs, mode)
        self.graph: Captured | None = None
        self.peak_bytes: int | None = None
        compiled = hasattr(layer, "_orig_mod")  # by torch.compile: a hook on what it saves would change its graph
        self.kept_bytes = None if compiled else kept_bytes(layer, inputs.x)
        for _ in range(_WARM_UP):
            self.run.seconds()
        if self.run.cuda:
            self.peak_bytes = self._peak()

    def _peak(self) -> int:
        """The most memory one pass holds at a time beyond what is there before it: x, dy, the parameters."""
        self.run.prepare()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.run()
        return torch.cuda.max_memory_allocated() - before

    def results(self) -> list[torch.Tensor]:
        """y and the gradients, fresh."""
        y = self.layer(self.inputs.x)
        return [y.detach(), *torch.autograd.grad(y, self._leaves(), self.inputs.dy)]

    def _leaves(self) -> list[torch.Tensor]:
        return [self.inputs.x, *(p for p in self.layer.parameters() if p.requires_grad)]

    def _body(self) -> None:
        y = self.layer(self.inputs.x)
        if self.run.backward:
            torch.autograd.grad(y, self._leaves(), self.inputs.dy)

    def capture(self, pool: tuple[int, int]) -> None:
        """Capture the pass. ``pool`` is shared: what a graph leaves behind the next may overwrite, nobody reads it."""
        self.run.prepare()
        torch.cuda.synchronize()
        with torch.cuda.stream(_capture_stream()):  # what a first call on a stream allocates is no part of the graph
            self._body()
        self.graph = captured(self._body, pool)


class Captured:
    """The graph of a call, which a call of this replays; ``marks``: its first and last node, two events.

    Where a graph draws random numbers, torch puts two small kernels before every replay that hand it seed and offset.
    They are none of the layer's, and only what draws pays for them: events around the replay would count them in.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, marks: Marks | None):
        self.graph, self.marks = graph, marks

    def __call__(self) -> None:
        self.graph.replay()


def _events(**options: bool) -> Marks:
    return tuple(torch.cuda.Event(enable_timing=True, **options) for _ in range(2))


@functools.cache
def marked_inside() -> bool:
    """Whether events in a graph can be read here: asked once, of a graph that clears a buffer."""
    if torch.version.hip is not None:
        return False  # HIP records none in graphs
    try:
        marks = _events(external=True)
        probe = _captured(_flush_buffer(_device()).zero_, torch.cuda.graph_pool_handle(), marks)
        probe()
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]) > 0.0
    except (TypeError, ValueError, RuntimeError):  # then they are recorded around the replay, and the JSON says so
        return False


def captured(call: Callable[[], object], pool: tuple[int, int]) -> Captured:
    """The graph of a call that has run before, between two events where they can be read."""
    return _captured(call, pool, _events(external=True) if marked_inside() else None)


def _captured(call: Callable[[], object], pool: tuple[int, int], marks: Marks | None) -> Captured:
    """Not by ``torch.cuda.graph``: it collects garbage, which takes longer."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(_capture_stream()), _no_collection():
        graph.capture_begin(pool=pool)
        try:
            if marks:
                marks[0].record()
            call()
            if marks:
                marks[1].record()
        except Exception:
            with contextlib.suppress(Exception):  # the capture is spoilt; what spoilt it is the error to report
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.synchronize()
    return Captured(graph, marks)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A collection that drops an older graph in the middle of a capture calls what a capture does not allow."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def graph_rounds(subjects: dict[str, Subject], seconds: float) -> dict[str, list[float]]:
    """Seconds of every provider and round; queued ahead of the GPU, so no host time is in them."""
    return launch_rounds({n: subject.graph for n, subject in subjects.items() if subject.graph is not None}, seconds)


def _marks_of(launch: Callable[[], object]) -> Marks | None:
    return getattr(launch, "marks", None)


def _one_round(launches: dict[str, Callable[[], object]], names: list[str], flush: torch.Tensor) -> dict[str, Marks]:
    """Enqueue every launch once, each behind a flush; its events by name, a graph's own where it has some."""
    found = {}
    for name in names:
        flush.amax()  # read, not written: lines that are yet to be written back would be charged to the provider
        if own := _marks_of(launches[name]):
            launches[name]()
        else:
            around = _events()
            around[0].record()
            launches[name]()
            around[1].record()
        found[name] = own or around
    return found


def launch_rounds(launches: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """As :func:`graph_rounds`, for anything that only enqueues work: one untimed round, then rounds in random order."""
    flush = _flush_buffer(_device()).view(torch.int32)
    shuffle, names, own = random.Random(0).shuffle, list(launches), any(map(_marks_of, launches.values()))
    times: dict[str, list[float]] = {name: [] for name in names}
    waiting: list[dict[str, Marks]] = []

    def read() -> None:
        torch.cuda.synchronize()
        for name, (start, end) in ((name, pair) for marks in waiting for name, pair in marks.items()):
            times[name].append(start.elapsed_time(end) * 1e-3)
        waiting.clear()

    _one_round(launches, names, flush)
    torch.cuda.synchronize()
    before = perf_counter()
    _one_round(launches, names, flush)
    torch.cuda.synchronize()
    for _ in range(rounds_for(perf_counter() - before, seconds)):
        shuffle(names)
        if own:  # the next replay of a graph writes over the times of this one
            read()
            for _ in range(_HEAD_START):
                flush.amax()
        waiting.append(_one_round(launches, names, flush))
    read()
    return times


def eager_rounds(subjects: dict[str, Subject], seconds: float) -> dict[str, list[float]]:
    """Seconds of every provider and round, launches and the synchronisation at the end included."""
    shuffle = random.Random(0).shuffle
    names = list(subjects)
    once = sum(subjects[name].run.seconds() for name in names)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds_for(once, seconds)):
        shuffle(names)
        for name in names:
            times[name].append(subjects[name].run.seconds())
    for subject in subjects.values():
        subject.run.prepare()
    return times


def ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """What this card reaches in this run: bytes per second of a copy (read + written), flops of a bfloat16 product."""
    size = 1 << (22 if quick else 32 if device.type == "cuda" else 26)
    side = 128 if quick else 8192 if device.type == "cuda" else 1024
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    launches = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(left, right)}
    if device.type == "cuda":
        times = launch_rounds(launches, 1.0)
    else:
        times = {name: [_host_seconds(launch) for _ in range(3)] for name, launch in launches.items()}
    return {
        "copy_bytes_per_second": 2 * size / statistics.median(times["copy"]),
        "matmul_flops_per_second": 2 * side**3 / statistics.median(times["matmul"]),
        "copy_bytes": size,
        "matmul_side": side,
    }


def _host_seconds(launch: Callable[[], object]) -> float:
    start = perf_counter()
    launch()
    return perf_counter() - start
