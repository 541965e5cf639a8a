"""Products with the rank among their sizes, cut into batches: the same sums as the plain products, to the last bit.

The factors are small whole numbers, so that float32 adds them up exactly in any order.
"""

import pytest
import torch

from fused_lora import blocks, rank_products
from fused_lora.rank_products import RowSum, add_product, narrow_product, row_sum, scaled_product

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL nothing is cut")
FP32, BF16 = torch.float32, torch.bfloat16


def whole_numbers(*shape, dtype=FP32):
    return torch.randint(-4, 5, shape).to(dtype)


def laid_out(t, layout):
    """t as "contiguous", "transposed" in memory, or "strided" inside something larger."""
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "strided":
        big = t.new_full((2 * t.shape[0], t.shape[1] + 3), torch.nan)
        big[::2, 3:] = t
        return big[::2, 3:]
    return t


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize(("rows", "rank"), [(256, 8), (40, 3), (1000, 8), (1000, 16), (259, 17), (256, 130), (700, 17)])
def test_add_product(rows, rank, layout):
    P = 2048
    t, f, y = whole_numbers(rows, rank), whole_numbers(rank, P), whole_numbers(rows, P)
    expected = y.double() + 2.0 * (t.double() @ f.double())
    assert torch.equal(add_product(y.clone(), laid_out(t, layout), laid_out(f, layout), alpha=2.0).double(), expected)


@pytest.mark.parametrize("rank", [8, 16, 40])
def test_what_is_not_kept_is_not_read(rank):
    t, f = whole_numbers(200, rank), whole_numbers(rank, 1024)
    free = torch.full((200, 1024), torch.nan)
    assert torch.equal(add_product(free, t, f, keep=False), t @ f)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("threads", [1, 2, 3])  # with several, blocks are cut by rows where they are high enough
@pytest.mark.parametrize("K", [5, 2048, 784, 1100, 2049, 67 * 64])
def test_row_sum(monkeypatch, K, threads, layout):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    t, x = whole_numbers(700, 12), whole_numbers(700, K)
    total = RowSum(12, x, FP32, FP32)
    for i, j in ((0, 1), (1, 129), (129, 131), (131, 700)):
        total.add(t[i:j], laid_out(x[i:j], layout))
    assert torch.equal(total.total(), t.t() @ x)
    assert torch.equal(total.turned(), x.t() @ t)
    assert total.total().is_contiguous()
    assert total.turned().is_contiguous()
    assert torch.equal(row_sum(t, laid_out(x, layout)).total(), t.t() @ x)


def test_row_sum_of_a_lower_dtype_and_of_no_rows():
    t, x = whole_numbers(300, 12, dtype=BF16), whole_numbers(300, 2048, dtype=BF16)
    total = RowSum(12, x, FP32, BF16)
    total.add(t[:150], x[:150])
    total.add(t[150:], x[150:])
    halves = [(t[i : i + 150].t() @ x[i : i + 150]).float() for i in (0, 150)]
    assert torch.equal(total.total(), halves[0] + halves[1])
    cut = RowSum(12, x.float(), FP32, FP32, in_blocks=False)
    for rows in (0, 300):
        cut.add(t[:rows].float(), x[:rows].float())
    assert torch.equal(cut.total(), t.float().t() @ x.float())
    none = RowSum(12, x, FP32, FP32)
    assert torch.equal(none.total(), torch.zeros(12, 2048))
    assert torch.equal(none.turned(), torch.zeros(2048, 12))


# Inside the product; not where float32 makes it 0, nor where it is a tensor.
SCALES = {"inside": 2.0, "zero": 0.0, "subnormal": 2.0**-140, "tensor": torch.tensor(2.0)}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("K", "dtype"), [(2048, FP32), (40, FP32), (40, BF16)])  # cut, whole, of a lower dtype
def test_a_scaled_row_sum(K, dtype, scale):
    t, x = whole_numbers(300, 12, dtype=dtype).sign(), whole_numbers(300, K, dtype=dtype).sign()
    total = RowSum(12, x, FP32, dtype, SCALES[scale])
    for i, j in ((0, 128), (128, 129), (129, 300)):
        total.add(t[i:j], x[i:j])
    expected = (t.double().t() @ x.double()).float() * SCALES[scale]
    assert torch.equal(total.total(), expected)
    assert torch.equal(total.turned(), expected.t())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("rows", [20, 512])  # the second, in bfloat16, is turned
