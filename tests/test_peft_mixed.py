"""Mixed batches through ``adapter_names``: fused without gradients, PEFT's forward otherwise.

x (samples, ..., K): sample i uses adapter names[i], "__base__" uses none.
"""

import copy

import pytest
import torch
from peft_models import K, layers, patched_copy, peft_model

from fused_lora.peft_parts import route_mixed

X = torch.randn(7, K, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def mixed_model():
    model = peft_model(adapters=3, train=False, lora_bias=True)
    model.set_adapter("default")
    return model


MIXES = {
    "sorted": ["default"] * 2 + ["__base__"] + ["other"] * 4,
    "shuffled": ["other", "__base__", "default", "third", "default", "other", "__base__"],
    "one": ["third"] * 7,
    "base": ["__base__"] * 7,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(7,), (7, 3), (7, 2, 3)], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_mixed_batches(mix, lead, dtype):
    x, model, names = torch.randn(*lead, K).to(dtype), mixed_model(), MIXES[mix]
    for layer in layers(model):
        layer.base_layer.to(dtype)  # the adapters stay in float32
    ours, _ = patched_copy(model)
    with torch.no_grad():
        expected, result = model(x, adapter_names=names), ours(x, adapter_names=names)
        truth = copy.deepcopy(model).double()(x.double(), adapter_names=names)
        fused = not isinstance(route_mixed(layers(ours)[0], x, names), str)
    assert fused == (mix != "base")  # where PEFT too runs the base layer alone
    assert result.dtype == expected.dtype
    for norm in (torch.max, lambda errors: errors.square().mean()):
        assert norm((result - truth).abs()) <= 2 * norm((expected - truth).abs())


def test_mixed_batches_keep_adapters_apart():
    """A broken adapter reaches its own samples only."""
    model = mixed_model()
    ours, _ = patched_copy(model)
    for layer in layers(ours):
        layer.lora_B["other"].weight.data.fill_(torch.nan)
    with torch.no_grad():
        broken = ours(X, adapter_names=MIXES["shuffled"]).isnan().any(1)
    assert broken.tolist() == [name == "other" for name in MIXES["shuffled"]]


def test_mixed_batches_that_peft_must_decide():
    model = mixed_model()
    ours, _ = patched_copy(model)
    names = MIXES["shuffled"]
    assert torch.equal(ours(X, adapter_names=names), model(X, adapter_names=names))  # gradients are on
    for wrong in (names[:3], [*names[:-1], "nobody"]):
        messages = []
        for m in (model, ours):
            with torch.no_grad(), pytest.raises(ValueError) as raised:
                m(X, adapter_names=wrong)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    ours.train()
    with pytest.raises(ValueError, match="training mode"):
        ours(X, adapter_names=names)
