"""The linear layer under pytest-benchmark: one benchmark group per shape, mode, dtype, dropout and rank.

Within a group everything but the provider is equal, and the frozen layer is timed with the rest: it is the floor.
The providers of a group run one after another; for ratios on a machine whose speed drifts use ``paired.py``.
"""

from __future__ import annotations

import pytest
from measure import Pass, environment, kept_bytes
from providers import Provider, check, make_inputs, planned
from shapes import Case, device_of

_MAX_ROUNDS = 100
_CUDA_WARM_UP = 10  # passes; brings the clocks up and compiles the kernels


def test_linear(benchmark, case: Case, provider: Provider, budget: float, pytestconfig: pytest.Config) -> None:
    device = device_of(pytestconfig.option)
    check(provider.name, case.regime, device)
    inputs = make_inputs(case.M, case.K, case.N, case.rank, case.regime, device)
    layer = provider.build(inputs, case.p)
    benchmark.group = case.group
    benchmark.extra_info.update(case.as_dict(), provider=provider.name, label=provider.label, **environment(device))
    benchmark.extra_info["kept_bytes"] = kept_bytes(layer, inputs.x)
    if provider.name == "ours":
        benchmark.extra_info["strategy"] = planned(case, device)
    run = Pass(layer, inputs, case.mode)
    for _ in range(_CUDA_WARM_UP if device.type == "cuda" else 1):
        trial = run.seconds()
    rounds = min(max(int(budget / trial), 1 if trial > budget else 3), _MAX_ROUNDS)
    benchmark.pedantic(run, setup=run.prepare, rounds=rounds, iterations=1, warmup_rounds=0)
