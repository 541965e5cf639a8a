"""Compile every kernel in every shipped tile without a GPU, and say what the compiler made of it.

    python bench/kernel_health.py                       sm_80, sm_90, sm_100, every regime
    python bench/kernel_health.py --arch all --output health.json
    python bench/kernel_health.py --arch 90 --kernel gemm --regime bfloat16
    python bench/kernel_health.py --quick               bf16 and mixed bf16, ranks up to 16

One line per compiled kernel: registers, bytes spilled, shared memory against the chip's limit, and of its main loop the
instructions, the tensor-core instructions and the asynchronous copies. Exit code 1 on a breach:

* a spill, too much shared memory (or more than ``tiles.py`` reckons), wgmma that ptxas serialized (C7510 to C7515);
* no tensor-core instruction in the main loop, where the dtype has one (float32 where torch may use TF32: "tf32");
* no asynchronous copy there, in a tile of several stages; for the descriptor form, no bulk copy;
* on sm_90, a main loop of expand or grad_x that does more than that of the plain GEMM, the same kernel and tile without
  low-rank product, bias and mask: in the PTX anything but comparisons of a tile's bounds, in the SASS anything that
  does work (``kernel_loops.py`` says which). The difference in all SASS instructions is printed.

Sizes and ranks are multiples of 16, as in nearly all layers, and for sm_80 and sm_90 also such that N, K or both are
not, or the rank: rows of such a length are loaded element by element in 16-bit types, without asynchronous copies.

The launchers get meta tensors and Triton's launch only notes its arguments: what is compiled is what would be launched.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import kernel_loops
import torch
import triton
from kernel_sections import sections, summary
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
ODD = 4088  # as good as any length that 16 does not divide: Triton compiles one kernel for all of them
ODD_ARCHS = ("80", "90")
TF32 = "tf32"  # the regime of float32 where torch is allowed TF32, which the kernels follow
KIND = "fused-lora kernel health"
__all__ = ["KIND", "main", "sections", "summary"]


@dataclass(frozen=True)
class Case:
    """One launcher call: a piece of an (n, k) layer with a tile, in a regime, with or without dropout."""

    arch: str
    regime: str
    piece: str
    tile: object
    dropout: bool
    n: int = N
    k: int = K
    odd_rank: bool = False

    @property
    def rank(self) -> int:
        """That of a full block, or one that 16 does not divide, which is all that the machine code knows of it."""
        return rank_block(self.tile) - (8 if self.odd_rank else 0)

    @property
    def problem(self) -> tiles.Problem:
        return tiles.Problem(M, self.n, self.k, self.rank, *tiles.REGIMES[self.dtypes], self.dropout)

    @property
    def dtypes(self) -> str:
        """The regime as ``tiles.py`` names it, which does not tell float32 from float32 where torch may use TF32."""
        return "float32" if self.regime == TF32 else self.regime


@dataclass(frozen=True)
class Health:
    """What one kernel of a case compiled to. ``loop``: instructions, tensor-core ones, copies, bulk ones of them."""

    case: Case
    kernel: str
    registers: int
    spill: int
    shared: int
    reckoned: int
    serialized: bool
    loop: tuple[int, int, int, int]
    plain: tuple[int, int] | None  # SASS instructions of the main loop, and of the plain GEMM's, where compared
    extra: dict[str, int]  # the instructions that do work and the plain GEMM's loop lacks

    @property
    def breaches(self) -> list[str]:
        chip = CHIPS[self.case.arch]
        _, tensor, copies, bulk = self.loop
        found = [(self.spill > 0, f"{self.spill} B spilled"), (self.serialized, "wgmma serialized")]
        found += [(self.shared > chip.shared_limit, f"shared memory over the chip's {chip.shared_limit}")]
        found += [(self.shared > self.reckoned, f"shared memory over the {self.reckoned} that tiles.py reckons")]
        multiplies = self.kernel != "_reduce_kernel" and self.case.regime != "float32"
        found += [(multiplies and not tensor, "no tensor-core instruction in the main loop")]
        found += [(self.pipelined and not copies, "no asynchronous copy in the main loop")]
        found += [("descriptor" in self.kernel and not bulk, "no bulk copy in the main loop")]
        found += [(bool(self.extra), "per step more than the plain GEMM: "
                   + ", ".join(f"{times} {name}" for name, times in self.extra.items()))]  # fmt: skip
        return [text for wrong, text in found if wrong]

    @property
    def pipelined(self) -> bool:
        """Whether the tile asks for copies in flight, of rows that can be copied. On chips without wgmma ``both`` reads
        t in two orders, and the pipeliner then loads it into registers; on AMD's chips it does so always."""
        case, chip, tile = self.case, CHIPS[self.case.arch], ran_with(self.case.tile, self.kernel)
        kernels = ("_shrink", "_outer", "_gemm") + ("_both",) * chip.warp_groups
        loads = "descriptor" in self.kernel or case.problem.vectors(case.n, case.k)
        return loads and not chip.hip and self.kernel.startswith(kernels) and tile.num_stages > 1

    def row(self) -> str:
        case, limit = self.case, CHIPS[self.case.arch].shared_limit
        numbers = f"{self.registers:4d} {self.spill:6d} {self.shared:7d}/{limit:6d} "
        numbers += " ".join(f"{number:4d}" for number in self.loop[:3])
        numbers += f" {self.plain[0] - self.plain[1]:+4d}" if self.plain else "     "
        flags = ("drop " if case.dropout else "     ") + f"{describe(case.tile, self.kernel):24s}"
        sizes = f"{case.n}x{case.k} r{case.rank:<2d}"
        head = f"{case.arch:>6s} {case.regime:14s} {sizes} {case.piece:9s} {self.kernel:23s} {flags}"
        return f"{head} {numbers} {'; '.join(self.breaches)}"

    def record(self) -> list[object]:
        """The same for the JSON, in the order of ``COLUMNS``."""
        case, plain = self.case, self.plain or (None, None)
        head = [case.arch, case.regime, case.n, case.k, case.rank, case.piece, self.kernel]
        head += [describe(case.tile, self.kernel), case.dropout]
        numbers = [self.registers, self.spill, self.shared, CHIPS[case.arch].shared_limit, self.serialized]
        return [*head, *numbers, *self.loop, *plain, self.breaches]


