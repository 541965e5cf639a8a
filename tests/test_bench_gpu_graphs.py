"""``bench/gpu_timing.py`` on a made-up GPU whose clock only its own work moves: what a graph's events enclose."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
_PROLOGUE = 2.0  # ms of the kernels that hand seed and offset to a graph that draws


class Card:
    """Work moves the clock, or becomes a node of the graph that is being captured."""

    def __init__(self):
        self.clock, self.graph, self.external = 0.0, None, True

    def do(self, node) -> None:
        if self.graph is None:
            node()
        else:
            self.graph.nodes.append(node)

    def work(self, ms: float, draws: bool = False) -> None:
        if draws and self.graph is not None:
            self.graph.draws = True
        self.do(lambda: self.advance(ms))

    def advance(self, ms: float) -> None:
        self.clock += ms


@pytest.fixture
def card():
    return Card()


@pytest.fixture
def timing(card, monkeypatch):
    """The module on ``card``; it leaves with the test."""

    class Graph:
        def __init__(self):
            self.nodes, self.draws = [], False

        def capture_begin(self, pool):
            card.graph = self

        def capture_end(self):
            card.graph = None

        def replay(self):
            card.advance(_PROLOGUE if self.draws else 0.0)
            for node in self.nodes:
                node()

    class Event:
        def __init__(self, enable_timing, **options):
            assert enable_timing
            if options and not card.external:
                raise TypeError("an unexpected keyword argument 'external'")
            self.external = options.get("external", False)

        def record(self):
            assert self.external or card.graph is None
            card.do(self.stamp)

        def stamp(self):
            self.at = card.clock

        def elapsed_time(self, end):
            return end.at - self.at

    class Buffer:
        def view(self, dtype):
            return self

        def zero_(self):
            card.work(0.5)

        def amax(self):
            card.work(7.0)

    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCH)
    module = importlib.import_module("gpu_timing")
    calls = {"current_device": lambda: 0, "synchronize": lambda: None, "graph_pool_handle": lambda: (0, 0)}
    calls |= {"stream": lambda stream: contextlib.nullcontext(), "Stream": SimpleNamespace}
    for name, value in {"CUDAGraph": Graph, "Event": Event, **calls}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(module, "_flush_buffer", lambda device: Buffer())
    yield module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCH:
            del sys.modules[name]


def both(timing, card) -> dict[str, list[float]]:
    """ms of a graph that draws, whose work takes 1 ms longer with every replay from 3 on, and of one that does not."""
    took = iter(range(3, 1000))
    work = {"draws": lambda: (card.work(0.0, draws=True), card.do(lambda: card.advance(next(took))))}
    work["plain"] = lambda: card.work(4.0)
    graphs = {name: timing.captured(call, (0, 0)) for name, call in work.items()}
    times = timing.launch_rounds(graphs, 0.2)
    return {name: [round(1e3 * value, 6) for value in values] for name, values in times.items()}


def test_what_torch_runs_before_a_graph_that_draws_is_not_timed(timing, card):
    times = both(timing, card)
    assert timing.marked_inside()
    assert times["plain"] == [4.0] * len(times["plain"])
    assert times["draws"] == [5.0 + n for n in range(len(times["draws"]))]  # two replays before; each read in its round


@pytest.mark.parametrize("missing", ["in torch", "on HIP"])
def test_without_events_in_graphs_they_are_around_the_replay(timing, card, monkeypatch, missing):
    card.external = missing != "in torch"
    monkeypatch.setattr(torch.version, "hip", "7.0" if missing == "on HIP" else None)
    times = both(timing, card)
    assert not timing.marked_inside()
    assert times["plain"] == [4.0] * len(times["plain"])
    assert times["draws"] == [5.0 + _PROLOGUE + n for n in range(len(times["draws"]))]
