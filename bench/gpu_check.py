"""The GPU's results against float64, before anything is timed: every strategy and every kernel, by the accuracy rule.

    python bench/gpu_check.py --regimes bf16,fp16 --output check.json

Run by ``gpu.py``, one process per regime: their kernels compile side by side, and a launch that kills its process takes
no other with it. What a process was at when it died is in the JSON as ``attempting``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import gpu_state
import torch
from gpu_grid import PIECES, STRATEGIES
from shapes import REGIMES

from fused_lora.accuracy import compare, random_case
from fused_lora.plan import plan_for

# (M, N, K, rank, p): ragged with an odd rank; few rows; a real layer's shape, twice; more ranks than one tile holds.
_SHAPES = (
    (211, 333, 517, 17, 0.1),
    (37, 264, 1032, 3, 0.0),
    (2048, 4096, 4096, 16, 0.1),
    (1000, 1024, 4096, 16, 0.0),
    (300, 520, 648, 130, 0.5),
)
_QUICK_SHAPES = ((21, 40, 48, 5, 0.1),)
# da and db sum over the rows: the more there are, the more a tensor core's accumulation errs. One layer of a training
# step, for the requests that tell these sums apart, in the regimes of a bfloat16 model.
_MANY_ROWS = (8192, 4096, 4096, 16, 0.1)
_SUMS = ("ours", "ours-torch", "shrink triton", "grad_b triton", "grad_a triton")
_SUMMED_IN = ("bf16", "bf16-fp32")


def needs_multiples(request: str | None) -> bool:
    """Whether the request has a descriptor form, which takes multiples of 8 only."""
    return request is not None and "descriptor" in request


def cases_of(name: str, regime: str, device: torch.device, quick: bool) -> tuple[tuple, ...]:
    """(M, N, K, rank, p) of every case of a request; on a CPU, whatever is asked, none whose float64 takes minutes."""
    if quick:
        return _QUICK_SHAPES
    long = device.type == "cuda" and name in _SUMS and regime in _SUMMED_IN
    return (*_SHAPES, _MANY_ROWS) if long else _SHAPES


def examine(name: str, regime: str, device: torch.device, quick: bool) -> dict[str, object]:
    """The verdict on one request: ``red`` is empty, or says what is wrong where.

    ``worst``: the largest of our errors over the plain layer's, of all results and norms; the rule's bound is 2.
    """
    request = (STRATEGIES | PIECES)[name]
    dtypes = REGIMES[regime]
    worst, red, cases = 0.0, [], 0
    for M, N, K, rank, p in cases_of(name, regime, device, quick):
        if needs_multiples(request) and (N % 8 or K % 8):
            continue
        at = f"M {M}, N {N}, K {K}, rank {rank}, p {p:g}"
        try:
            plan_for(M, N, K, rank, dtypes.dtype, dtypes.adapter_dtype, p > 0.0, device, request)
        except ValueError as error:
            return {"refused": f"{error} ({at})"}
        try:
            errors = compare(random_case(M, N, K, rank, dtypes.dtype, dtypes.adapter_dtype, p, device), request)
        except Exception as error:  # whatever a kernel raises, a ValueError too, is what this program is for
            return {"red": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} ({at})"}
        cases += 1
        for result, e in errors.items():
            worst = max(worst, e.ours_max / max(e.plain_max, 1e-30), e.ours_rms / max(e.plain_rms, 1e-30))
            if not e.holds:
                red.append(f"{result}: max {e.ours_max:.1e}, plain {e.plain_max:.1e}; RMS {e.ours_rms:.1e}, "
                           f"plain {e.plain_rms:.1e} ({at})")  # fmt: skip
    return {"worst": round(worst, 3), "cases": cases, "red": "; ".join(red)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Strategies and kernels against float64, by the accuracy rule.")
    parser.add_argument("--regimes", default=",".join(REGIMES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--output", type=Path, required=True, help="the JSON; what it already holds is not done again")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    for regime in options.regimes.split(","):
        for name in STRATEGIES | PIECES:
            key = f"{name} | {regime}"
            if key in found:
                continue
            gpu_state.write(options.output, {**found, "attempting": key})
            found[key] = verdict = examine(name, regime, device, options.quick)
            gpu_state.write(options.output, found)
            if device.type == "cuda" and verdict.get("red"):
                torch.cuda.synchronize()  # dies here where the device is lost, and the next process goes on


if __name__ == "__main__":
    sys.exit(main())
