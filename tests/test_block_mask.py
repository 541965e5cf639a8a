"""The mask as the torch strategy applies it to blocks of rows (``dropout.BlockMask``): the bits of ``keep_mask``."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from fused_lora import blocks, dropout, lora_linear, rank_products
from fused_lora.dropout import GROUP, BlockMask, keep_mask


def applied(mask: BlockMask, start: int, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    block = torch.ones(rows, cols, dtype=dtype)
    return mask.zero_dropped(block, mask.hashes(start, rows))


@pytest.fixture(params=["numpy", "torch"])
def maker(request, monkeypatch):
    """What makes a small mask: numpy, or torch, as where there is no numpy."""
    if request.param == "torch":
        monkeypatch.setattr(dropout, "_numpy", lambda: None)
        dropout._small_dropped.cache_clear()  # what numpy made before
    yield request.param
    dropout._small_dropped.cache_clear()


@pytest.mark.parametrize("seed", [0, 123456789, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("rows", [1, 7, 16, 256, 257])
def test_the_words_of_a_few_rows_are_those_of_many(rows, seed, maker):
    mask = BlockMask(torch.tensor(seed), rows, 40, 0.3)
    assert torch.equal(applied(mask, 0, rows, 40, torch.float32) == 1, keep_mask(seed, 512, 40, 0.3)[:rows])


@pytest.mark.parametrize("seed", [0, 123456789, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("groups", [1, 2, 31, 1024])
def test_the_words_in_one_large_integer(groups, seed):
    for found, expected in zip(dropout._kept_keys(seed, groups), dropout._group_keys(seed, groups), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("start", "rows"), [(0, 50), (0, 8), (3, 2), (5, 9), (13, 37), (49, 1), (50, 0)])
def test_any_block_of_the_mask_is_that_part_of_the_whole(start, rows, dtype, maker):
    """Also where a block begins or ends inside a group of rows."""
    mask = BlockMask(torch.tensor(21), 50, 33, 0.4)
    whole = keep_mask(21, 50, 33, 0.4)
    for _ in range(2):
        assert torch.equal(applied(mask, start, rows, 33, dtype), whole[start : start + rows].to(dtype))


def test_zeroing_takes_inf_and_nan_and_a_copy_leaves_the_block_alone(maker):
    mask, keep = BlockMask(torch.tensor(4), 24, 16, 0.5), keep_mask(4, 24, 16, 0.5)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for value in (3.0, math.inf, -math.inf, math.nan, -0.0):
            block = torch.full((24, 16), value, dtype=dtype)
            expected = torch.where(keep, block, 0).double()
            np.testing.assert_array_equal(mask.dropped(block, mask.hashes(0, 24)).double(), expected)
            np.testing.assert_array_equal(block.double(), torch.full((24, 16), value).double())
            assert mask.zero_dropped(block, mask.hashes(0, 24)) is block
            np.testing.assert_array_equal(block.double(), expected)


@pytest.mark.parametrize("rows", [5, 100, 300])
def test_the_ambient_default_device_decides_nothing(rows):
    args = (torch.randn(rows, 100), torch.randn(10, 100), torch.randn(4, 100), torch.randn(10, 4), 2.0)
    expected = lora_linear(*args, dropout_p=0.5, seed=1)
    seed = torch.tensor(1)
    with torch.device("meta"):
        assert torch.equal(lora_linear(*args, dropout_p=0.5, seed=seed), expected)


def test_numpy_that_torch_was_not_built_for(monkeypatch):
    def refuse(array):
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch, "from_numpy", refuse)
    dropout._numpy.cache_clear()
    dropout._small_dropped.cache_clear()
    try:
        mask = BlockMask(torch.tensor(3), 5, 7, 0.5)
        assert torch.equal(applied(mask, 0, 5, 7, torch.float32) == 1, keep_mask(3, 5, 7, 0.5))
    finally:
        monkeypatch.undo()
        dropout._numpy.cache_clear()
        dropout._small_dropped.cache_clear()


@pytest.mark.parametrize(("rows", "cols"), [(20, 40), (90, 100)])  # a small mask, one of few groups
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_forward_leaves_for_its_backward_is_only_read(rows, cols, dtype):
    """The same seed again, with other rows or another p between, in place and not."""
    for p, part in ((0.3, 0), (0.3, 3), (0.5, 0), (0.3, 0)):
        expected = keep_mask(77, rows - part, cols, p)
        for _ in range(2):
            mask, block = BlockMask(torch.tensor(77), rows - part, cols, p), torch.ones(rows - part, cols, dtype=dtype)
            assert torch.equal(mask.dropped(block, mask.hashes(0, len(block))) == 1, expected)
            mask.zero_dropped(block, mask.hashes(0, len(block)))
            assert torch.equal(block == 1, expected)


def test_a_block_of_rows_has_whole_groups():
    assert blocks.ROWS % GROUP == 0
    for columns in (1, 1000, 4096, 1 << 20):
        starts = [start for start, _ in blocks.row_blocks(torch.empty(3000, columns, device="meta"))]
        assert all(start % GROUP == 0 for start in starts)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 31, 32, 33, 47, 48])
def test_blocks_of_rows_cover_all_and_none_but_the_only_one_is_small(rows, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", 16 * 5)
    t = torch.empty(rows, 5)
    found = list(blocks.row_blocks(t))
    assert [row for i, j in found for row in range(i, j)] == list(range(rows))
    assert len(found) <= 1 or all(j - i >= blocks.ROWS for i, j in found)
    assert max([j - i for i, j in found], default=0) <= len(blocks.memory_for(t, torch.float64))


@pytest.mark.parametrize(("rows", "cols"), [(1, 8000), (9, 900)])
def test_a_small_mask_is_kept_without_the_rest_of_its_group(rows, cols):
    kept = dropout._small_dropped(5, rows, cols, 0.3)
    while kept.base is not None:
        kept = kept.base
    assert kept.nbytes == rows * cols


def test_numpy_is_found_under_fake_tensors():
    dropout._numpy.cache_clear()
    with FakeTensorMode():
        assert dropout._numpy() is not None


def test_no_copy_from_the_host_beside_a_cpu(monkeypatch):
    """A GPU would be waited for, and no CUDA graph captured: meta stands in for it."""
    seed = torch.empty((), dtype=torch.int64, device="meta")

    def refuse(*args, **kwargs):
        raise AssertionError("a copy from the host")

    for name in ("tensor", "as_tensor", "from_numpy", "frombuffer"):
        monkeypatch.setattr(torch, name, refuse)
    mask = BlockMask(seed, 100, 64, 0.5)
    block = torch.empty(40, 64, device="meta")
    assert mask.zero_dropped(block, mask.hashes(16, 40)).shape == (40, 64)
    assert keep_mask(seed, 100, 64, 0.5).shape == (100, 64)


def test_the_factors_of_the_rows_are_powers_of_the_step():
    expected = [dropout.MIX2 * dropout.STEP**j % 2**32 for j in range(dropout.GROUP)]
    assert (dropout._row_factors(torch.device("cpu")).flatten().long() & 0xFFFFFFFF).tolist() == expected


@pytest.mark.parametrize(("rows", "cols"), [(300, 92), (17, 61)])  # the second mask is small
def test_fake_tensors_are_not_kept_for_real_calls(rows, cols):
    args = (torch.randn(rows, cols), torch.randn(10, cols), torch.randn(4, cols), torch.randn(10, 4), 2.0)
    seed = torch.tensor(4)
    expected = lora_linear(*args, dropout_p=0.5, seed=seed)
    for kept in ("cpu_constants", "cpu_number", "cpu_shifts", "kept_keys", "numpy_constants", "small_dropped"):
        getattr(dropout, f"_{kept}").cache_clear()
    rank_products._one_element.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        lora_linear(*args, dropout_p=0.5, seed=torch.tensor(4))
    assert torch.equal(lora_linear(*args, dropout_p=0.5, seed=seed), expected)
