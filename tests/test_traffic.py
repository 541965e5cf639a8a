"""bench/traffic.py: the formulas it must find, and that its counts are counts, by the interpreter and by hand."""

from __future__ import annotations

import importlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_lora import plan
from fused_lora.kernels import linear, tiles

BENCH = Path(__file__).parents[1] / "bench"
M, N, K, R = 1024, 768, 512, 16
CHIP = tiles.Chip(16, (9, 0))


@pytest.fixture(autouse=True)
def poison():
    """Not here: filling fresh memory would be counted as traffic."""


@pytest.fixture
def measured(bench):
    traffic = bench("traffic")

    def measure(name: str, regime: str, p: float, shape=(M, N, K), rank: int = R) -> dict:
        cell = traffic.measure_case(traffic.make_case(*shape, rank, regime, p), [name])
        assert not cell["left_out"]
        return cell["layers"][name]

    return measure


# Bytes per element of MN and MK beyond the frozen layer, forward + backward.
FORMULAS = [
    # Ours. The fused GEMMs: dy once (2MN); x for s and for da (4MK). With the vendor's GEMMs y and dx are also
    # written by the low-rank product and read by beta = 1 (4MN + 4MK).
    ("ours", "bf16", 0.0, 6, 8),
    ("ours", "bf16", 0.1, 6, 8),
    ("ours", "bf16-fp32", 0.1, 6, 8),
    ("ours", "fp32", 0.1, 16, 16),  # 4 bytes; and no float32 tile makes ds and db in one pass
    ("ours-fused-descriptor", "bf16", 0.0, 2, 4),
    ("ours-fused-descriptor", "bf16", 0.1, 2, 4),
    ("ours-fused-descriptor", "bf16-fp32", 0.1, 2, 4),
    ("ours-fused-pointer", "bf16", 0.0, 2, 4),
    ("ours-fused-pointer", "bf16", 0.1, 2, 4),
    # Two vendor GEMMs for ds and db read dy twice: 2MN more than the kernel that makes both in one pass.
    ("ours-torch", "bf16", 0.0, 8, 8),
    # The peers. PEFT, forward: the products read x (2MK) and write 2MN, the scale moves 4MN, the sum 6MN; backward:
    # the scale 4MN, ds and db read it (4MN), da reads x (2MK), the low-rank dx is written (2MK) and added (6MK).
    # Dropout moves 5MK each way. float32 adapters: casts, and twice the bytes in between.
    ("plain", "bf16", 0.0, 20, 12),
    ("peft", "bf16", 0.0, 20, 12),
    ("peft", "bf16", 0.1, 20, 22),
    ("peft", "bf16-fp32", 0.0, 56, 30),
    ("peft", "bf16-fp32", 0.1, 56, 48),
    ("addmm", "bf16", 0.0, 8, 10),
    ("beta1", "bf16", 0.0, 8, 8),
]


@pytest.mark.parametrize(
    ("name", "regime", "p", "mn", "mk"), FORMULAS, ids=[f"{name}-{r}-p{p:g}" for name, r, p, _, _ in FORMULAS]
)
def test_formula(measured, name, regime, p, mn, mk):
    if name == "peft":
        pytest.importorskip("peft")
    found = measured(name, regime, p)
    assert found["formula"] == {"MN": mn, "MK": mk, "NK": 0}
    # Nothing is lost between the formula and the list of the rest.
    assert found["extra"] == mn * M * N + mk * M * K + sum(term["bytes"] for term in found["rest_terms"])
    assert found["extra"] == found["extra_read"] + found["extra_written"] == sum(found["extra_by_pass"].values())


def test_a_rank_at_which_ds_and_db_are_made_apart_reads_dy_twice(measured):
    assert measured("ours-fused-descriptor", "bf16", 0.0, rank=32)["formula"] == {"MN": 2, "MK": 4, "NK": 0}
    assert measured("ours-fused-descriptor", "bf16", 0.0, rank=64)["formula"] == {"MN": 4, "MK": 4, "NK": 0}


