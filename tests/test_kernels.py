"""Every launcher against its formula in float64, in every form, on shapes and strides that no tile divides.

The rule has no tuned tolerance: our error is at most twice that of the plain PyTorch computation in the same dtypes,
in the max norm and in the RMS norm. Memory that was never written is NaN (``conftest.py``).

M rows   N out_features   K in_features   R rank
x (M, K)   w (N, K)   bias (N,)   a (R, K)   b (N, R)   lora_bias (N,)   s, ds (M, R) fp32   dy (M, N)
"""

import inspect
import os
from dataclasses import dataclass, replace

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch import Tensor

from fused_lora.dropout import keep_mask, keep_scale, threshold
from fused_lora.kernels import gemm, linear, skinny
from fused_lora.kernels.tiles import (
    Chip,
    GemmTile,
    GradBTile,
    LowrankTile,
    Problem,
    SkinnyTile,
    pick_expand,
    pick_grad_a,
    pick_grad_b,
    pick_grad_x,
    pick_lowrank_x,
    pick_lowrank_y,
    pick_shrink,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
REGIMES = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP16, FP32)]  # (x and w, adapters)
SEED, SCALE = 0x1234_5678_9ABC_DEF0, 1.625

# (M, N, K, R, layout of x, dy, w, a and b): no SMALL tile divides these, and ranks take one chunk or several.
SHAPES = [
    (1, 47, 53, 64, "contiguous"),
    (65, 66, 70, 1, "transposed"),
    (129, 34, 61, 3, "strided"),
    (17, 40, 48, 17, "offset"),
    (129, 33, 72, 8, "expanded"),
    (3, 37, 41, 130, "transposed"),
]
SMALL = SkinnyTile(64, 32, 32, 4, 1)
SMALL_GEMM = GemmTile(64, 32, 32, 32, 4, 1, group_m=2)
SMALL_LOWRANK = LowrankTile(64, 32, 32, 4)


def arrange(t: Tensor, layout: str) -> Tensor:
    """The values of t behind other strides, NaN between them."""
    if layout == "contiguous" or t.numel() == 0:
        return t
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "expanded":
        return t[:1].expand(t.shape)
    rows, cols = t.shape
    step = 2 if layout == "strided" else 1
    holder = t.new_full((rows, step * cols + 3), float("nan"))
    view = holder[:, 1 : 1 + step * cols : step]
    return view.copy_(t)


