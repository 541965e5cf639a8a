"""What ``gpu.py`` measures and in which order: its providers and its cells, the ones that decide something first.

x (M, K)   weight W (N, K)   lora_a A (R, K)   lora_b B (N, R)   y, dy (M, N)
"""

from __future__ import annotations

from collections.abc import Callable

import peers
import torch
from providers import PROVIDERS, Inputs, Ours, Provider
from shapes import MODES, REGIMES, SHAPE_SETS, Case
from torch import nn

from fused_lora.plan import Facts, Plan, device_facts, interpreting, make_plan

# Requests that are checked as layers of their own and, under the same name, timed.
STRATEGIES: dict[str, str | None] = {
    "ours": None,
    "ours-torch": "torch",
    "ours-beta1": "triton:expand=beta1,grad_x=beta1",
    "ours-pointer": "triton:expand=pointer,grad_x=pointer",
    "ours-descriptor": "triton:expand=descriptor,grad_x=descriptor",
}
# One kernel at a time between pieces of vendor GEMMs: where a strategy is red, these say which piece it is.
PIECES = {
    f"{piece} {form}": "triton:"
    + ",".join(f"{p}={form if p == piece else 'torch'}" for p in ("shrink", "expand", "grad_b", "grad_x", "grad_a"))
    for piece, forms in (
        ("shrink", ("triton",)),
        ("grad_b", ("triton",)),
        ("grad_a", ("triton",)),
        ("expand", ("beta1", "pointer", "descriptor")),
        ("grad_x", ("beta1", "pointer", "descriptor")),
    )
    for form in forms
}
CHECK = "the check"  # in their place where the check of a regime was given up
# Timed in every cell; the others only where a claim rests on the cell.
CORE = ("frozen", "ours", "ours-torch", "peft", "addmm", "beta1")
HEADLINE = 2  # penalty up to which every provider is timed
_PENALTY = {
    "set": {"llama-3-8b": 0, "llama-3-70b": 3, "llama-3.2-1b": 4},
    "M": {8192: 0, 512: 1, 2048: 3, 64: 3, 16384: 4},
    "rank": {16: 0, 64: 3, 8: 4, 256: 4},
    "regime": {"bf16": 0, "bf16-fp32": 1, "fp16": 5, "fp16-fp32": 6},
    "mode": {"forward+backward": 0, "forward": 2},
}


def plan_of(case: Case, device: torch.device, request: str | None = None) -> Plan:
    """The plan of a call of this case.

    Raises:
        ValueError: the request cannot be met here.
    """
    asked = device_facts(torch.empty(0, device=device).device, interpreting())
    facts = Facts(case.M, case.N, case.K, case.rank, case.dtype, case.adapter_dtype, case.p > 0.0, asked)
    return make_plan(facts, request)


def _refusal(request: str | None) -> Callable[[Case, torch.device], str]:
    def refusal(case: Case, device: torch.device) -> str:
        try:
            plan_of(case, device, request)
        except ValueError as error:
            return str(error)
        return ""

    return refusal


def _forced(request: str | None) -> Callable[[Inputs, float], nn.Module]:
    return lambda inputs, p: Ours(inputs, p, request)


def _compiled(inputs: Inputs, p: float) -> nn.Module:
    torch._dynamo.reset()  # else the eighth shape runs eagerly, without a word, and the second for any shape
    return torch.compile(PROVIDERS["peft"].build(inputs, p))


def _not_compiled(case: Case, device: torch.device) -> str:
    if device.type != "cuda":
        return "compiled on a GPU only"
    return PROVIDERS["peft"].refusal(case, device)


def _as_peft_comes(inputs: Inputs, p: float) -> nn.Module:
    wide = Inputs(inputs.x, inputs.dy, inputs.weight, inputs.a.float(), inputs.b.float())
    return PROVIDERS["peft"].build(wide, p)


def _comes_so_already(case: Case, device: torch.device) -> str:
    if case.adapter_dtype == torch.float32:
        return "it is the provider 'peft' here"
    return PROVIDERS["peft"].refusal(case, device)


def add_providers() -> None:
    """Put the providers that only ``gpu.py`` times beside those of ``providers.py``, in this process."""
    PROVIDERS.pop("ours-triton", None)  # its forms are told apart here
    for name, request in STRATEGIES.items():
        if name != "ours":
            PROVIDERS[name] = Provider(name, f"fused-lora, {request}", _forced(request), _refusal(request))
    PROVIDERS["peft-default"] = Provider("peft-default", "PEFT, fp32 adapters", _as_peft_comes, _comes_so_already)
    PROVIDERS["torchtune"] = Provider("torchtune", "torchtune", peers.torchtune_layer, peers.torchtune_refusal)
    PROVIDERS["loralib"] = Provider("loralib", "loralib", peers.loralib_layer, peers.loralib_refusal)
    PROVIDERS["peft-compile"] = Provider("peft-compile", "PEFT under torch.compile", _compiled, _not_compiled)


def in_time(name: str, case: Case) -> str:
    """Why a provider is not timed in a cell for want of time; "" where it is."""
    distance = penalty(case)
    if name == "peft-compile" and distance > 0 and not (distance == 1 and case.M == 512 and case.linear == "q,o"):
        return "each shape takes a compilation: timed in the cells of the claim only"
    if distance > HEADLINE and name not in CORE:
        return "timed in the cells of the claim and near them only"
    return ""


def penalty(case: Case) -> int:
    """How far a cell is from the cells of the claim: 0 for a Llama-3-8B layer, 8192 rows, bf16, rank 16."""
    where = {"set": case.shape_set, "M": case.M, "rank": case.rank, "regime": case.regime, "mode": case.mode}
    return sum(_PENALTY[name].get(value, 0) for name, value in where.items())


def cells(quick: bool) -> list[Case]:
    """The whole grid, most important first; the linears of a layer stay together, so that their sum is complete."""
    sets = ("tiny",) if quick else tuple(_PENALTY["set"])
    rows = (16,) if quick else tuple(_PENALTY["M"])
    ranks = (8,) if quick else tuple(_PENALTY["rank"])
    regimes = ("bf16-fp32",) if quick else tuple(_PENALTY["regime"])
    assert set(regimes) <= set(REGIMES)
    grid = [
        Case(name, linear.name, linear.count, M, linear.K, linear.N, mode, regime, p, rank)
        for name in sets
        for regime in regimes
        for mode in reversed(MODES)
        for rank in ranks
        for M in rows
        for p in (0.0, 0.1)
        for linear in SHAPE_SETS[name].linears
    ]
    return sorted(grid, key=penalty)