COLUMNS = [
    "arch", "regime", "N", "K", "rank", "piece", "kernel", "tile", "dropout", "registers", "spilled_bytes",
    "shared_bytes", "shared_limit", "serialized", "loop_instructions", "loop_tensor", "loop_copies",
    "loop_bulk_copies", "sass_loop", "sass_plain_loop", "breaches",
]  # fmt: skip


def rank_block(tile: object) -> int:
    return ran_with(tile, "").block_r


def ran_with(tile: object, kernel: str) -> object:
    """The part of a tile that a kernel ran with."""
    if isinstance(tile, tiles.GradBTile):
        return {"_both_kernel": tile.both, "_shrink_kernel": tile.ds, "_outer_kernel": tile.db}.get(kernel, tile.ds)
    return tile


def describe(tile: object, kernel: str) -> str:
    """A tile as 128x64x16 w8 s4, or ... s4 x2 in parts: the part of it that the kernel ran with."""
    tile = ran_with(tile, kernel)
    blocks = "x".join(str(value) for name, value in vars(tile).items() if name.startswith("block"))
    stages = f" s{tile.num_stages}" if hasattr(tile, "num_stages") else ""
    return f"{blocks} w{tile.num_warps}{stages}" + (" x2" if getattr(tile, "split", 1) > 1 else "")


def variants(piece: str, tile: object, regime: str) -> Iterator[object]:
    """The tile, and whatever else of it is other machine code, up to specialisation on sizes.

    In several parts kernels store float32 sums, where in one part the GEMM adds the low-rank product and the outer
    product has the adapters' dtype. Where only one of ds and db is wanted, one pass for both falls back on its halves.
    """
    yield tile
    narrow = regime in ("bfloat16", "float16")
    few_rows = isinstance(tile, tiles.GemmTile) and tile.block_m <= 64
    if few_rows or (piece == "grad_a" and narrow):
        yield replace(tile, split=2)
    elif isinstance(tile, tiles.GradBTile):
        if tile.both is not None:
            yield replace(tile, both=None)
        if narrow:
            yield replace(tile, both=None, db=replace(tile.db, split=2))
        if narrow and tile.both is not None:
            yield replace(tile, both=replace(tile.both, split=2))


