"""LoRA layers where others reach into them: autocast, parametrized factors, computed weights, loaders, a thawed base.

x (..., K)   weight (N, K)   lora_a (R, K)   lora_b (N, R)   y (..., N)
"""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from fused_lora import LoRAConv1d, LoRAEmbedding, LoRALinear

K, N, R = 12, 7, 3
MAKE = {
    "linear": lambda: LoRALinear(K, N, r=R, init_lora_weights=False),
    "dora": lambda: LoRALinear(K, N, r=R, init_lora_weights=False, use_dora=True),
    "embedding": lambda: LoRAEmbedding(K, N, r=R, init_lora_weights=False),
    "convolution": lambda: LoRAConv1d(K, N, 1, r=R, init_lora_weights=False),
}
KINDS = list(MAKE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def input_of(layer):
    if isinstance(layer, LoRAEmbedding):
        return torch.arange(K)
    shape = (5, K, 4) if isinstance(layer, LoRAConv1d) else (5, K)
    return torch.randn(shape, dtype=layer.weight.dtype)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, t):
        return t * self.factor


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_no_update(kind, dtype):
    layer = MAKE[kind]()
    wanted = layer.delta_weight()
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(layer.delta_weight(), wanted)
