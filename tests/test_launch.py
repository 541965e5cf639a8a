"""What a launch meets on a GPU and an interpreted run would not show by itself: settings, views, devices, waiting.

x (M, K)   weight (N, K)   lora_a (R, K)   lora_b (N, R)   dy (M, N)
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import Case, make_inputs, run
from torch.utils._python_dispatch import TorchDispatchMode

import fused_lora.kernels
from fused_lora import lora_linear, pieces
from fused_lora.dropout import as_seed
from fused_lora.kernels import tiles
from fused_lora.plan import PIECES, DeviceFacts, Facts, make_plan

KERNELS = Path(next(iter(fused_lora.kernels.__path__)))
STRATEGIES = ["torch", "triton", "triton:expand=beta1,grad_x=beta1"]


@pytest.mark.parametrize(
    "setting",
    [
        "torch.backends.cuda.matmul.allow_tf32 = {}",
        "torch.set_float32_matmul_precision('high' if {} else 'highest')",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32' if {} else 'ieee'",
        "torch.backends.fp32_precision = 'tf32' if {} else 'ieee'",
    ],
)
def test_the_kernels_follow_torchs_setting_of_tf32_however_it_is_made(setting):
    """In a process each: torch refuses to read what was set through its other interface."""
    script = "import torch\nfrom fused_lora import pieces\nassert not pieces._allow_tf32()\n"
    script += "".join(f"{setting.format(on)}\nassert pieces._allow_tf32() == {on}\n" for on in (True, False))
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias", "lora_bias", "dy"])
def test_a_negative_view_is_what_it_stands_for(name, strategy):
    """Its memory holds the other sign, as that of ``z.conj().imag`` does, and memory is all that a kernel sees."""
    case = Case((5,), N=8, K=16, R=3, regime="bfloat16", p=0.5, biases="both")
    inputs = make_inputs(case)
    expected = run(lora_linear, case, inputs, 7, strategy)
    negative = torch._neg_view(inputs[name].neg())
    assert negative.is_neg()
    for key, result in run(lora_linear, case, inputs | {name: negative}, 7, strategy).items():
        assert torch.equal(result, expected[key]), key


def test_a_weight_that_tma_can_address_is_not_copied():
    """Stored by rows or, as the Conv1D of transformers has it, by columns; x only by rows."""
    w = torch.randn(16, 24).bfloat16()
    for stored in (w, torch.randn(24, 16).bfloat16().t()):
        assert pieces._addressable_weight(stored).data_ptr() == stored.data_ptr()
        assert torch.equal(pieces._addressable_weight(stored), stored)
    for copied in (w[:, 1:17], w[:, ::2]):
        assert pieces._addressable_weight(copied).data_ptr() != copied.data_ptr()
        assert torch.equal(pieces._addressable_weight(copied), copied)
    x = torch.randn(24, 16).bfloat16().t()
    assert pieces._addressable(x).is_contiguous()


class Operations(TorchDispatchMode):
    """The names of all operations, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_an_int_seed_is_not_copied_from_the_host():
    with Operations() as operations:
        assert as_seed(-(2**63), torch.device("cpu")).item() == -(2**63)
        assert as_seed(2**63 - 1, torch.device("cpu")).item() == 2**63 - 1
    assert {name for name in operations.names if name != "_local_scalar_dense"} == {"full"}


@pytest.mark.parametrize("strategy", ["triton", "triton:expand=beta1,grad_x=beta1"])
def test_nothing_is_read_back_from_the_device(strategy):
    """Reading a value back waits for the GPU, and fails while a CUDA graph is captured."""
    case = Case((5,), N=8, K=16, R=3, regime="bfloat16+float32", p=0.5, biases="both")
    inputs = make_inputs(case)
    torch.manual_seed(0)
    with Operations() as operations:
        run(lora_linear, case, inputs, torch.tensor(7), strategy)
    assert "_local_scalar_dense" not in operations.names


def launches(tree: ast.Module):
    """(line, whether it stands under ``with torch.cuda.device_of``) of every ``some_kernel[grid](...)`` and _reduce."""

    def walk(node, guarded):
        if isinstance(node, ast.With):
            guarded = guarded or any(ast.unparse(i.context_expr).startswith("torch.cuda.device_of") for i in node.items)
        if isinstance(node, ast.Call):
            function = node.func.value if isinstance(node.func, ast.Subscript) else node.func
            name = getattr(function, "id", "")
            if (isinstance(node.func, ast.Subscript) and name.endswith("_kernel")) or name == "_reduce":
                yield name, node.lineno, guarded
        for child in ast.iter_child_nodes(node):
            yield from walk(child, guarded)

    return walk(tree, False)


@pytest.mark.parametrize("module", ["gemm", "skinny"])
def test_every_launch_is_on_the_device_of_its_tensors(module):
    """Triton launches on the current device: without the guard a layer on a second GPU would read foreign memory."""
    found = list(launches(ast.parse((KERNELS / f"{module}.py").read_text())))
    assert len(found) >= 3
    assert all(guarded for name, _, guarded in found if name != "_reduce_kernel"), found


def test_no_kernel_has_an_atomic():
    """Their order of arrival would show in the bits, and no interpreted run could tell."""
    for path in KERNELS.glob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not [name for name in names if name.startswith("atomic")], path.name


CHIPS = {
    "sm_80": ((8, 0), 108), "sm_89": ((8, 9), 128), "sm_90": ((9, 0), 132), "sm_100": ((10, 0), 148),
    "sm_120": ((12, 0), 170),
}  # fmt: skip


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dropout", [False, True])
def test_what_a_plan_picks_was_compiled(chip, dropout):
    """The plan hands everything on that the choice of a tile depends on, dropout included."""
    capability, num_sms = CHIPS[chip]
    floats = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
    device = DeviceFacts("cuda", chip, capability, num_sms, floats, "", interpreted=False)
    forms = ["beta1", "pointer"] + ["descriptor"] * (capability >= (9, 0))
    for regime, (dtype, adapter) in tiles.REGIMES.items():
        shipped = set(tiles.shipped(tiles.Chip(num_sms, capability), regime))
        for M in (16, 8192):
            for form in forms if dtype != "float32" else forms[:2]:
                facts = Facts(M, 4096, 4096, 16, getattr(torch, dtype), getattr(torch, adapter), dropout, device)
                plan = make_plan(facts, f"triton:expand={form},grad_x={form}")
                for piece in PIECES:
                    key = {"expand": "lowrank_y", "grad_x": "lowrank_x"}.get(piece, piece) if form == "beta1" else piece
                    masked = dropout and piece not in ("grad_b", "expand")
                    assert (key, tiles.one_part(plan.tile(piece)), masked) in shipped, (piece, form, regime)
