"""The kernels on a real GPU. Where there is none every test here is skipped; nothing else of the suite needs one.

    TRITON_INTERPRET=0 pytest tests/test_gpu.py -n 4     on a machine with a GPU

The rest of the suite interprets the kernels, and one process can only do one of the two: in the whole suite these tests
run in a process of their own.

x (M, K)   weight (N, K)   lora_a (R, K)   lora_b (N, R)   y, dy (M, N)   s = drop(x) Aᵀ (M, R)
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_lora import LoRALinear, lora_linear
from fused_lora.accuracy import FACTOR, compare, random_case
from fused_lora.dropout import BlockMask, as_seed, keep_mask, keep_scale, threshold
from fused_lora.plan import plan_for

DEVICE = torch.device("cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
REGIMES = {
    "bf16": (BF16, BF16), "fp16": (FP16, FP16), "fp32": (FP32, FP32), "bf16+fp32": (BF16, FP32),
    "fp16+fp32": (FP16, FP32),
}  # fmt: skip
SKINNY = ("shrink", "grad_b", "grad_a")
# Each strategy whole, then each kernel by itself between pieces of vendor GEMMs.
REQUESTS = [None, "torch", "triton", *(f"triton:expand={f},grad_x={f}" for f in ("torch", "pointer", "descriptor"))]
REQUESTS += [
    "triton:" + ",".join(f"{p}={form if p == piece else 'torch'}" for p in (*SKINNY, "expand", "grad_x"))
    for piece, forms in (
        *((piece, ("triton",)) for piece in SKINNY),
        *((piece, ("beta1", "pointer", "descriptor")) for piece in ("expand", "grad_x")),
    )
    for form in forms
]
# (M, N, K, R, p): nothing divides; few rows; a rank above every tile; a layer of a real model.
SHAPES = [
    (211, 333, 517, 17, 0.1), (3, 264, 1032, 1, 0.0), (129, 136, 264, 130, 0.5), (1000, 1024, 4096, 64, 0.1),
    (64, 2048, 512, 8, 0.1), (2048, 4096, 2048, 16, 0.0),
]  # fmt: skip

on_gpu = pytest.mark.skipif(
    not CUDA or INTERPRETED,
    reason="no CUDA device" if not CUDA else "triton interprets its kernels here: TRITON_INTERPRET=0 pytest this file",
)
forms = pytest.mark.parametrize("request_", ["torch", "triton", REQUESTS[4], REQUESTS[5]])


@pytest.mark.skipif(not (CUDA and INTERPRETED), reason="no CUDA device, or the tests below run in this process")
def test_on_the_gpu_in_a_process_that_interprets_nothing():
    command = [sys.executable, "-c", "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([*command, __file__, "-q"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def descriptors_take(N: int, K: int, dtype: torch.dtype) -> bool:
    return torch.cuda.get_device_capability() >= (9, 0) and N % 8 == K % 8 == 0 and dtype.itemsize == 2


@on_gpu
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("request_", REQUESTS)
def test_against_float64(request_, regime):
    """y, dx, da and db: at most twice the plain layer's error, in the max and in the RMS norm."""
    dtype, adapters = REGIMES[regime]
    ran, complaints = 0, []
    for M, N, K, R, p in SHAPES:
        if request_ and "descriptor" in request_ and not descriptors_take(N, K, dtype):
            continue
        ran += 1
        errors = compare(random_case(M, N, K, R, dtype, adapters, p, DEVICE), request_)
        complaints += [f"{name} at {(M, N, K, R, p)}: {e}" for name, e in errors.items() if not e.holds]
    if not ran:
        pytest.skip("no descriptors for this dtype or on this chip")
    assert not complaints, "\n".join(complaints)


def tensors(M=513, N=384, K=640, R=16, dtype=BF16, adapters=FP32, p=0.1):
    """A case on the GPU, its leaves with requires_grad."""
    case = random_case(M, N, K, R, dtype, adapters, p, DEVICE)
    for leaf in (case.x, case.lora_a, case.lora_b):
        leaf.requires_grad_()
    return case