@pytest.mark.parametrize("name", ["torchtune", "loralib"])
def test_formula_of_a_peer_that_may_be_missing(measured, name):
    pytest.importorskip(name)
    assert measured(name, "bf16", 0.0)["formula"] == {"MN": 20, "MK": 12, "NK": 0}


def test_nothing_large_is_kept_or_made_on_the_way(measured):
    for name in ("ours", "ours-fused-descriptor"):
        plain, dropped = measured(name, "bf16", 0.0), measured(name, "bf16", 0.1)
        assert plain["kept"] == M * R * 4
        assert dropped["kept"] == M * R * 4 + 8
        # Workspaces and rank-wide tensors; the largest is ds, one share per block of 256 columns of dy.
        assert dropped["temporary"] < M * N
    if importlib.util.find_spec("peft"):
        assert measured("peft", "bf16", 0.1)["kept"] > 3 * M * K


def test_launches(measured):
    """s, y and its reduction; ds with db, their reduction, dx, da and its reduction: nothing hides in between."""
    assert measured("ours-fused-descriptor", "bf16", 0.0)["launches"] == {"forward": 3, "backward": 5}
    assert measured("ours", "bf16", 0.0)["launches"] == {"forward": 4, "backward": 6}
    assert measured("ours-torch", "bf16", 0.0)["launches"] == {"forward": 3, "backward": 5}
    assert measured("ours-torch", "fp32", 0.0)["launches"] == {"forward": 3, "backward": 5}


def test_the_plan_is_the_machines_again_afterwards(measured):
    facts = (8, 8, 8, 4, torch.float32, torch.float32, False, torch.device("cpu"), None)
    before = plan.plan_for(*facts)
    measured("ours", "bf16", 0.0)
    assert plan.plan_for(*facts) == before
    assert torch.nn.functional.dropout.__module__ == "torch.nn.functional"


def test_quick_run_and_its_tables(tmp_path, bench, capsys):
    out = tmp_path / "traffic.json"
    traffic = bench("traffic")
    traffic.main(["--quick", "--p=0.1", f"--output={out}"])
    content = json.loads(out.read_text())
    assert content["kind"] == traffic.KIND
    text = "\n".join(traffic.sections(content, "traffic.json"))
    assert "### Traffic: M 512, N 384, K 256, rank 16, bf16, p 0.1, from traffic.json" in text
    [row] = [line for line in text.splitlines() if line.startswith("| fused-lora, fused GEMMs (TMA) | 3 + 5 |")]
    assert "| 2MN + 4MK |" in row
    assert "_both_kernel" in capsys.readouterr().out


def test_a_form_that_a_case_cannot_have_is_left_out_with_the_reason(bench):
    traffic = bench("traffic")
    cell = traffic.measure_case(traffic.make_case(M, N, K, R, "fp32", 0.0), ["ours-fused-descriptor"])
    assert "it is for 16-bit dtypes" in cell["left_out"]["ours-fused-descriptor"]


# ---- the operators' side of the meter


def _moved(bench, act) -> list[tuple[str, str, int]]:
    meter = bench("meter").Meter()
    with meter:
        act()
    return [(access.op, access.kind, access.distinct) for access in meter.counts["forward"].moved]


def test_an_operator_reads_its_inputs_and_writes_its_output(bench):
    x, y = (torch.empty(8, 4, device="meta") for _ in range(2))
    assert _moved(bench, lambda: x + y) == [("add", "read", 128), ("add", "read", 128), ("add", "write", 128)]
    assert _moved(bench, lambda: x + x) == [("add", "read", 128), ("add", "write", 128)]
    assert _moved(bench, lambda: x.mul_(2)) == [("mul_", "read", 128), ("mul_", "write", 128)]
    assert _moved(bench, lambda: x[:2].copy_(y[:2])) == [("copy_", "read", 32), ("copy_", "write", 32)]
    assert _moved(bench, lambda: torch.mul(x, 2, out=y)) == [("mul", "read", 128), ("mul", "write", 128)]
    assert _moved(bench, lambda: x.new_zeros(2)) == [("new_zeros", "write", 8)]


