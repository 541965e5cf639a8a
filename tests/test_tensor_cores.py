"""The accuracy rule with the arithmetic of tensor cores, which Triton's interpreter does not have.

The interpreter rounds every sum to nearest and multiplies float32 operands in full. A tensor core adds a few exact
products at a time to its accumulator and rounds towards zero (Fasi et al., 2021, doi:10.7717/peerj-cs.330), so a long
sum drifts; of a float32 operand of a tf32 product it cuts off 13 bits.
"""

import numpy as np
import pytest
from accuracy import Case, assert_as_accurate_as_plain
from triton._C.libtriton import ir
from triton.runtime import interpreter

_PRODUCTS = 16  # of bf16 and fp16 in one step of wgmma; fewer of tf32


def _towards_zero(t):
    """float64 rounded to float32 towards zero."""
    rounded = t.astype(np.float32)
    away = np.abs(rounded.astype(np.float64)) > np.abs(t)
    rounded[away] = np.nextafter(rounded[away], np.float32(0))
    return rounded


def _create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
    left, right, total = (np.asarray(t.data, np.float32) for t in (a, b, acc))
    if input_precision == ir.INPUT_PRECISION.TF32x3:  # Triton rounds these operands and adds each product apart
        return interpreter.TensorHandle(np.matmul(left, right) + total, acc.dtype.scalar)
    if input_precision == ir.INPUT_PRECISION.TF32:
        left, right = (
            (np.ascontiguousarray(t).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for t in (left, right)
        )
    for k in range(0, left.shape[-1], _PRODUCTS):
        step = left[:, k : k + _PRODUCTS].astype(np.float64) @ right[k : k + _PRODUCTS].astype(np.float64)
        total = _towards_zero(total.astype(np.float64) + step)
    return interpreter.TensorHandle(total, acc.dtype.scalar)


BETA1 = "triton:expand=beta1,grad_x=beta1"  # what a GPU's plan takes; the interpreter's takes the fused GEMMs
CASES = [
    *((strategy, shape) for strategy in ("triton", BETA1) for shape in ((1000, 39, 8), (33, 1032, 17))),
    *((strategy, shape) for strategy in ("triton", BETA1) for shape in ((200, 100, 1), (180, 70, 2))),
]


@pytest.mark.parametrize(("strategy", "shape"), CASES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("regime", ["bfloat16", "bfloat16+float32", "float16", "float16+float32"])
def test_the_rule_on_tensor_cores(regime, p, strategy, shape, monkeypatch):
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _create_dot)
    rows, K, R = shape
    assert_as_accurate_as_plain(Case((rows,), N=120, K=K, R=R, regime=regime, p=p, strategy=strategy))
