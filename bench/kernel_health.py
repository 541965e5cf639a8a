"""Compile every kernel in every shipped tile without a GPU, and say what the compiler made of it.

    python bench/kernel_health.py                       sm_80, sm_90, sm_100, every regime
    python bench/kernel_health.py --arch 90 --kernel gemm --regime bfloat16
    python bench/kernel_health.py --quick               bf16 and mixed bf16, ranks up to 16

One line per compiled kernel: registers, bytes spilled, shared memory against the chip's limit, which tensor-core
and bulk-copy instructions are in it, and whether ptxas serialized wgmma (C7510 to C7515). Exit code 1 on a breach:
a spill, too much shared memory (or more than ``tiles.py`` reckons), serialized wgmma, a descriptor form without bulk
copies.

The launchers are called with meta tensors and Triton's launch is replaced by one that notes its arguments, so what is
compiled is what would be launched. Triton caches the results: a second run takes seconds.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.kernels import device, linear, tiles

CHIPS = {
    "80": tiles.Chip(108, (8, 0)), "86": tiles.Chip(84, (8, 6)), "89": tiles.Chip(128, (8, 9)),
    "90": tiles.Chip(132, (9, 0)), "100": tiles.Chip(148, (10, 0)), "120": tiles.Chip(170, (12, 0)),
    "gfx942": tiles.Chip(304, (9, 4), hip=True),
}  # fmt: skip
POINTERS = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int64: "i64",
}  # fmt: skip
M, N, K = 8192, 4096, 4096


@dataclass(frozen=True)
class Case:
    """One launcher call: a piece of the layer with a tile, in a regime, with or without dropout."""

    arch: str
    regime: str
    piece: str
    tile: object
    dropout: bool


@dataclass(frozen=True)
class Health:
    """What one kernel of a case compiled to."""

    case: Case
    kernel: str
    registers: int
    spill: int
    shared: int
    reckoned: int
    instructions: str
    serialized: bool
    seconds: float

    @property
    def breaches(self) -> list[str]:
        limit = CHIPS[self.case.arch].shared_limit
        found = [(self.spill > 0, f"{self.spill} B spilled"), (self.serialized, "wgmma serialized")]
        found += [(self.shared > limit, f"shared memory over the chip's {limit}")]
        found += [(self.shared > self.reckoned, f"shared memory over the {self.reckoned} that tiles.py reckons")]
        found += [("descriptor" in self.kernel and "bulk" not in self.instructions, "no bulk copy")]
        return [text for wrong, text in found if wrong]

    def row(self) -> str:
        case, limit = self.case, CHIPS[self.case.arch].shared_limit
        numbers = f"{self.registers:4d} {self.spill:6d} {self.shared:7d}/{limit:6d} {self.instructions:14s}"
        flags = ("drop " if case.dropout else "     ") + f"{describe(case.tile, self.kernel):24s}"
        head = f"{case.arch:>6s} {case.regime:14s} {self.kernel:24s} {flags}"
        return f"{head} {numbers} {self.seconds:5.1f}s {'; '.join(self.breaches)}"


def describe(tile: object, kernel: str) -> str:
    """A tile as 128x64x16 w8 s4: the part of it that the kernel ran with."""
    if isinstance(tile, tiles.GradBTile):
        tile = {"_both_kernel": tile.both, "_shrink_kernel": tile.ds, "_outer_kernel": tile.db}.get(kernel, tile.ds)
    blocks = "x".join(str(value) for name, value in vars(tile).items() if name.startswith("block"))
    return f"{blocks} w{tile.num_warps}" + (f" s{tile.num_stages}" if hasattr(tile, "num_stages") else "")


def cases(archs: list[str], regimes: list[str], largest_rank: int = 64) -> Iterator[Case]:
    """Every shipped tile, with and without a mask where the piece draws one, and the split form of the few-row GEMM."""
    for arch, regime in itertools.product(archs, regimes):
        for piece, tile, dropout in tiles.shipped(CHIPS[arch], regime):
            if rank_block(tile) > largest_rank:
                continue
            yield Case(arch, regime, piece, tile, dropout)
            if isinstance(tile, tiles.GemmTile) and tile.block_m <= 64 and not dropout:
                yield Case(arch, regime, piece, replace(tile, split=2), dropout)


def rank_block(tile: object) -> int:
    return (tile.ds if isinstance(tile, tiles.GradBTile) else tile).block_r


def call(case: Case) -> None:
    """Call the launcher of a case on meta tensors of a real layer's shape."""
    dtype, adapter = (getattr(torch, name) for name in tiles.REGIMES[case.regime])
    rank, tile = rank_block(case.tile), case.tile

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = tile.block_m if isinstance(tile, tiles.GemmTile) and tile.block_m <= 64 else M
    x, dy, w = empty(rows, K), empty(rows, N), empty(N, K)
    a, b, s = empty(rank, K, dtype=adapter), empty(N, rank, dtype=adapter), empty(rows, rank, dtype=torch.float32)
    bias, lora_bias = empty(N), empty(N, dtype=adapter)
    drop = linear.Drop(empty(1, dtype=torch.int64), 5, 1.25) if case.dropout else None
    launch: dict[str, Callable[[], object]] = {
        "shrink": lambda: linear.shrink(x, a, drop, tile),
        "expand": lambda: linear.expand(x, w, bias, s, b, lora_bias, 0.5, tile),
        "grad_b": lambda: linear.grad_b(dy, b, s, 0.5, tile),
        "grad_x": lambda: linear.grad_x(dy, w, s, a, drop, tile),
        "grad_a": lambda: linear.grad_a(x, s, drop, tile, adapter),
        "lowrank_y": lambda: linear.lowrank_y(s, b, bias, lora_bias, 0.5, dtype, tile),
        "lowrank_x": lambda: linear.lowrank_x(s, a, drop, dtype, tile),
    }
    launch[case.piece]()


