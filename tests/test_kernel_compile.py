"""Every kernel in every shipped tile compiles for sm_80, sm_90 and sm_100: no spill, no serialized wgmma, it fits, and
on sm_90 the main loops of expand and grad_x are those of the plain GEMM. The other chips: ``bench/kernel_health.py``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own: TRITON_INTERPRET, set for this one, would make nothing compilable."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "bench"), environment.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def kernel_health(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(str(ROOT / "bench" / "kernel_health.py"), *arguments)


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_shipped_tile_compiles_clean(arch, tmp_path):
    output = tmp_path / "health.json"
    regimes = "bfloat16,mixed bfloat16,float32,tf32"
    result = kernel_health("--arch", arch, "--regime", regimes, "--sizes", "4096x4096", "--output", str(output))
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 with a breach" in result.stdout
    kernels = ("_shrink", "_outer", "_both", "_reduce", "_lowrank", "_gemm") + ("_gemm_descriptor",) * (arch != "80")
    for kernel in kernels:
        assert f" {kernel}_kernel " in result.stdout
    content = json.loads(output.read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]
    assert not any(row["breaches"] or row["spilled_bytes"] or row["serialized"] for row in rows)
    compared = {(row["piece"], row["kernel"]) for row in rows if row["sass_plain_loop"]}
    gemms = {(piece, f"_gemm{form}_kernel") for piece in ("expand", "grad_x") for form in ("", "_descriptor")}
    assert compared == (gemms if arch == "90" else set())


def test_rows_that_load_element_by_element_do_not_spill():
    """N and K that 16 does not divide, in the tiles that are picked for them."""
    result = kernel_health("--arch", "80,90", "--regime", "bfloat16", "--sizes", "4088x4088")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 with a breach" in result.stdout
    assert {line.split()[0] for line in result.stdout.splitlines() if " 4088x4088 " in line} == {"80", "90"}


def test_several_parts_and_halves_of_a_pass_are_compiled_too(monkeypatch):
    """In 16 bit an outer product in parts stores float32; few rows have a bare GEMM; one of ds and db has no pass."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import kernel_health as health

    cases = list(health.cases(["90"], ["float16", "mixed bfloat16"]))

    def found(regime: str, piece: str) -> list:
        return [case.tile for case in cases if (case.regime, case.piece) == (regime, piece)]

    assert {tile.split for tile in found("float16", "grad_a")} == {1, 2}
    assert {tile.split for tile in found("mixed bfloat16", "grad_a")} == {1}  # float32 either way: the same code
    few_rows = [case for case in cases if case.piece == "grad_x" and case.tile.block_m == 16]
    assert {(case.dropout, case.tile.split) for case in few_rows} == {(p, n) for p in (False, True) for n in (1, 2)}
    assert {(tile.both and tile.both.split, tile.db.split) for tile in found("float16", "grad_b")} == {
        (1, 1), (2, 1), (None, 1), (None, 2),
    }  # fmt: skip


