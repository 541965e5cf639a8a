"""The table of measurements and the plan that follows it: nearest size, unknown chips, entries that cannot run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_lora import plan, tuned
from fused_lora.kernels import tiles
from fused_lora.kernels.tiles import GemmTile, GradBTile, LowrankTile, Problem, SkinnyTile
from fused_lora.plan import DeviceFacts, Facts, make_plan
from fused_lora.tuned import Entry, Tuned

ROOT = Path(__file__).resolve().parents[1]
CHIP = tiles.Chip(132, (9, 0))
FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
DESCRIPTOR = GemmTile(128, 128, 64, 16, 8, 3, form="descriptor", programs=132)
SKINNY = SkinnyTile(64, 64, 16, 4, 3, split=3)


def entry(piece="expand", form="descriptor", tile=DESCRIPTOR, gain=1.25, **replaced) -> Entry:
    sizes = {"M": 8192, "N": 4096, "K": 4096, "R": 16, "dropout": False, "regime": "bfloat16"} | replaced
    return Entry(piece=piece, form=form, tile=tile, seconds=1.0, rule_seconds=gain, **sizes)


def table(*entries: Entry, kin=False) -> Tuned:
    return Tuned("NVIDIA H200", "a day, a driver", entries, kin)


def facts(known: Tuned | None, dtype=torch.bfloat16, adapter_dtype=None, capability=(9, 0), **sizes) -> Facts:
    device = DeviceFacts("cuda", "a GPU", capability, 132, FLOATS, "", False, tuned=known)
    shape = {"M": 8192, "N": 4096, "K": 4096, "R": 16} | sizes
    dropout = shape.pop("dropout", False)
    return Facts(**shape, dtype=dtype, adapter_dtype=adapter_dtype or dtype, dropout=dropout, device=device)


def problem(**sizes) -> Problem:
    shape = {"M": 8192, "N": 4096, "K": 4096, "R": 16, "dropout": False} | sizes
    return Problem(**shape, dtype="bfloat16", adapter_dtype="bfloat16")


def test_the_plan_follows_a_measurement_and_says_which():
    planned = make_plan(facts(table(entry(), entry("shrink", "torch", None), entry("grad_a", "triton", SKINNY))))
    assert (planned.expand, planned.grad_x, planned.shrink, planned.grad_a) == (
        "descriptor",
        "beta1",
        "torch",
        "triton",
    )
    assert planned.tile("expand") == DESCRIPTOR
    assert planned.tile("grad_a") == SKINNY
    assert any(
        "expand: descriptor was measured 1.25 x as fast as the rule on NVIDIA H200 at M 8192, N 4096, K 4096, rank 16 "
        "(a day, a driver)" in reason
        for reason in planned.reasons
    )
    assert not any(reason.startswith("expand: the vendor GEMM") for reason in planned.reasons)
    assert any(reason.startswith("grad_x: the vendor GEMM") for reason in planned.reasons)


def test_without_a_near_entry_the_rule_decides():
    rule = make_plan(facts(None))
    for empty in (table(), table(entry(N=16384)), table(entry(regime="float16")), table(entry(R=64))):
        planned = make_plan(facts(empty))
        assert replace(planned, facts=rule.facts) == rule


def test_a_measured_strategy_is_followed_unless_another_is_asked_for():
    known = table(entry("strategy", "torch", None, M=512))
    planned = make_plan(facts(known, M=512))
    assert planned.strategy == "torch"
    assert planned.reasons[0].startswith("torch as a whole: 1.25 x as fast as the rule on NVIDIA H200 at M 512")
    assert make_plan(facts(known, M=512), "triton").strategy == "triton"
    assert make_plan(facts(known, M=8192)).strategy == "triton"
    assert make_plan(facts(table(entry("strategy", "triton", None)))).strategy == "triton"


def test_a_forced_form_beats_the_table_and_takes_its_tile_only_in_that_form():
    known = table(entry())
    assert make_plan(facts(known), "triton:expand=descriptor").tile("expand") == DESCRIPTOR
    pointer = make_plan(facts(known), "triton:expand=pointer")
    assert (pointer.expand, pointer.tile("expand")) == ("pointer", tiles.pick_expand(problem(), CHIP))


@pytest.mark.parametrize(
    ("wrong", "given", "reason"),
    [
        (entry(), {"N": 4095}, "N = 4095 and K = 4096 must be positive multiples of 8"),
        (entry(), {"capability": (8, 0)}, "a GPU has no TMA"),
        (entry(regime="float32"), {"dtype": torch.float32}, "it is for 16-bit dtypes"),
        (
            entry(regime="mixed float16"),
            {"dtype": torch.float16, "adapter_dtype": torch.float32, "R": 3},
            "with float32 adapters over float16 and fewer than 4 ranks it errs more",
        ),
        (entry(form="triton", tile=SKINNY), {}, "expand has no such form"),
        (entry(tile=LowrankTile(64, 128, 16, 4)), {}, "is no tile of the form descriptor"),
        (entry(form="pointer", tile=DESCRIPTOR), {}, "its tile is of the form descriptor"),
        (entry(tile=replace(DESCRIPTOR, num_stages=9)), {}, "bytes of shared memory, the chip has 232448"),
        (entry("shrink", "triton", replace(SKINNY, num_stages=40)), {}, "bytes of shared memory"),
        (entry("grad_b", "triton", SKINNY), {}, "is no tile of grad_b"),
        (entry("shrink", "triton", SKINNY), {"K": 4088}, "16-bit rows that 16 does not divide load one by one"),
    ],
    ids=lambda value: f"{value.piece}-{value.form}" if isinstance(value, Entry) else None,
)
def test_an_entry_that_cannot_run_is_ignored_with_the_reason(wrong, given, reason):
    planned = make_plan(facts(table(wrong), **given))
    rule = make_plan(facts(None, **given))
    assert [getattr(planned, piece) for piece in plan.PIECES] == [getattr(rule, piece) for piece in plan.PIECES]
    assert planned.tiles == rule.tiles
    ignored = [
        r for r in planned.reasons if r.startswith(f"{wrong.piece}: the measured form {wrong.form!r} is ignored")
    ]
    assert len(ignored) == 1
    assert reason in ignored[0]


def test_the_nearest_entry_is_found():
    known = table(*(entry(M=M, N=N, gain=1.0 + M / 2**20 + N / 2**20) for M in (64, 512, 8192) for N in (1024, 4096)))

    def found(**sizes):
        nearest = known.find("expand", problem(**sizes))
        return nearest and (nearest.M, nearest.N)

    assert found() == (8192, 4096)
    assert found(M=150) == (64, 4096)
    assert found(M=190) == (512, 4096)
    assert found(M=4096, N=1500) == (8192, 1024)
    assert found(M=10**6) == (8192, 4096)  # beyond the largest nothing changes
    assert found(M=15) is None
    assert found(N=8193) is None
    assert found(K=2000) is None
    assert found(M=0) is None
    assert found(N=0) is None


def test_a_piece_is_looked_up_by_what_its_time_depends_on():
    known = table(entry("shrink", "torch", None, dropout=True), entry("grad_b", "torch", None, dropout=True))
    assert known.find("shrink", problem(N=64)) is None  # its mask makes it another piece
    assert known.find("shrink", problem(N=64, dropout=True)) is not None
    assert known.find("grad_b", problem(K=64)) is not None  # it draws no mask and never sees K
    assert known.find("grad_b", problem(N=64)) is None


def test_another_chip_of_the_capability_lends_only_clear_wins():
    clear, close = entry(gain=1.11), entry("grad_x", gain=1.09)
    own = make_plan(facts(table(clear, close)))
    kin = make_plan(facts(table(clear, close, kin=True)))
    assert (own.expand, own.grad_x) == ("descriptor", "descriptor")
    assert (kin.expand, kin.grad_x) == ("descriptor", "beta1")


@pytest.mark.parametrize("rows", [64, 1000, 8192, 100000])
def test_a_split_is_fitted_to_the_size(rows):
    measured = entry("grad_b", "triton", GradBTile(SKINNY, SKINNY, SKINNY))
    fitted = tuned.fit(measured, problem(M=rows), CHIP)
    if rows == measured.M:
        assert fitted == measured.tile
    assert fitted.ds.split <= tiles.cdiv(4096, SKINNY.block_c)
    assert fitted.db.split <= max(tiles.cdiv(rows, SKINNY.block_m), 1)
    # shrink's blocks are rows: fewer of them leave room for more parts of the contraction
    assert (fitted.ds.split > 3) == (rows < 8192 // 1.2)
    assert tiles.one_part(fitted) == tiles.one_part(measured.tile)


def test_the_file_round_trips_and_names_its_chips(tmp_path):
    entries = (
        entry(),
        entry("grad_b", "triton", GradBTile(None, SKINNY, SKINNY)),
        entry("expand", "beta1", LowrankTile(64, 128, 16, 4), M=512),
        entry("shrink", "torch", None),
    )
    chip = {"name": "NVIDIA H200", "capability": [9, 0], "source": "s", "entries": [e.as_dict() for e in entries]}
    other = chip | {"name": "NVIDIA A100", "capability": [8, 0], "entries": []}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"version": tuned.VERSION, "chips": [other, chip]}))
    own = tuned.table_for("NVIDIA H200", (9, 0), path)
    assert (own.entries, own.kin, own.source) == (entries, False, "s")
    kin = tuned.table_for("NVIDIA H100", (9, 0), path)
    assert (kin.entries, kin.kin, kin.chip) == (entries, True, "NVIDIA H200")
    assert tuned.table_for("NVIDIA B200", (10, 0), path) is None
    path.write_text(json.dumps({"version": 0, "chips": []}))
    with pytest.raises(ValueError, match="has version 0, this fused-lora reads 1: measure again"):
        tuned.read(path)


def test_the_table_is_read_when_a_gpu_is_asked_and_never_at_import():
    code = (
        "import pathlib\n"
        "read = pathlib.Path.read_text\n"
        "def refuse(self, *args, **kwargs):\n"
        "    assert self.name != 'tuned.json', 'read'\n"
        "    return read(self, *args, **kwargs)\n"
        "pathlib.Path.read_text = refuse\n"
        "import torch, fused_lora\n"
        "fused_lora.lora_linear(*(torch.ones(2, 2) for _ in range(4)))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert plan.device_facts(torch.device("cpu"), False).tuned is None


def committed() -> list[tuple[str, Tuned]]:
    return [(".".join(map(str, chip["capability"])), tuned.from_dict(chip)) for chip in tuned.read()]


def compiled_breaches(cases: list[tuple[str, str, str, object, bool]]) -> str:
    """What ``bench/kernel_health.py`` finds wrong with (arch, regime, piece, tile, dropout)."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r})\n"
        "import kernel_health as health\n"
        "from fused_lora.kernels.tiles import *\n"
        f"for case in {cases!r}:\n"
        "    for row in health.examine(health.Case(*case)):\n"
        "        print(*row.breaches, end='')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def cases_of(capability: str, entries) -> list[tuple[str, str, str, object, bool]]:
    lowrank = {"expand": "lowrank_y", "grad_x": "lowrank_x"}
    cases = {}
    for e in entries:
        if e.tile is not None:
            piece = lowrank[e.piece] if e.form == "beta1" else e.piece
            masked = e.dropout and piece in ("shrink", "grad_a", "grad_x", "lowrank_x")
            cases[capability.replace(".", ""), e.regime, piece, tiles.in_code(e.tile), masked] = None
    return list(cases)


def test_every_committed_tile_is_legal_and_compiles_clean():
    for capability, known in committed():
        chip = tiles.Chip(132, tuple(map(int, capability.split("."))))
        for e in known.entries:
            sizes = Problem(e.M, e.N, e.K, e.R, *tiles.REGIMES[e.regime], e.dropout)
            assert e.tile is None or not tuned.tile_refusal(e.piece, e.form, e.tile, sizes, chip), e
        assert compiled_breaches(cases_of(capability, known.entries)) == ""


def test_a_committed_tile_that_spills_would_be_found():
    spills = SkinnyTile(128, 128, 64, 4, 3)
    cases = cases_of("8.0", [entry("shrink", "triton", spills, regime="mixed float16", dropout=True)])
    assert "B spilled" in compiled_breaches(cases)
