"""The grid of the benchmarks, as data: shapes of real models, dtypes, dropout, ranks, modes.

x (M, K)   weight W (N, K)   lora_a A (R, K)   lora_b B (N, R)   y, dy (M, N)   M rows, K in_features, N out_features
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MODES = ("forward", "forward+backward")
SCALE = 2.0  # lora_alpha / rank of every layer: a power of two, so that no provider rounds it


@dataclass(frozen=True)
class Regime:
    """The dtype of x, W, y and the dtype of the adapters."""

    dtype: torch.dtype
    adapter_dtype: torch.dtype


REGIMES = {
    "fp32": Regime(torch.float32, torch.float32),
    "bf16": Regime(torch.bfloat16, torch.bfloat16),
    "bf16-fp32": Regime(torch.bfloat16, torch.float32),  # PEFT's default over a bfloat16 base
    "fp16": Regime(torch.float16, torch.float16),
    "fp16-fp32": Regime(torch.float16, torch.float32),
}


@dataclass(frozen=True)
class Linear:
    """One linear layer of a model; ``count`` of them in a decoder layer have this shape."""

    name: str
    K: int
    N: int
    count: int = 1


@dataclass(frozen=True)
class ShapeSet:
    """Layers that are measured together, and the numbers of rows they are measured at."""

    linears: tuple[Linear, ...]
    rows: tuple[int, ...]


# Grouped-query attention makes k and v narrow: the shape where the low-rank branch weighs most.
# 8192 rows are a full training step on one card, 512 rows are bound by launches.
SHAPE_SETS = {
    "tiny": ShapeSet((Linear("linear", 64, 48),), (16,)),
    "cpu": ShapeSet((Linear("linear", 2048, 2048),), (256, 1024)),
    "llama-3.2-1b": ShapeSet(
        (
            Linear("q,o", 2048, 2048, 2),
            Linear("k,v", 2048, 512, 2),
            Linear("gate,up", 2048, 8192, 2),
            Linear("down", 8192, 2048),
        ),
        (512, 8192),
    ),
    "llama-3-8b": ShapeSet(
        (
            Linear("q,o", 4096, 4096, 2),
            Linear("k,v", 4096, 1024, 2),
            Linear("gate,up", 4096, 14336, 2),
            Linear("down", 14336, 4096),
        ),
        (512, 8192),
    ),
    "llama-3-70b": ShapeSet(
        (
            Linear("q,o", 8192, 8192, 2),
            Linear("k,v", 8192, 1024, 2),
            Linear("gate,up", 8192, 28672, 2),
            Linear("down", 28672, 8192),
        ),
        (512, 8192),
    ),
}


@dataclass(frozen=True)
class Case:
    """What one provider is timed on; the cases of one ``group`` differ in nothing but the provider."""

    shape_set: str
    linear: str
    count: int
    M: int
    K: int
    N: int
    mode: str
    regime: str
    p: float
    rank: int

    @property
    def shape(self) -> str:
        return f"{self.shape_set} {self.linear} M={self.M} K={self.K} N={self.N}"

    @property
    def group(self) -> str:
        return f"{self.shape} | {self.mode} | {self.regime} | p={self.p:g} | r={self.rank}"

    @property
    def id(self) -> str:
        """Without spaces, for ``pytest -k``."""
        mode = "fwd" if self.mode == "forward" else "fwdbwd"
        return f"{self.shape_set}-{self.linear}-M{self.M}-{mode}-{self.regime}-p{self.p:g}-r{self.rank}"

    @property
    def dtype(self) -> torch.dtype:
        return REGIMES[self.regime].dtype

    @property
    def adapter_dtype(self) -> torch.dtype:
        return REGIMES[self.regime].adapter_dtype

    def as_dict(self) -> dict[str, object]:
        """The keys under which a result names its case."""
        return {
            "group": self.group,
            "shape": self.shape,
            "set": self.shape_set,
            "linear": self.linear,
            "count": self.count,
            "M": self.M,
            "K": self.K,
            "N": self.N,
            "mode": self.mode,
            "regime": self.regime,
            "dtype": str(self.dtype).removeprefix("torch."),
            "adapter_dtype": str(self.adapter_dtype).removeprefix("torch."),
            "p": self.p,
            "rank": self.rank,
        }


def add_grid_options(add: Callable[..., object]) -> None:
    """Declare the options of the grid; ``add`` is ``ArgumentParser.add_argument`` or pytest's ``addoption``."""
    add("--quick", action="store_true", help="the smallest grid and few rounds: shows that it runs, times nothing")
    add("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    add("--shapes", help=f"comma list of {', '.join(SHAPE_SETS)} (default: cpu, on a GPU llama-3-8b)")
    add("--rows", help="comma list of row counts M, instead of those of the shape set")
    add(
        "--dtype",
        help=f"comma list of {', '.join(REGIMES)}; the second name is the adapters' (default: fp32,bf16,bf16-fp32)",
    )
    add("--rank", help="comma list of ranks (default: 8,16,64)")
    add("--p", help="comma list of dropout probabilities (default: 0,0.1)")
    add("--mode", help=f"comma list of {', '.join(MODES)} (default: both)")


def device_of(options: Namespace) -> torch.device:
    """The device that was asked for, or the GPU where there is one."""
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _items(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    items = text.split(",")
    for item in items:
        if item not in known:
            raise ValueError(f"{option} has no {item!r}; it takes a comma list of {', '.join(known)}")
    return items


def _numbers(option: str, text: str, number: type[int] | type[float]) -> list[Any]:
    try:
        return [number(item) for item in text.split(",")]
    except ValueError:
        kind = "whole numbers" if number is int else "numbers"
        raise ValueError(f"{option} takes a comma list of {kind}, got {text!r}") from None


def cases(options: Namespace) -> list[Case]:
    """The cases of the grid, those of one group of shapes next to each other.

    Raises:
        ValueError: an option names something unknown; the message lists what is known.
    """
    cuda = device_of(options).type == "cuda"
    shapes = options.shapes or ("tiny" if options.quick else "llama-3-8b" if cuda else "cpu")
    regimes = options.dtype or ("fp32,bf16-fp32" if options.quick else "fp32,bf16,bf16-fp32")
    ranks = _numbers("--rank", options.rank or ("8" if options.quick else "8,16,64"), int)
    probabilities = _numbers("--p", options.p or "0,0.1", float)
    modes = _items("--mode", options.mode or ",".join(MODES), MODES)
    rows = _numbers("--rows", options.rows, int) if options.rows else None
    return [
        Case(name, linear.name, linear.count, M, linear.K, linear.N, mode, regime, p, rank)
        for name in _items("--shapes", shapes, tuple(SHAPE_SETS))
        for linear in SHAPE_SETS[name].linears
        for M in rows or SHAPE_SETS[name].rows
        for regime in _items("--dtype", regimes, tuple(REGIMES))
        for mode in modes
        for p in probabilities
        for rank in ranks
    ]
