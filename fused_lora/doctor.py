"""``fused-lora doctor``: what is installed, what can run here and why not the rest, and whether it computes right.

Needs torch alone. Plain text, 80 columns.
"""

from __future__ import annotations

import platform
import textwrap

import torch
from torch.utils import collect_env

from . import __version__
from .accuracy import RESULTS, Error, compare, random_case
from .plan import Facts, device_facts, interpreting, make_plan, triton_refusal

# (M, N, K, R): odd sizes, so that a tile's edge is crossed. The interpreter needs seconds for what a chip does at once.
_CHECK_SHAPE = (211, 333, 517, 17)
_INTERPRETED_SHAPE = (37, 45, 83, 5)
# (label, dtype of the base layer, dtype of the adapters, dropout)
_REGIMES = (
    ("fp32", torch.float32, torch.float32, 0.0),
    ("fp32", torch.float32, torch.float32, 0.1),
    ("bf16", torch.bfloat16, torch.bfloat16, 0.1),
    ("bf16+fp32", torch.bfloat16, torch.float32, 0.0),
    ("bf16+fp32", torch.bfloat16, torch.float32, 0.1),
    ("fp16+fp32", torch.float16, torch.float32, 0.1),
)
_HALF_TYPES = (("bfloat16", torch.bfloat16), ("float16", torch.float16))
_LEGEND = (
    "Largest relative error against float64: ours, then the plain PyTorch layer's. p is dropout; bf16+fp32 is a "
    "bfloat16 layer with float32 adapters. ok: ours is at most twice the plain layer's, in the max norm "
    "and in the RMS norm."
)
_WIDTH = 79


def run() -> int:
    """Print the report; 0 where every numeric check passed, else 1."""
    _print_versions()
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    _print_devices(devices)
    failures = sum(_check_device(device) for device in devices)
    print()
    print(f"Numeric checks that FAILED: {failures}." if failures else "All numeric checks passed.")
    return 1 if failures else 0


def _heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def _item(name: str, text: str) -> None:
    """``name`` and ``text`` in two columns, wrapped."""
    first = f"  {name:<11} "
    print(textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first)))


def _print_versions() -> None:
    _heading("Versions")
    _item("fused-lora", __version__)
    _item("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    _item("torch", torch.__version__)
    _item("triton", _triton_version())
    _item("CUDA", _cuda_version())


def _triton_version() -> str:
    try:
        import triton
    except ModuleNotFoundError:
        return "not installed (pip install 'fused-lora[triton]')"
    except Exception as error:  # a broken installation is a finding to report, whatever it raises
        return f"installed, but its import fails: {type(error).__name__}: {error}"
    interpreted = ", interpreting its kernels on the CPU (TRITON_INTERPRET=1)" if interpreting() else ""
    return f"{triton.__version__}{interpreted}"


def _cuda_version() -> str:
    if torch.version.hip is not None:
        return f"none: this torch is built for ROCm {torch.version.hip}"
    if torch.version.cuda is None:
        return "none: this torch is built for the CPU"
    driver = collect_env.get_nvidia_driver_version(collect_env.run) or "not found"
    usable = "" if torch.cuda.is_available() else "; torch finds no GPU that it can use"
    return f"{torch.version.cuda}, driver {driver}{usable}"


def _print_devices(devices: list[torch.device]) -> None:
    _heading("Devices")
    for device in devices:
        facts = device_facts(device, interpreting())
        if device.type == "cpu":
            about = f"{torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"
        else:
            gib = torch.cuda.get_device_properties(device).total_memory / 2**30
            about = f"{facts.name}, capability {facts.capability[0]}.{facts.capability[1]}, {gib:.1f} GiB"
        native = [f"{name} {'yes' if dtype in facts.native else 'no'}" for name, dtype in _HALF_TYPES]
        _item(str(device), f"{about}; multiplies natively: {', '.join(native)}")
    if len(devices) == 1:
        _item("cuda", "no GPU that torch can use")


def _facts(device: torch.device, dtype: torch.dtype) -> Facts:
    """A layer of ordinary size on ``device``, for the plan to judge."""
    return Facts(1024, 2048, 2048, 16, dtype, dtype, False, device_facts(device, interpreting()))


def _check_device(device: torch.device) -> int:
    """Print which strategies run on ``device`` and their numeric check; the number of failed checks."""
    _heading(f"Strategies on {device}")
    facts = _facts(device, torch.float32)
    refusal = triton_refusal(facts)
    _item("torch", "runs")
    if refusal:
        _item("triton", f"cannot run: {refusal}")
    else:
        _item("triton", f"runs; not in float64: {triton_refusal(_facts(device, torch.float64))}")
    _item("reference", "runs: the formula in plain PyTorch, the layer that the others are compared with")
    plan = make_plan(facts)
    _item("planned", "; ".join((plan.strategy, *(() if refusal else plan.reasons))))
    print()
    print(textwrap.fill(_LEGEND, _WIDTH, initial_indent="  ", subsequent_indent="  "))
    failures = _check_strategy("torch", device, _CHECK_SHAPE)
    if not refusal:
        failures += _check_strategy("triton", device, _INTERPRETED_SHAPE if facts.device.interpreted else _CHECK_SHAPE)
    return failures


def _check_strategy(strategy: str, device: torch.device, shape: tuple[int, int, int, int]) -> int:
    """Print the table of one strategy; the number of failed checks."""
    M, N, K, R = shape
    print(f"\n  {strategy} on {device}, M {M}, N {N}, K {K}, rank {R}")
    print("  " + f"{'regime':<9} {'p':<3}" + "".join(f"  {name:>6} {'plain':>6}" for name in RESULTS) + "  ok")
    return sum(not _check_regime(strategy, device, shape, *regime) for regime in _REGIMES)


def _check_regime(
    strategy: str,
    device: torch.device,
    shape: tuple[int, int, int, int],
    label: str,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    p: float,
) -> bool:
    """Print one line of the table; whether the accuracy rule holds."""
    start = f"  {label:<9} {p:<3g}"
    try:
        errors = compare(random_case(*shape, dtype, adapter_dtype, p, device), strategy)
    except Exception as error:  # whatever a strategy raises here is what the report is for
        print(textwrap.shorten(f"{start}  FAILED: {type(error).__name__}: {error}", _WIDTH))
        return False
    holds = all(error.holds for error in errors.values())
    print(start + "".join(f"  {_pair(errors[name])}" for name in RESULTS) + ("  ok" if holds else "  NO"))
    return holds


def _pair(error: Error) -> str:
    return f"{_short(error.ours_max):>6} {_short(error.plain_max):>6}"


def _short(value: float) -> str:
    """1.2e-7 for 1.2e-07."""
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")
