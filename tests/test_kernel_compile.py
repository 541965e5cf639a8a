"""Every kernel in every shipped tile compiles for sm_80, sm_90 and sm_100: no spill, no serialized wgmma, it fits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def kernel_health(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the tool in a process of its own: TRITON_INTERPRET, set for this one, would make nothing compilable."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "kernel_health.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_shipped_tile_compiles_clean(arch):
    result = kernel_health("--arch", arch, "--regime", "bfloat16,mixed bfloat16,float32")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 with a breach" in result.stdout
    kernels = ("_shrink", "_outer", "_both", "_reduce", "_lowrank", "_gemm") + ("_gemm_descriptor",) * (arch != "80")
    for kernel in kernels:
        assert f" {kernel}_kernel " in result.stdout


def test_a_breach_is_found():
    """A tile too large for the registers is reported as spilling."""
    script = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'bench')!r})\n"
        "import kernel_health as health\n"
        "from fused_lora.kernels import tiles\n"
        "tile = tiles.SkinnyTile(128, 128, 64, 4, 3)\n"
        "case = health.Case('80', 'mixed float16', 'shrink', tile, True)\n"
        "print([row.breaches for row in health.examine(case)])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "B spilled" in result.stdout