@dataclass
class Layer:
    """The tensors of one layer; ``ratio`` pools draws, so one draw is one independent layer."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    adapter: torch.dtype
    layout: str = "contiguous"
    p: float = 0.0
    draw: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.draw)

        def normal(dtype, fan_in, *shape):
            t = torch.randn(shape, generator=generator, dtype=torch.float64) / max(fan_in, 1) ** 0.5
            return t.to(dtype)

        M, N, K, R, wide = self.M, self.N, self.K, self.R, "contiguous" if self.layout == "expanded" else self.layout
        self.x = arrange(normal(self.dtype, 1, M, K), wide)
        self.w = arrange(normal(self.dtype, K, N, K), wide)
        self.dy = arrange(normal(self.dtype, 1, M, N), self.layout)
        self.a = arrange(normal(self.adapter, K, R, K), wide)
        self.b = arrange(normal(self.adapter, R, N, R), wide)
        self.bias, self.lora_bias = normal(self.dtype, 1, N), normal(self.adapter, 1, N)
        self.s, self.ds = normal(FP32, 1, M, R), normal(FP32, N, M, R)
        self.keep = keep_mask(SEED, M, K, self.p)
        self.drop = None
        if self.p:
            self.drop = linear.Drop(torch.tensor(SEED), threshold(self.p), keep_scale(self.p))

    def dropped(self, t: Tensor) -> Tensor:
        return t if self.drop is None else t * self.keep.to(t.dtype) * self.drop.inv_keep

    def truth(self, piece: str) -> tuple[Tensor, ...]:
        """The formula in float64."""
        return self._results(piece, torch.float64, torch.float64, torch.float64)

    def plain(self, piece: str) -> tuple[Tensor, ...]:
        """The same products as separate PyTorch operations, each rounded to its dtype, as a plain layer does it."""
        return self._results(piece, self.dtype, self.adapter, self.dtype)

    def _results(self, piece: str, dtype, adapter, out) -> tuple[Tensor, ...]:
        x, w, dy, bias = (t.to(dtype) for t in (self.x, self.w, self.dy, self.bias))
        a, b, s, ds, lora_bias = (t.to(adapter) for t in (self.a, self.b, self.s, self.ds, self.lora_bias))
        branch = SCALE * (s @ b.t() + lora_bias)
        masked = self.dropped(ds @ a)
        return {
            "shrink": lambda: (self.dropped(x).to(adapter) @ a.t(),),
            "expand": lambda: ((x @ w.t() + bias + branch).to(out),),
            "grad_b": lambda: (SCALE * (dy.to(adapter) @ b), SCALE * (dy.to(adapter).t() @ s)),
            "grad_x": lambda: ((dy @ w + masked).to(out),),
            "grad_a": lambda: (ds.t() @ self.dropped(x).to(adapter),),
            "lowrank_y": lambda: ((branch + bias).to(out),),
            "lowrank_x": lambda: (masked.to(out),),
        }[piece]()

    def ours(self, piece: str, tile) -> tuple[Tensor, ...]:
        x, w, dy, a, b, s, ds = self.x, self.w, self.dy, self.a, self.b, self.s, self.ds
        results = {
            "shrink": lambda: linear.shrink(x, a, self.drop, tile),
            "expand": lambda: linear.expand(x, w, self.bias, s, b, self.lora_bias, SCALE, tile),
            "grad_b": lambda: linear.grad_b(dy, b, s, SCALE, tile),
            "grad_x": lambda: linear.grad_x(dy, w, ds, a, self.drop, tile),
            "grad_a": lambda: linear.grad_a(x, ds, self.drop, tile, self.adapter),
            "lowrank_y": lambda: linear.lowrank_y(s, b, self.bias, self.lora_bias, SCALE, self.dtype, tile),
            "lowrank_x": lambda: linear.lowrank_x(ds, a, self.drop, self.dtype, tile),
        }[piece]()
        return results if isinstance(results, tuple) else (results,)


def assert_as_accurate_as_plain(piece: str, tile, *facts) -> None:
    """The rule, on results of at least 256 elements: smaller ones are pooled over draws.

    Of a handful of elements the largest rounding error is a coin toss on either side, so the pooled max norm is the
    mean of the draws' max norms.
    """
    layer = Layer(*facts)
    draws = min(32, -(-256 // min(t.numel() for t in layer.truth(piece))))
    errors = []
    for draw in range(draws):
        layer = replace(layer, draw=draw)
        truths, plains, ours = layer.truth(piece), layer.plain(piece), layer.ours(piece, tile)
        assert all(o.shape == t.shape for o, t in zip(ours, truths, strict=True))
        errors.append([(o.double() - t, q.double() - t) for o, q, t in zip(ours, plains, truths, strict=True)])
    for index, truth in enumerate(truths):
        mine, theirs = (torch.stack([error[index][side] for error in errors]).flatten(1) for side in (0, 1))
        tiny = 4 * torch.finfo(ours[index].dtype).eps * truth.abs().max()
        for norm in (lambda e: e.abs().amax(1).mean(), lambda e: e.square().mean().sqrt()):
            bound = 2 * norm(theirs) if norm(theirs) > 0 else tiny
            assert norm(mine) <= bound, f"{piece} result {index}: {norm(mine):.3g} against plain {norm(theirs):.3g}"


def regime_name(regime) -> str:
    return "+".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(regime))


regimes = pytest.mark.parametrize("regime", REGIMES, ids=regime_name)


def rotating(names: str, variants: list, shapes=SHAPES, chosen=REGIMES):
    """Every shape in every regime, each time in the next variant: all pairs of the three, without the product."""
    cases = []
    for row, shape in enumerate(shapes):
        for column, regime in enumerate(chosen):
            variant = variants[(row + column) % len(variants)]
            label = "-".join((*map(str, shape), regime_name(regime), *map(str, variant)))
            cases.append(pytest.param(*variant, shape, regime, id=label))
    return pytest.mark.parametrize((*names.split(), "shape", "regime"), cases)


@pytest.mark.parametrize("piece", ["shrink", "grad_a"])
@rotating("p split", [(0.0, 1), (0.1, 3), (0.5, 1), (0.0, 3)])
def test_skinny(piece, p, split, shape, regime):
    *sizes, layout = shape
    assert_as_accurate_as_plain(piece, replace(SMALL, split=split), *sizes, *regime, layout, p)


@rotating("both split", [(True, 1), (False, 3), (True, 2), (False, 1)])
def test_grad_b(both, split, shape, regime):
    *sizes, layout = shape
    tile = replace(SMALL, split=split)
    assert_as_accurate_as_plain("grad_b", GradBTile(tile if both else None, tile, tile), *sizes, *regime, layout)


@rotating("piece p split", [("expand", 0.0, 1), ("grad_x", 0.1, 1), ("expand", 0.0, 2), ("grad_x", 0.5, 2)])
def test_gemm_pointer(piece, p, split, shape, regime):
    *sizes, layout = shape
    assert_as_accurate_as_plain(piece, replace(SMALL_GEMM, split=split), *sizes, *regime, layout, p)


@rotating("piece p", [("lowrank_y", 0.0), ("lowrank_x", 0.5), ("lowrank_x", 0.0)])
def test_lowrank(piece, p, shape, regime):
    *sizes, layout = shape
    assert_as_accurate_as_plain(piece, SMALL_LOWRANK, *sizes, *regime, layout, p)


@rotating(
    "piece p", [("expand", 0.0), ("grad_x", 0.5), ("grad_x", 0.0)],
    [(3, 40, 24, 130), (65, 72, 56, 8), (129, 32, 48, 17)], [regime for regime in REGIMES if regime[0] != FP32],
)  # fmt: skip
def test_gemm_descriptor(piece, p, shape, regime):
    """Fewer programs than blocks, so that each walks several."""
    tile = replace(SMALL_GEMM, form="descriptor", programs=2)
    assert_as_accurate_as_plain(piece, tile, *shape, *regime, "contiguous", p)


def test_gemm_descriptor_takes_a_weight_stored_either_way():
    layer = Layer(33, 40, 48, 8, BF16, BF16, p=0.5)
    tile = replace(SMALL_GEMM, form="descriptor", programs=3)
    expected = layer.ours("expand", tile) + layer.ours("grad_x", tile)
    layer.w = arrange(layer.w, "transposed")
    for one, other in zip(expected, layer.ours("expand", tile) + layer.ours("grad_x", tile), strict=True):
        assert torch.equal(one, other)


def test_gemm_descriptor_refuses_what_it_cannot_address():
    layer = Layer(33, 40, 48, 8, BF16, BF16, "offset")
    with pytest.raises(ValueError, match="no descriptor form: x: address"):
        layer.ours("expand", replace(SMALL_GEMM, form="descriptor", programs=3))


@rotating("", [()], [(65, 130, 200, 17), (65, 144, 208, 9)])
def test_picked_tiles(shape, regime):
    """The tiles of a small H100, as they ship, splits included: for any N and K, and for multiples of 16."""
    sizes = shape
    problem, chip = Problem(*sizes, *regime), Chip(8, (9, 0))
    picked = {
        "shrink": pick_shrink(problem, chip), "grad_a": pick_grad_a(problem, chip),
        "grad_b": pick_grad_b(problem, chip), "expand": pick_expand(problem, chip),
        "grad_x": pick_grad_x(problem, chip), "lowrank_y": pick_lowrank_y(problem, chip),
        "lowrank_x": pick_lowrank_x(problem, chip),
    }  # fmt: skip
    for piece, tile in picked.items():
        assert_as_accurate_as_plain(piece, tile, *sizes, *regime, "contiguous", 0.1)


@pytest.mark.parametrize(("seed", "p"), [(0, 0.1), (-1, 0.5), (2**63 - 1, 0.1), (-(2**63), 0.5), (SEED, 1.0)])
def test_mask_is_the_one_of_dropout_py(seed, p):
    """Every kernel that draws the mask, read back bit for bit: each multiplies a one by the mask."""
    M, K = 37, 45
    keep = keep_mask(seed, M, K, p).float()
    drop = linear.Drop(torch.tensor(seed), threshold(p), 1.0)
    ones = torch.ones
    assert torch.equal(linear.lowrank_x(ones(M, 1), ones(1, K), drop, FP32, SMALL_LOWRANK), keep)
    assert torch.equal(linear.shrink(ones(M, K), torch.eye(K), drop, SMALL), keep)
    assert torch.equal(linear.grad_a(ones(M, K), torch.eye(M), drop, SMALL, FP32), keep)
    dy, w = torch.zeros(M, 16), torch.zeros(16, K)
    assert torch.equal(linear.grad_x(dy, w, ones(M, 1), ones(1, K), drop, SMALL_GEMM), keep)
    half = (t.to(BF16) for t in (dy, torch.zeros(16, 48), ones(M, 1), ones(1, 48)))
    dy, w, ds, a = half
    tile = replace(SMALL_GEMM, form="descriptor", programs=2)
    assert torch.equal(linear.grad_x(dy, w, ds.float(), a, drop, tile)[:, :K].float(), keep)


def test_mask_at_the_threshold():
    """An element whose hash is the threshold itself is dropped, as in dropout.py: > and not >=."""
    low, high = 0, 2**32  # kept at p = low / 2**32, dropped at p = high / 2**32
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if keep_mask(SEED, 1, 1, middle / 2**32) else (low, middle)
    for steps in (low - 1, low, high):
        drop = linear.Drop(torch.tensor(SEED), threshold(steps / 2**32), 1.0)
        kept = linear.lowrank_x(torch.ones(1, 1), torch.ones(1, 1), drop, FP32, SMALL_LOWRANK)
        assert bool(kept) == bool(keep_mask(SEED, 1, 1, steps / 2**32))


@pytest.mark.parametrize("split", [1, 3])
def test_scale_is_a_float_or_a_tensor(split):
    layer = Layer(33, 40, 48, 8, FP32, FP32)
    tile = replace(SMALL, split=split)

    def results(scale):
        db_tile = GradBTile(tile, tile, tile)
        y = linear.expand(
            layer.x, layer.w, None, layer.s, layer.b, layer.lora_bias, scale, replace(SMALL_GEMM, split=split)
        )
        return (*linear.grad_b(layer.dy, layer.b, layer.s, scale, db_tile), y)

    expected = results(SCALE)
    for scale in (torch.tensor(SCALE), torch.tensor(SCALE, dtype=torch.float64)):
        assert all(torch.equal(one, other) for one, other in zip(expected, results(scale), strict=True))


def test_grad_b_computes_what_is_wanted():
    layer = Layer(33, 40, 48, 8, BF16, FP32)
    tile = GradBTile(SMALL, SMALL, SMALL)
    ds, db = linear.grad_b(layer.dy, layer.b, layer.s, SCALE, GradBTile(None, SMALL, SMALL))
    only_ds = linear.grad_b(layer.dy, layer.b, None, SCALE, tile)
    only_db = linear.grad_b(layer.dy, None, layer.s, SCALE, tile, out_dtype=FP32)
    assert torch.equal(only_ds[0], ds)
    assert only_ds[1] is None
    assert torch.equal(only_db[1], db)
    assert only_db[0] is None


def test_biases_are_optional():
    layer = Layer(33, 40, 48, 8, FP32, FP32)
    base = layer.x @ layer.w.t() + SCALE * layer.s @ layer.b.t()
    for bias in (None, layer.bias):
        for lora_bias in (None, layer.lora_bias):
            more = (0 if bias is None else bias) + (0 if lora_bias is None else SCALE * lora_bias)
            y = linear.expand(layer.x, layer.w, bias, layer.s, layer.b, lora_bias, SCALE, SMALL_GEMM)
            torch.testing.assert_close(y, base + more)
            y = linear.lowrank_y(layer.s, layer.b, bias, lora_bias, SCALE, FP32, SMALL_LOWRANK)
            torch.testing.assert_close(y, base - layer.x @ layer.w.t() + more)


def test_strided_bias():
    layer = Layer(5, 40, 48, 8, FP32, FP32)
    expected = layer.ours("expand", SMALL_GEMM) + layer.ours("lowrank_y", SMALL_LOWRANK)
    layer.bias, layer.lora_bias = (arrange(t[:, None], "strided")[:, 0] for t in (layer.bias, layer.lora_bias))
    for one, other in zip(
        expected, layer.ours("expand", SMALL_GEMM) + layer.ours("lowrank_y", SMALL_LOWRANK), strict=True
    ):
        assert torch.equal(one, other)


@regimes
@pytest.mark.parametrize("sizes", [(0, 40, 48, 8), (5, 0, 48, 8), (5, 40, 0, 8)], ids=str)
def test_empty_dimensions(sizes, regime):
    layer = Layer(*sizes, *regime)
    tile = replace(SMALL, split=2)
    tiles = {"shrink": tile, "grad_a": tile, "grad_b": GradBTile(tile, tile, tile)}
    tiles |= dict.fromkeys(("expand", "grad_x"), replace(SMALL_GEMM, split=2))
    tiles |= dict.fromkeys(("lowrank_y", "lowrank_x"), SMALL_LOWRANK)
    for piece, tile in tiles.items():
        for ours, truth in zip(layer.ours(piece, tile), layer.truth(piece), strict=True):
            assert ours.shape == truth.shape
            torch.testing.assert_close(ours.double(), truth, rtol=0.05, atol=0.05)


def spread(t: Tensor, dim: int) -> Tensor:
    """The values of t with more than 2**31 elements between the first and the last along dim.

    Address space is reserved for them, but only the pages that hold values are touched.
    """
    step = 2**31 // (t.shape[dim] - 1) + 1
    step += -step % 16
    holder = torch.empty(step * (t.shape[dim] - 1) + t.shape[1 - dim], dtype=t.dtype)
    return holder.as_strided(t.shape, (step, 1) if dim == 0 else (1, step)).copy_(t)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("x", ["shrink", "grad_a", "expand"]),
        ("dy", ["grad_b", "grad_x"]),
        ("w", ["expand", "grad_x"]),
        ("a", ["shrink", "grad_x", "lowrank_x"]),
        ("b", ["grad_b", "expand", "lowrank_y"]),
    ],
)
def test_offsets_past_two_to_the_31(name, pieces, dim):
    tiles = {"grad_b": GradBTile(SMALL, SMALL, SMALL), "expand": SMALL_GEMM, "grad_x": SMALL_GEMM}
    tiles |= {"shrink": SMALL, "grad_a": SMALL} | dict.fromkeys(("lowrank_y", "lowrank_x"), SMALL_LOWRANK)
    layer = Layer(3, 40, 48, 8, BF16, BF16)
    expected = [layer.ours(piece, tiles[piece]) for piece in pieces]
    setattr(layer, name, spread(getattr(layer, name), dim))
    for piece, results in zip(pieces, expected, strict=True):
        for one, other in zip(results, layer.ours(piece, tiles[piece]), strict=True):
            assert torch.equal(one, other), piece


def test_the_same_bits_every_run():
    layer = Layer(65, 70, 90, 17, BF16, FP32, p=0.1)
    tile = replace(SMALL, split=3)
    for piece, chosen in (("shrink", tile), ("grad_a", tile), ("grad_b", GradBTile(tile, tile, tile))):
        for one, other in zip(layer.ours(piece, chosen), layer.ours(piece, chosen), strict=True):
            assert torch.equal(one, other)


def test_nothing_that_varies_between_calls_is_a_compile_time_constant():
    """A rank, scale, shape, seed or split that were constexpr would compile a kernel anew for each value."""
    kernels = [value for module in (skinny, gemm) for name, value in vars(module).items() if name.endswith("_kernel")]
    assert len(kernels) == 7
    for kernel in kernels:
        parameters = inspect.signature(kernel.fn).parameters.values()
        constants = {p.name for p in parameters if "constexpr" in str(p.annotation)}
        assert all(name.isupper() for name in constants)
        assert {p.name for p in parameters if p.name.isupper() and len(p.name) > 1} == constants
        assert not {"M", "N", "K", "P", "Q", "C", "R"} & constants