def test_views_allocations_and_copies_onto_itself_move_nothing(bench):
    x = torch.empty(8, 4, device="meta")
    assert _moved(bench, lambda: (x.t(), x.view(-1), x[1:], x.detach(), torch.empty_like(x), x[2:].copy_(x[2:]))) == []
    assert _moved(bench, lambda: torch.empty(0, 4, device="meta") + 1) == []


def test_a_repeated_row_is_read_once_and_beta_zero_reads_nothing(bench):
    row, a, b = (torch.empty(*shape, device="meta") for shape in ((1, 4), (8, 2), (2, 4)))
    assert _moved(bench, lambda: row.expand(8, 4) + 1) == [("add", "read", 16), ("add", "write", 128)]
    product = [("addmm", "read", 64), ("addmm", "read", 32), ("addmm", "write", 128)]
    assert _moved(bench, lambda: torch.addmm(row, a, b, beta=0)) == product
    assert _moved(bench, lambda: torch.addmm(row, a, b)) == [("addmm", "read", 16), *product]


# ---- the kernels' side: the stated factors against the addresses that the interpreter touches

_bf16, _f32 = torch.bfloat16, torch.float32


def _tensor(*shape: int, dtype: torch.dtype = _bf16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def _skinny(kernel: str, drop: linear.Drop | None, rank: int = 20) -> None:
    """Ragged in every direction, two chunks of ranks, the contraction split."""
    x, a, u = _tensor(37, 70), _tensor(rank, 70), _tensor(37, rank, dtype=_f32)
    tile = tiles.SkinnyTile(16, 32, 16, 4, 1, split=2)
    if kernel == "shrink":
        linear.shrink(x, a, drop, tile)
    elif kernel == "grad_a":
        linear.grad_a(x, u, drop, tile, _bf16)
    else:
        scale = torch.tensor(0.5)
        linear.grad_b(x, a.t(), u, scale, tiles.GradBTile(tile if kernel == "both" else None, tile, tile))


def _gemm(kernel: str, drop: linear.Drop | None) -> None:
    x, w, a, s = _tensor(37, 48), _tensor(48, 72), _tensor(20, 72), _tensor(37, 20, dtype=_f32)
    bias, lora_bias = _tensor(72), _tensor(72)
    tile = tiles.GemmTile(16, 32, 16, 16, 4, 1)
    if kernel == "expand":
        linear.expand(x, w.t().contiguous(), bias, s, a.t().contiguous(), lora_bias, torch.tensor(0.5), tile)
    elif kernel == "grad_x":
        linear.grad_x(x, w, s, a, drop, tile)
    elif kernel == "grad_x split":
        linear.grad_x(x, w, s, a, drop, replace(tile, split=3))
    elif kernel == "descriptor":
        linear.grad_x(x, w, s, a, drop, replace(tile, form="descriptor", programs=4))
    elif kernel == "lowrank_y":
        linear.lowrank_y(s, a.t(), bias, lora_bias, torch.tensor(0.5), _bf16, tiles.LowrankTile(16, 32, 16, 4))
    else:
        linear.lowrank_x(s, a, drop, _bf16, tiles.LowrankTile(16, 32, 16, 4))


KERNELS = {
    **dict.fromkeys(("shrink", "grad_a", "both", "halves"), _skinny),
    **dict.fromkeys(("expand", "grad_x", "grad_x split", "descriptor", "lowrank_y", "lowrank_x"), _gemm),
}


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_factors_are_what_the_interpreter_counts(bench, kernel, dropout):
    launches = bench("launches")
    counted, stated = [], []

    def note(name, arguments, programs):
        stated.append((name, launches.accesses(name, arguments, programs)))

    drop = linear.Drop(torch.tensor([7]), 0, 2.0) if dropout else None
    with launches.interpreted(counted), launches.launches(note, run=True):
        KERNELS[kernel](kernel, drop)
    assert [name for name, _ in counted] == [name for name, _ in stated]
    for (name, found), (_, claimed) in zip(counted, stated, strict=True):
        assert sorted(map(str, found)) == sorted(map(str, claimed)), name
