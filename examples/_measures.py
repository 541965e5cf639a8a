"""How the examples measure what was learnt: shares, tags, and how sure one can be of them."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import torch

Tags = tuple[str, ...]


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share."""
    z = 1.959964
    middle, half = right + z * z / 2, z * math.sqrt(right * (n - right) / n + z * z / 4)
    return max(0.0, (middle - half) / (n + z * z)), min(1.0, (middle + half) / (n + z * z))


def mcnemar(better: int, worse: int) -> float:
    """Two-sided p of so uneven a split of the answers that changed, if each were as likely to change for the worse."""
    n, fewer = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


class Score(NamedTuple):
    """Of all items together; micro-F1 with its 95 % interval, from 1000 resamplings of the items."""

    precision: float
    recall: float
    f1: float
    low: float
    high: float


def score(right: list[Tags], written: list[Tags]) -> Score:
    """How well tags without repetitions were written, item by item."""
    counts = [(len({*r} & {*w}), len(w), len(r)) for r, w in zip(right, written, strict=True)]
    hits, given, wanted = torch.tensor(counts, dtype=torch.float64).T
    draws = torch.randint(len(counts), (1000, len(counts)), generator=torch.Generator().manual_seed(0))
    f1 = 2 * hits[draws].sum(1) / (given + wanted)[draws].sum(1)
    low, high = f1.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    total, given, wanted = hits.sum().item(), given.sum().item(), wanted.sum().item()
    return Score(total / max(given, 1), total / wanted, 2 * total / (given + wanted), low, high)


def best_constant(right: list[Tags]) -> Tags:
    """What to answer without reading: always the commonest tags, as many as are best for these items."""
    commonest = [tag for tag, _ in Counter(tag for tags in right for tag in tags).most_common(20)]
    answers = [tuple(commonest[: k + 1]) for k in range(len(commonest))]
    return max(answers, key=lambda answer: score(right, [answer] * len(right)).f1)