def test_a_scaled_product(rows, dtype, scale):
    x, f = whole_numbers(rows, 2048, dtype=dtype).sign(), torch.zeros(2048, 8, dtype=dtype)
    f[::128] = whole_numbers(16, 8, dtype=dtype)
    expected = (x.double() @ f.double()).to(dtype) * SCALES[scale]
    assert torch.equal(scaled_product(x, f, SCALES[scale]), expected)
    out = torch.full((rows, 8), torch.nan, dtype=dtype)
    assert scaled_product(x, f, SCALES[scale], out=out) is out
    assert torch.equal(out, expected)


def test_inf_is_not_lost_to_a_scale_of_zero():
    x = torch.full((3, 5), torch.inf)
    assert scaled_product(x, torch.ones(5, 2), 0.0).isnan().all()
    assert row_sum(torch.ones(3, 2), x, 0.0).total().isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("rank", [1, 8, 32, 33])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_narrow_product(rank, alpha, layout):
    """Large enough to be turned; the whole numbers of the result fit into bfloat16."""
    x, f = whole_numbers(512, 2048, dtype=BF16).sign(), torch.zeros(2048, rank, dtype=BF16)
    f[::128] = whole_numbers(16, rank, dtype=BF16)
    found = narrow_product(laid_out(x, layout), laid_out(f, layout), alpha)
    assert torch.equal(found.double(), alpha * (x.double() @ f.double()))
    assert found.is_contiguous()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_bfloat16_halves_hold_sixteen_bits_of_a_factor(dtype, turned, monkeypatch):
    """A missing half would stay below the accuracy rule: it costs y no more than another rounding. As on a GPU, where a
    float32 t beside a bfloat16 f is split too."""
    monkeypatch.setattr(blocks, "on_cpu", lambda t: False)
    t, f = 0.5 + torch.rand(40, 3), (0.5 + torch.rand(3, 50)).to(dtype)
    left, right = rank_products._rank_factors(t, laid_out(f, "transposed") if turned else f, BF16)
    assert left.dtype == right.dtype == BF16
    torch.testing.assert_close(left.double() @ right.double(), t.double() @ f.double(), rtol=2.0**-14, atol=0.0)


@pytest.mark.parametrize(("rows", "rank"), [(40, 3), (600, 33)])
def test_float32_factors_of_a_bfloat16_result_are_rounded_with_it(rows, rank):
    t, f, y = torch.randn(rows, rank), torch.randn(rank, 1024), torch.randn(rows, 1024).to(BF16)
    expected = torch.addmm(y.double(), t.double(), f.double(), alpha=2.0)
    error = (add_product(y.clone(), t, f, alpha=2.0).double() - expected).abs()
    assert (error <= 2.0**-8 * expected.abs() + 1e-4).all()  # one rounding, and float32's errors where terms cancel


def test_which_products_are_cut(monkeypatch):
    x = torch.empty(64, 2048)
    assert [rank_products._column_parts(K) for K in (0, 64, 784, 2048, 11008, 2049)] == [1, 1, 7, 16, 86, 1]

    def parts(x, rank=8, dtype=FP32, **how):
        total = RowSum(rank, x, dtype, dtype, **how)
        return total._row_parts, total._column_parts

    assert parts(x) == (1, 16)
    assert parts(x[:8]) == (1, 1)  # few elements
    assert parts(x.double(), dtype=torch.float64) == (1, 1)
    assert parts(x.to(BF16), dtype=BF16) == (1, 1)
    blocks = torch.empty(257, 2048)  # blocks of 256 rows
    for threads, by_rows in ((1, 1), (2, 2), (8, 8), (9, 1)):  # a part has at least 32 rows
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert parts(blocks) == (by_rows, 1 if by_rows > 1 else 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert parts(blocks[:256]) == parts(blocks, in_blocks=False) == (1, 16)  # one block; what no block is written for
    assert parts(blocks, rank=32) == (2, 1)
    assert parts(blocks, rank=33) == (1, 16)
