"""DoRA where something stands around the layer: in-place work on its output, transforms over its backward, autocast,
meta tensors, no rows or features at all, selective checkpointing.

x (..., K)   weight (N, K)   lora_a (R, K)   lora_b (N, R)   magnitude (N,)   y (..., N)
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fused_lora import LoRALinear

K, N, R = 13, 9, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(dtype=torch.float64, **settings):
    layer = LoRALinear(K, N, r=R, use_dora=True, dtype=dtype, **settings)
    with torch.no_grad():
        layer.lora_b.normal_(std=0.3)
        layer.magnitude.mul_(1.5)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_under_autocast(dtype):
    layer = make(dtype)
    wanted = layer._row_norms()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer._row_norms(), wanted)
        layer.reset_lora_parameters(False)
    assert torch.equal(layer.magnitude, layer._row_norms())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lead", [(6,), (2, 3)])
def test_meta(lead, p):
    layer = LoRALinear(K, N, r=R, use_dora=True, lora_dropout=p, device="meta")
    x = torch.randn(*lead, K, device="meta", requires_grad=True)
    y = layer(x)
    assert (y.device.type, y.shape) == ("meta", (*lead, N))
    y.sum().backward()
    assert all(t.grad.shape == t.shape for t in (x, *layer.trained()))