def cases(archs: list[str], regimes: list[str], largest_rank: int = 64) -> Iterator[Case]:
    """Every shipped tile, with and without a mask where the piece draws one, in all its variants."""
    for arch, regime in itertools.product(archs, regimes):
        if regime == TF32 and CHIPS[arch].hip:  # the kernels never ask for it there
            continue
        dtypes = "float32" if regime == TF32 else regime
        odd = arch in ODD_ARCHS and dtypes != "float32"
        sizes = [(N, K, False), *((N, K, True),) * (arch in ODD_ARCHS)]
        sizes += [(ODD, ODD, False), (ODD, K, False), (N, ODD, False)] if odd else []
        for n, k, odd_rank in sizes:
            ranks = (8, 24, 56) if odd_rank else (16, 32, 64)
            for piece, tile, dropout in tiles.shipped(CHIPS[arch], dtypes, n, k, ranks):
                if rank_block(tile) > largest_rank:
                    continue
                for variant in variants(piece, tile, regime):
                    yield Case(arch, regime, piece, variant, dropout, n, k, odd_rank)


def call(case: Case) -> None:
    """Call the launcher of a case on meta tensors of a real layer's shape."""
    dtype, adapter = (getattr(torch, name) for name in tiles.REGIMES[case.dtypes])
    rank, tile, n, k = case.rank, case.tile, case.n, case.k

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = tile.block_m if isinstance(tile, tiles.GemmTile) and tile.block_m <= 64 else M
    x, dy, w = empty(rows, k), empty(rows, n), empty(n, k)
    a, b, s = empty(rank, k, dtype=adapter), empty(n, rank, dtype=adapter), empty(rows, rank, dtype=torch.float32)
    bias, lora_bias = empty(n), empty(n, dtype=adapter)
    drop = linear.Drop(empty(1, dtype=torch.int64), 5, 1.25) if case.dropout else None
    tf32 = {"allow_tf32": case.regime == TF32}
    launch: dict[str, Callable[[], object]] = {
        "shrink": lambda: linear.shrink(x, a, drop, tile, **tf32),
        "expand": lambda: linear.expand(x, w, bias, s, b, lora_bias, 0.5, tile, **tf32),
        "grad_b": lambda: linear.grad_b(dy, b, s, 0.5, tile, **tf32),
        "grad_x": lambda: linear.grad_x(dy, w, s, a, drop, tile, **tf32),
        "grad_a": lambda: linear.grad_a(x, s, drop, tile, adapter, **tf32),
        "lowrank_y": lambda: linear.lowrank_y(s, b, bias, lora_bias, 0.5, dtype, tile, **tf32),
        "lowrank_x": lambda: linear.lowrank_x(s, a, drop, dtype, tile, **tf32),
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
    problem, tile = case.problem, ran_with(case.tile, kernel)
    if isinstance(tile, tiles.SkinnyTile) and kernel != "_reduce_kernel":
        name = kernel.strip("_").removesuffix("_kernel")
        return tiles.skinny_shared_bytes(tile, problem, name, CHIPS[case.arch])
    if isinstance(tile, tiles.GemmTile) and kernel != "_lowrank_kernel":
        return tiles.gemm_shared_bytes(tile, problem)
    return CHIPS[case.arch].shared_limit


def plain_gemm(kernel: JITFunction, args: tuple) -> tuple:
    """Arguments of the plain GEMM: the same tile and operands without the low-rank product, biases and mask."""
    # What only the low-rank product reads is the same everywhere, so that equal plain GEMMs are compiled once.
    lowrank = dict.fromkeys(("s_ptr", "f_ptr", "bias_ptr", "lora_bias_ptr", "seed_ptr"))
    lowrank |= {"stride_fr": 16, "stride_fp": 16, "LOWRANK_PRECISION": "ieee", "BLOCK_R": 16}
    return tuple(lowrank.get(param.name, arg) for param, arg in zip(kernel.params, args, strict=True))


def against(asm: dict, plain: dict) -> tuple[tuple[int, int], dict[str, int]]:
    """(SASS instructions per step of the main loop, of the plain one's), and what the plain PTX or SASS lacks."""
    ptx, plain_ptx = (kernel_loops.main_loop(each["ptx"]) for each in (asm, plain))
    sass, plain_sass = (kernel_loops.main_loop(kernel_loops.machine_code(each["cubin"])) for each in (asm, plain))
    assert plain_ptx and plain_sass, "a GEMM without a main loop"
    extra = kernel_loops.ptx_work(ptx) - kernel_loops.ptx_work(plain_ptx)
    extra += kernel_loops.sass_work(sass) - kernel_loops.sass_work(plain_sass)
    return (sass.total(), plain_sass.total()), dict(extra)


def examine(case: Case) -> list[Health]:
    """Compile the kernels of one case."""
    hip = CHIPS[case.arch].hip
    device.HIP = hip
    target = GPUTarget("hip", case.arch, 64) if hip else GPUTarget("cuda", int(case.arch), 32)
    with launches_noted() as noted:
        call(case)
    found = []
    for kernel, args, options in noted:
        result, log = compiled(kernel, args, options, target)
        text = result.asm["amdgcn" if hip else "ptx"]
        registers = re.search(r"\.vgpr_count: +(\d+)" if hip else r"Used (\d+) registers", text if hip else log)
        spills = re.findall(r"\.vgpr_spill_count: +(\d+)" if hip else r"(\d+) bytes spill", text if hip else log)
        name, plain, extra = kernel.__name__, None, {}
        if case.arch == "90" and name.startswith("_gemm") and args[kernel.arg_names.index("s_ptr")] is not None:
            other, _ = compiled(kernel, plain_gemm(kernel, args), options, target)
            plain, extra = against(result.asm, other.asm)
        found.append(
            Health(case, name, int(registers[1]), sum(map(int, spills)), result.metadata.shared,
                   reckoned_shared(case, name), "serialized" in log, kernel_loops.counts(text), plain, extra)
        )  # fmt: skip
    return found


def write(path: Path, rows: list[list[object]]) -> None:
    """The JSON, a row a line."""
    import measure

    content = {"kind": KIND, **measure.environment(torch.device("cpu")), "columns": COLUMNS}
    head = json.dumps(content, indent=1).removesuffix("\n}")
    path.write_text(head + ',\n "rows": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]\n}\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80,90,100", help=f"comma-separated, of {', '.join(CHIPS)}; or all")
    every = ",".join((*tiles.REGIMES, TF32))
    parser.add_argument("--regime", default=every, help="comma-separated dtypes of layer and adapter")
    parser.add_argument("--sizes", default="", help="only these N x K, comma-separated: 4096x4096,4088x4096")
    parser.add_argument("--kernel", default="", help="only pieces and kernels whose name contains this")
    parser.add_argument("--quick", action="store_true", help="bf16 and mixed bf16, ranks up to 16")
    parser.add_argument("--output", type=Path, help="write a JSON of all of it")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(argv)
    regimes = ["bfloat16", "mixed bfloat16"] if options.quick else options.regime.split(",")
    archs = list(CHIPS) if options.arch == "all" else options.arch.split(",")
    chosen = list(cases(archs, regimes, 16 if options.quick else 64))
    if options.sizes:
        chosen = [case for case in chosen if f"{case.n}x{case.k}" in options.sizes.split(",")]
    if options.kernel in {case.piece for case in chosen}:
        chosen = [case for case in chosen if case.piece == options.kernel]

    print(f"{'':120s} main loop: instructions, of them on tensor cores and copies; SASS beyond the plain GEMM's")
    print(f"{'arch':>6s} {'regime':14s} {'N x K, rank':13s} {'piece':9s} {'kernel':23s} {'mask, tile':29s}", end="")
    print(" regs spill B shared B/limit  inst tens copy more")
    records: dict[str, list[object]] = {}
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        for rows in pool.map(examine, chosen, chunksize=4):
            for health in rows:
                line = health.row()
                if options.kernel in health.kernel + health.case.piece and line not in records:
                    print(line, flush=True)
                    records[line] = health.record()
    breached = sum(bool(record[-1]) for record in records.values())
    if options.output:
        write(options.output, list(records.values()))
    print(f"{len(records)} kernels, {breached} with a breach (triton {triton.__version__})")
    return 1 if breached else 0


if __name__ == "__main__":
    sys.exit(main())