def run(case, request_=None, seed=5, x=None):
    """y, dx, da, db."""
    x = case.x if x is None else x
    y = lora_linear(
        x, case.weight, case.lora_a, case.lora_b, case.scale, case.bias,
        dropout_p=case.dropout_p, seed=seed, strategy=request_,
    )  # fmt: skip
    return y.detach(), *torch.autograd.grad(y, (x, case.lora_a, case.lora_b), case.dy)


def assert_same_bits(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@on_gpu
@forms
@pytest.mark.parametrize("regime", REGIMES)
def test_the_same_bits_every_run(request_, regime):
    dtype, adapters = REGIMES[regime]
    if "descriptor" in request_ and not descriptors_take(384, 640, dtype):
        pytest.skip("no descriptors for this dtype or on this chip")
    case = tensors(dtype=dtype, adapters=adapters)
    first = run(case, request_)
    for _ in range(5):
        torch.empty(1 << 24, device=DEVICE).normal_()  # other memory, other timing
        assert_same_bits(first, run(case, request_))


@on_gpu
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("piece", ["shrink", "grad_x", "grad_a"])
def test_the_mask_is_torchs_bit_for_bit(piece, p):
    """Operands that let the mask through as it is: ones, and the identity."""
    from fused_lora.kernels import linear

    size, seed = 300, torch.tensor(-(2**62) + 12345, dtype=torch.int64, device=DEVICE)
    drop = linear.Drop(seed, threshold(p), keep_scale(p))
    plan = plan_for(size, 48, size, size, FP32, FP32, True, DEVICE, "triton:grad_x=pointer")
    ones, eye = torch.ones(size, size, device=DEVICE), torch.eye(size, device=DEVICE)
    if piece == "shrink":  # s = drop(x) Iᵀ
        got = linear.shrink(ones, eye, drop, plan.tile("shrink"))
    elif piece == "grad_a":  # da = Iᵀ drop(x)
        got = linear.grad_a(ones, eye, drop, plan.tile("grad_a"), FP32)
    else:  # dx = dy W + drop'(1 · 1)
        dy, w = torch.zeros(size, 48, device=DEVICE), torch.zeros(48, size, device=DEVICE)
        got = linear.grad_x(dy, w, ones[:, :1].contiguous(), ones[:1], drop, plan.tile("grad_x"))
    mask = keep_mask(seed, size, size, p)
    assert torch.equal(mask.cpu(), keep_mask(int(seed), size, size, p))
    assert torch.equal(got != 0, mask)
    assert got[mask].unique().numel() == 1


@on_gpu
@forms
def test_a_graph_replays_the_layer_on_new_inputs(request_):
    if "descriptor" in request_ and not descriptors_take(384, 640, BF16):
        pytest.skip("no descriptors on this chip")
    case, seed = tensors(), torch.tensor(3, dtype=torch.int64, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(case, request_, seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, request_, seed)
    for number in range(3):
        with torch.no_grad():
            case.x.normal_()
            case.dy.normal_()
        seed.fill_(number)
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert_same_bits(replayed, run(case, request_, seed))


@on_gpu
def test_each_replay_of_a_graph_draws_its_own_mask():
    case = tensors()
    run(case, seed=None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(case, seed=None)[0]
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


@on_gpu
def test_a_call_never_waits_for_the_gpu():
    case = tensors()
    run(case, seed=None)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, seed=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_on_another_stream_behind_other_work():
    case = tensors()
    expected = run(case)
    busy = torch.randn(4096, 4096, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x = torch.zeros_like(case.x)
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        x.copy_(case.x.detach())  # late: a kernel on any other stream would read zeros
        got = run(case, x=x.requires_grad_())
    stream.synchronize()
    assert_same_bits(expected, got)


@on_gpu
@pytest.mark.parametrize("wide", ["y", "x"])
@pytest.mark.parametrize("request_", ["triton", REQUESTS[4], REQUESTS[5]])
def test_more_than_two_to_the_31_elements(request_, wide):
    """The last rows of y and dx lie beyond 32-bit offsets; their mask does too."""
    M, N, K, R, p, seed = 1_050_000, *((2112, 64) if wide == "y" else (64, 2112)), 8, 0.1, 11
    if torch.cuda.get_device_properties(DEVICE).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    if "descriptor" in request_ and not descriptors_take(N, K, BF16):
        pytest.skip("no descriptors on this chip")
    assert M * max(N, K) > 2**31
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape, fan_in=1):
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=BF16).div_(fan_in**0.5)

    x, w, a, b = normal(M, K).requires_grad_(), normal(N, K, fan_in=K), normal(R, K, fan_in=K), normal(N, R, fan_in=R)
    dy = normal(M, N)
    y = lora_linear(x, w, a, b, 2.0, dropout_p=p, seed=seed, strategy=request_)
    (dx,) = torch.autograd.grad(y, x, dy)
    last = slice(M - 300, M)
    mask = BlockMask(as_seed(seed, DEVICE), M, K, p)
    keep = mask.zero_dropped(torch.ones(300, K, device=DEVICE), mask.hashes(M - 300, 300)) != 0

    def formulas(dtype):
        x_, w_, a_, b_, dy_ = (t.detach().to(dtype) for t in (x[last], w, a, b, dy[last]))
        mask = keep.to(dtype) * keep_scale(p)
        return x_ @ w_.t() + 2.0 * ((x_ * mask) @ a_.t()) @ b_.t(), dy_ @ w_ + 2.0 * mask * ((dy_ @ b_) @ a_)

    for ours, plain, truth in zip((y[last], dx[last]), formulas(BF16), formulas(torch.float64), strict=True):
        for norm in (lambda t: t.abs().max(), lambda t: t.norm()):
            assert norm(ours.detach().double() - truth) <= FACTOR * norm(plain.double() - truth)


@on_gpu
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask(use_reentrant):
    case = tensors()

    def gradients(call):
        torch.manual_seed(0)
        y = call(case.x)
        return y.detach(), *torch.autograd.grad(y, leaves, case.dy)

    layer = LoRALinear(640, 384, r=16, lora_dropout=0.3, device=DEVICE, dtype=BF16)
    torch.nn.init.normal_(layer.lora_b)
    leaves = (case.x, layer.lora_a, layer.lora_b)
    if use_reentrant:  # takes .backward() only

        def gradients(call):
            torch.manual_seed(0)
            for leaf in leaves:
                leaf.grad = None
            y = call(case.x)
            y.backward(case.dy)
            return y.detach(), *(leaf.grad for leaf in leaves)

    plain = gradients(layer)
    assert_same_bits(plain, gradients(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)))


@on_gpu
@pytest.mark.parametrize("request_", [None, "torch", REQUESTS[4]])
def test_compiled_whole(request_):
    case = tensors()
    torch._dynamo.reset()
    call = torch.compile(
        lambda x, w, a, b, bias: lora_linear(x, w, a, b, 2.0, bias, dropout_p=0.1, seed=5, strategy=request_),
        fullgraph=True,
    )
    arguments = (case.weight, case.lora_a, case.lora_b, case.bias)
    y = call(case.x, *arguments)
    got = y.detach(), *torch.autograd.grad(y, (case.x, case.lora_a, case.lora_b), case.dy)
    assert_same_bits(run(case, request_), got)


@on_gpu
def test_only_s_and_the_seed_stay_for_the_backward():
    case = tensors(M=4096, N=1024, K=2048)
    run(case)
    before = torch.cuda.memory_allocated()
    y = lora_linear(case.x, case.weight, case.lora_a, case.lora_b, 2.0, case.bias, dropout_p=0.1)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    assert kept <= 4096 * 16 * 4 + 2 * 512  # s, and the seed; the allocator gives 512 bytes at a time