@contextlib.contextmanager
def launches_noted() -> Iterator[list[tuple[JITFunction, tuple, dict]]]:
    """Inside, launching a kernel only appends (kernel, arguments, options) to the list."""
    noted: list[tuple[JITFunction, tuple, dict]] = []
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **options: noted.append((self, args, options))
    try:
        yield noted
    finally:
        JITFunction.run = run


def source(kernel: JITFunction, args: tuple) -> ASTSource:
    """What Triton would compile for these arguments, under its own rules of specialisation."""
    signature, constants, attributes = {}, {}, {}
    for position, (param, value) in enumerate(zip(kernel.params, args, strict=True)):
        kind = "constexpr"
        if param.is_constexpr or value is None:
            constants[(position,)] = value
        elif isinstance(value, torch.Tensor):
            kind = f"*{POINTERS[value.dtype]}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            kind = f"tensordesc<{POINTERS[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            kind = "fp32"
        elif value == 1 and not param.do_not_specialize:
            constants[(position,)] = 1
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
        signature[param.name] = kind
    return ASTSource(kernel, signature, constants, attributes)


def compiled(kernel: JITFunction, args: tuple, options: dict, target: GPUTarget):
    """The compiled kernel and the log of ptxas, which is kept in Triton's cache beside the binary."""
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = triton.compile(source(kernel, args), target=target, options=options)
    cache = get_cache_manager(result.hash)
    kept = cache.get_file("kernel_health.log")
    if printed.getvalue():
        cache.put(printed.getvalue(), "kernel_health.log", binary=False)
    elif kept is None and target.backend == "cuda":  # a binary that someone else left in the cache: no log of it
        triton.knobs.compilation.always_compile = True
        with contextlib.redirect_stdout(printed):
            result = triton.compile(source(kernel, args), target=target, options=options)
        triton.knobs.compilation.always_compile = False
        cache.put(printed.getvalue(), "kernel_health.log", binary=False)
    elif kept is not None:
        with open(kept) as file:
            return result, file.read()
    return result, printed.getvalue()


def reckoned_shared(case: Case, kernel: str) -> int:
    """What tiles.py says this kernel may take, or the chip's limit for a kernel that tiles.py does not size."""
    problem = tiles.Problem(M, N, K, rank_block(case.tile), *tiles.REGIMES[case.regime])
    tile = case.tile
    if isinstance(tile, tiles.GradBTile):
        tile = {"_both_kernel": tile.both, "_shrink_kernel": tile.ds, "_outer_kernel": tile.db}.get(kernel)
    if isinstance(tile, tiles.SkinnyTile) and kernel != "_reduce_kernel":
        name = kernel.strip("_").removesuffix("_kernel")
        return tiles.skinny_shared_bytes(tile, problem, name, CHIPS[case.arch])
    if isinstance(tile, tiles.GemmTile) and kernel != "_lowrank_kernel":
        return tiles.gemm_shared_bytes(tile, problem)
    return CHIPS[case.arch].shared_limit


def examine(case: Case) -> list[Health]:
    """Compile the kernels of one case."""
    hip = CHIPS[case.arch].hip
    device.HIP = hip
    target = GPUTarget("hip", case.arch, 64) if hip else GPUTarget("cuda", int(case.arch), 32)
    with launches_noted() as noted:
        call(case)
    found = []
    for kernel, args, options in noted:
        start = time.perf_counter()
        result, log = compiled(kernel, args, options, target)
        seconds = time.perf_counter() - start
        text = result.asm["amdgcn" if hip else "ptx"]
        patterns = ("mfma", "v_mfma"), ("wgmma", "wgmma.mma_async"), ("tcgen05", "tcgen05.mma"), ("mma", "mma.sync")
        names = [name for name, pattern in (*patterns, ("bulk", "cp.async.bulk.tensor")) if pattern in text]
        registers, spills = (text, text) if hip else (log, log)
        registers = re.search(r"\.vgpr_count: +(\d+)" if hip else r"Used (\d+) registers", registers)
        spills = re.findall(r"\.vgpr_spill_count: +(\d+)" if hip else r"(\d+) bytes spill", spills)
        name, serialized = kernel.__name__, "serialized" in log
        found.append(
            Health(case, name, int(registers[1]), sum(map(int, spills)), result.metadata.shared,
                   reckoned_shared(case, name), "+".join(names) or "-", serialized, seconds)
        )  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80,90,100", help=f"comma-separated, of {', '.join(CHIPS)}")
    parser.add_argument("--regime", default=",".join(tiles.REGIMES), help="comma-separated dtypes of layer and adapter")
    parser.add_argument("--kernel", default="", help="only pieces and kernels whose name contains this")
    parser.add_argument("--quick", action="store_true", help="bf16 and mixed bf16, ranks up to 16")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(argv)
    regimes = ["bfloat16", "mixed bfloat16"] if options.quick else options.regime.split(",")
    chosen = list(cases(options.arch.split(","), regimes, 16 if options.quick else 64))
    if options.kernel in {case.piece for case in chosen}:
        chosen = [case for case in chosen if case.piece == options.kernel]

    print(f"{'arch':>6s} {'regime':14s} {'kernel':24s} {'mask, tile':29s} regs spill B shared B/limit  instructions")
    breached = total = 0
    seen = set()
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        for rows in pool.map(examine, chosen, chunksize=4):
            for health in rows:
                line = health.row()
                if options.kernel in health.kernel + health.case.piece and line not in seen:
                    print(line, flush=True)
                    seen.add(line)
                    total += 1
                    breached += bool(health.breaches)
    print(f"{total} kernels, {breached} with a breach (triton {triton.__version__})")
    return 1 if breached else 0


if __name__ == "__main__":
    sys.exit(main())
