"""What conftest.py does to uninitialised memory reaches the package, and nothing else."""

import pytest
import torch

import fused_lora
from fused_lora import pieces


def allocate(*arguments):
    """torch.empty called by the package."""
    return eval("torch.empty(*arguments)", {"__name__": pieces.__name__, "torch": torch, "arguments": arguments})


def test_what_the_package_allocates_is_poison():
    assert allocate(3).isnan().all()
    assert not torch.zeros(3).isnan().any()


@pytest.mark.parametrize("make", [torch.empty, allocate], ids=["elsewhere", "in the package"])
def test_a_device_as_a_context_is_obeyed(make):
    with torch.device("meta"):
        assert make(2, 3).is_meta
    assert not make(2, 3).is_meta


def test_a_layer_made_under_a_device_is_on_it():
    with torch.device("meta"):
        layer = fused_lora.LoRALinear(4, 4)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