def test_breaches_are_found():
    """A tile too large for the registers spills; a mask drawn in the main loop is more than the plain loop has."""
    script = (
        "import kernel_health as health\n"
        "from fused_lora.kernels import tiles\n"
        "tile = tiles.SkinnyTile(128, 128, 64, 4, 3)\n"
        "case = health.Case('80', 'mixed float16', 'shrink', tile, True)\n"
        "print([row.breaches for row in health.examine(case)])\n"
        "asm = []\n"
        "for masked in (True, False):\n"
        "    case = health.Case('90', 'bfloat16', 'shrink', tiles.SkinnyTile(128, 64, 16, 8, 4), masked)\n"
        "    with health.launches_noted() as noted:\n"
        "        health.call(case)\n"
        "    asm.append(health.compiled(*noted[0], health.GPUTarget('cuda', 90, 32))[0].asm)\n"
        "print(health.against(*asm), health.against(*asm[::-1]))\n"
    )
    result = run("-c", script)
    assert result.returncode == 0, result.stderr
    spilled, compared = result.stdout.splitlines()
    assert "B spilled" in spilled
    assert "xor.b32" in compared
    assert "HGMMA" not in compared


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   S2R R9, SR_CTAID.X ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R44], desc[UR8][R18.64], P4 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/             @!UP0 UMOV UR4, 0x400 ;
        /*0050*/              @!P3 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
        /*0080*/               @P1 BRA `(.L_x_0) ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
"""


def test_the_main_loop_is_the_innermost_that_multiplies_and_copies(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import kernel_loops as loops

    assert [sum(loop.values()) for loop in loops.innermost_loops(SASS)] == [4, 2, 1]
    assert set(loops.main_loop(SASS)) == {"LDGSTS.E.BYPASS.128", "HGMMA.64x128x16.F32.BF16", "UMOV", "BRA"}
    assert loops.sass_work(loops.main_loop(SASS)) == {"LDGSTS": 1, "HGMMA": 1}
    ptx = "$L__BB0_1:\n\t@%p1 ld.shared.v4.b32 {%r1, %r2}, [%r3];\n\tsetp.lt.s32 %p1, %r1, %r2;\n"
    ptx += "\tfma.rn.f32 %f1, %f2, %f3, %f1;\n\t@!%p1 bra $L__BB0_1;\n\tret;\n"
    assert loops.ptx_work(loops.main_loop(ptx)) == {"ld.shared.b32": 4, "fma.rn.f32": 1, "bra": 1}
    amd = ".LBB0_2:\n\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]\n\ts_cbranch_scc1 .LBB0_2\n"
    assert loops.count(loops.main_loop(amd), loops.TENSOR) == 1
    # Laid out from its latch: the branch from the middle back to it is no loop of its own.
    turned = "\tbra.uni $L__BB0_4;\n$L__BB0_6:\n\tadd.s32 %r1, %r1, 1;\n\t@%p1 bra $L__BB0_7;\n$L__BB0_4:\n"
    turned += "\t@%p2 bra $L__BB0_6;\n\t@%p3 tcgen05.mma.cta_group::1.kind::f16 [%r2], %rd1;\n\tbra.uni $L__BB0_6;\n"
    assert loops.count(loops.main_loop(turned + "$L__BB0_7:\n\tret;\n"), loops.TENSOR) == 1
    # Laid out from two latches, entered behind both: the short way round, which multiplies nothing, is the same loop.
    latches = (
        "\ts_branch .LBB0_27\n.LBB0_25:\n\tv_mfma_f32_16x16x16_bf16 v[0:3]\n.LBB0_26:\n\ts_cbranch_vccnz .LBB0_40\n"
    )
    latches += ".LBB0_27:\n\ts_cbranch_scc1 .LBB0_26\n\tv_mfma_f32_16x16x16_bf16 v[4:7]\n\ts_branch .LBB0_25\n"
    assert loops.count(loops.main_loop(latches + ".LBB0_40:\n\ts_endpgm\n"), loops.TENSOR) == 2
    assert not loops.main_loop("\tret;\n")


def test_the_report_is_made_of_the_json_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import kernel_health as health

    row = ["90", "bfloat16", 4096, 4088, 16, "expand", "_gemm_kernel", "128x128x64x16 w8 s3", False, 174, 0, 98304]
    row += [232448, False, 123, 4, 8, 0, 135, 139, []]
    other = ["gfx942", "float32", 4096, 4096, 16, "shrink", "_shrink_kernel", "64x32x16 w4 s3", True, 56, 8, 20480]
    other += [65536, False, 90, 0, 2, 0, None, None, ["8 B spilled"]]
    content = {"triton": "3.7.1", "columns": health.COLUMNS, "rows": [row, other]}
    lines = health.sections(content, "x.json")
    assert all("x.json" in line for line in lines if line.startswith("#"))
    assert "| sm_90 | 1 | 174 | 0 | 98304 / 232448 | 0 | 0 | 0 |" in lines
    assert "| gfx942 | 1 | 56 | 8 | 20480 / 65536 | 0 | 1 | 1 |" in lines
    assert "| expand | gemm | bfloat16 | 4096 x 4088 | 128x128x64x16 w8 s3 | no | 135 | 139 | 4 | 8 |" in lines
    what, result = health.summary(content, "x.json")
    assert what == "what every kernel compiles to with triton 3.7.1: sm_90, gfx942"
    assert result == "2 kernels: 8 bytes spilled, 0 with serialized wgmma, 1 with a breach"
