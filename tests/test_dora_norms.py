"""What DoRA keeps of ‖W + scale · B A‖ from call to call, in LoRALinear and in a patched PEFT layer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import K, layers, patched_copy, peft_model
from torch import nn

from fused_lora import LoRALinear
from fused_lora.dora import Norms, row_norms


def a_lora_linear():
    torch.manual_seed(0)
    layer = LoRALinear.from_linear(nn.Linear(K, 45), r=4, use_dora=True)
    nn.init.normal_(layer.lora_b, std=0.2)
    return layer, None


def a_patched_layer(dtype=torch.float32):
    model = peft_model(use_dora=True, train=False, dtype=dtype)
    return patched_copy(model)[0], model


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("make", [a_lora_linear, a_patched_layer])
def test_an_evaluation_in_inference_mode_before_a_training_step(make, p):
    ours, model = make()
    for m in (ours, model):
        for layer in m.modules() if m is not None else ():
            if isinstance(layer, nn.Dropout):
                layer.p = p
    x = torch.randn(5, K)
    with torch.inference_mode():
        before = ours(x)
    y = ours(x)
    y.square().sum().backward()
    assert torch.equal(before, y)
    assert all(parameter.grad is not None for parameter in ours.parameters() if parameter.requires_grad)


def changed(layer):
    return layer.base_layer.weight * 2


def through_data(layer):
    layer.base_layer.weight.data = changed(layer)


def assigned(layer):
    state = {"weight": changed(layer).detach(), "bias": layer.base_layer.bias.detach()}
    layer.base_layer.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [through_data, assigned])
def test_a_new_weight_in_memory_that_was_freed(change):
    """Twice: the second weight is likely to get the address of the first."""
    patched, model = a_patched_layer(torch.float64)
    x = torch.randn(5, K).double()
    with torch.no_grad():
        for _ in range(4):
            patched(x)
            for m in (patched, model):
                for _ in range(2):
                    change(layers(m)[0])
            torch.testing.assert_close(patched(x), model(x))


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_an_initialization_that_changes_the_frozen_weight(init):
    """PEFT writes W through ``.data`` when it adds such an adapter."""
    patched, model = a_patched_layer()
    x = torch.randn(5, K)
    patched(x)
    for m in (patched, model):
        torch.manual_seed(1)
        m.add_adapter("b", LoraConfig(r=4, target_modules=["q", "k", "v"], init_lora_weights=init))
    torch.testing.assert_close(patched(x), model(x))


def test_a_weight_that_counts_no_versions():
    with torch.inference_mode():
        weight, a, b = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
        norms = Norms()
        for _ in range(2):
            torch.testing.assert_close(norms(weight, a, b, 2.0, torch.float32), row_norms(weight, a, b, 2.0))
            weight.mul_(3)


def test_nothing_of_a_weight_is_kept_alive():
    norms, weight = Norms(), torch.randn(6, 8)
    norms(weight, torch.randn(2, 8), torch.randn(6, 2), 2.0, torch.float32)
    memory = norms._weight_key[0]
    assert not memory.expired()
    del weight
    assert memory.expired()


def test_what_another_layer_takes_out_of_a_shared_weight():
    """PEFT does so inside a forward, where that layer is disabled, through ``.data``: no version tells of it."""
    base = nn.ModuleDict({"one": nn.Linear(K, 45, bias=False), "two": nn.Linear(K, 45, bias=False)})
    base["two"].weight = base["one"].weight
    base.forward = lambda x: base["one"](x) + base["two"](x)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["one"]))
    model.add_adapter("dora", LoraConfig(r=4, target_modules=["two"], use_dora=True))
    model.base_model.set_adapter(["default", "dora"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    ours, plain = patched_copy(model)[0], model
    x = torch.randn(5, K)
    for m in (ours, plain):
        m(x)
        m.merge_adapter(["default"])
        m(x)
        with m.disable_adapter():
            m(x)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
