"""DoRA in LoRALinear: the definition, its life as a LoRA layer, and PEFT's DoRA adapters in and out.

x (..., K)   weight (N, K), of a Conv1D (K, N)   lora_a (R, K)   lora_b (N, R)   magnitude (N,)   y (..., N)
"""

import copy
import io

import adapter_nets as nets
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fused_lora import (
    AdapterError,
    LoRAConfig,
    LoRALinear,
    apply_lora,
    check_adapter,
    count_parameters,
    load_adapter,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_adapter,
)
from fused_lora.adapter_files import WEIGHTS_FILE
from fused_lora.convert import to_loralib
from fused_lora.tasks import Model

K, N, R = 13, 9, 4
LINEAR = ["up", "down", "turned"]
BASES = {"linear": lambda: nn.Linear(K, N), "no-bias": lambda: nn.Linear(K, N, False), "conv1d": lambda: Conv1D(N, K)}


@pytest.fixture(params=BASES)
def base(request):
    torch.manual_seed(0)
    return BASES[request.param]().double()


def trained(base, **settings):
    layer = LoRALinear.from_linear(base, r=R, use_dora=True, **settings)
    with torch.no_grad():
        layer.lora_b.normal_(std=0.3)
        layer.magnitude.mul_(1 + torch.rand(N, dtype=layer.magnitude.dtype))
    return layer


def definition(layer, x, a=None, b=None, magnitude=None):
    """The formula with ΔW built, differentiable; the norm is a constant."""
    a, b = layer.lora_a if a is None else a, layer.lora_b if b is None else b
    magnitude = layer.magnitude if magnitude is None else magnitude
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    total = weight + layer.scale * b @ a
    return F.linear(x, total * (magnitude / total.detach().norm(dim=1))[:, None], layer.bias)


def test_it_starts_as_its_base(base):
    x = torch.randn(3, 5, K).double()
    expected = base(x)
    layer = LoRALinear.from_linear(base, r=R, use_dora=True)
    torch.testing.assert_close(layer(x), expected)
    assert layer.magnitude.shape == (N,)
    assert "use_dora=True" in repr(layer)
    assert LoRALinear(K, N, use_dora=True).magnitude is not None
    assert LoRALinear(K, N).magnitude is None
    assert "magnitude" not in LoRALinear(K, N).state_dict()


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (0,)])
def test_forward_and_gradients(base, lead):
    layer = trained(base)
    x = torch.randn(*lead, K).double().requires_grad_()
    dy = torch.randn(*lead, N).double()
    leaves = (x, *layer.trained())
    results = [torch.autograd.grad(y, leaves, dy) for y in (layer(x), definition(layer, x))]
    torch.testing.assert_close(layer(x), definition(layer, x))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth)


def test_compile_and_functorch(base):
    torch._dynamo.reset()
    layer = trained(base)
    x = torch.randn(4, K).double()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), definition(layer, x))
    compiled(x).sum().backward()
    got = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    assert set(got) == {"lora_a", "lora_b", "magnitude"}
    for name, grad in got.items():

        def loss(value, name=name):
            return torch.func.functional_call(layer, {name: value}, (x,)).sum()

        torch.testing.assert_close(torch.func.grad(loss)(getattr(layer, name).detach()), grad)
    layer.set_scale(0.3)
    torch.testing.assert_close(compiled(x), definition(layer, x))


def test_dropout_drops_for_the_base_too_as_in_peft():
    torch.manual_seed(0)
    layer = trained(nn.Linear(K, N).double(), lora_dropout=0.5)
    x = torch.randn(4000, K).double()
    mean = layer(x) - definition(layer, x)
    assert mean.abs().max() > 0.1  # it does drop
    assert mean.mean(0).abs().max() < 5 * mean.std(0).max() / 4000**0.5
    layer.eval()
    torch.testing.assert_close(layer(x), definition(layer, x))


def test_merge_and_the_ways_back(base):
    layer = trained(base)
    x = torch.randn(6, K).double()
    y = layer(x)
    weight = layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(x), y)
    with torch.no_grad():
        layer.magnitude.mul_(2)  # noticed, as a change of a factor is
    torch.testing.assert_close(layer(x), definition(layer, x))
    layer.unmerge()
    for plain in (layer.to_linear(), layer.to_base()):
        torch.testing.assert_close(plain(x), definition(layer, x))
    assert torch.equal(layer.weight, weight)
    layer.enabled = False
    torch.testing.assert_close(layer(x), base(x))


def test_copies_and_state_dicts(base):
    layer = trained(base)
    x = torch.randn(6, K).double()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for copied in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(copied(x), layer(x))
    other = LoRALinear.from_linear(copy.deepcopy(base), r=R, use_dora=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    layer.reset_lora_parameters()
    torch.testing.assert_close(layer(x), base(x))
    assert layer.float()(x.float()).dtype == torch.float32


def test_apply_lora():
    model = nets.make_net(torch.float64)
    with torch.no_grad():
        expected = model(nets.IDS)
    before = count_parameters(model).total
    apply_lora(model, LoRAConfig(r=2, target_modules=LINEAR, use_dora=True))
    layers = dict(lora_layers(model))
    torch.testing.assert_close(model(nets.IDS), expected)
    added = sum(p.numel() for layer in layers.values() for p in layer.trained())
    assert count_parameters(model) == (before + added, added, added)
    assert sum(p.numel() for p in lora_parameters(model)) == added
    nets.train(model)
    y = model(nets.IDS)
    torch.testing.assert_close(merge_lora(copy.deepcopy(model))(nets.IDS), y)
    assert torch.equal(remove_lora(model)(nets.IDS), expected)


@pytest.mark.parametrize("targets", [["embed"], ["conv2", "up"]])
def test_layers_that_are_not_linear(targets):
    net = nets.make_net()
    with pytest.raises(ValueError, match=f"{targets[0]} is a .*use_dora is for linear layers"):
        apply_lora(net, LoRAConfig(target_modules=targets, use_dora=True))
    assert not list(lora_layers(net))
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(TypeError, match="use_dora"):
        Model(net, use_dora=True)


# ---- PEFT's files

SETTINGS = {
    "plain": {},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"down": 2}, "alpha_pattern": {"^up": 3}},
    "transposed": {"target_modules": ["turned"], "fan_in_fan_out": True},
    "dropout and biases": {"lora_dropout": 0.2, "bias": "all"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_from_peft_and_back(tmp_path, settings):
    peft = nets.peft_model(use_dora=True, **{"target_modules": LINEAR} | settings)
    first = nets.save_peft(peft, tmp_path / "peft")
    model = load_adapter(nets.make_net(), first)
    nets.assert_same_outputs(model, peft)
    second = save_adapter(model, tmp_path / "ours")
    one, two = load_file(first / WEIGHTS_FILE), load_file(second / WEIGHTS_FILE)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    again = nets.load_peft(second)
    with torch.no_grad():
        assert torch.equal(again(nets.IDS), peft(nets.IDS))
    for against in (None, nets.make_net(), model, peft):
        assert check_adapter(second, against).ok


def test_what_does_not_fit(tmp_path):
    folder = nets.save_peft(nets.peft_model(use_dora=True, target_modules=LINEAR), tmp_path / "peft")
    plain = apply_lora(nets.make_net(), LoRAConfig(r=4, lora_alpha=6, target_modules=LINEAR))
    for model, task, words in (
        (plain, None, "use_dora is True in the config, False in the model"),
        (Model(nets.make_net()), "a", "use_dora goes with apply_lora, not with tasks"),
    ):
        with pytest.raises(AdapterError, match=words):
            load_adapter(model, folder, task=task)
    for targets in ("embed", "conv2"):
        other = nets.save_peft(nets.peft_model(use_dora=True, target_modules=[targets]), tmp_path / targets)
        with pytest.raises(AdapterError, match=r"linear layers only.*patch_peft"):
            load_adapter(nets.make_net(), other)
    with pytest.raises(AdapterError, match="DoRA is not converted"):
        to_loralib(load_adapter(nets.make_net(), folder), lora_alpha=6)
    net = nets.make_net()
    net.up = LoRALinear.from_linear(net.up, use_dora=True)
    net.turned = LoRALinear.from_linear(net.turned)
    with pytest.raises(AdapterError, match="some layers use DoRA and some do not"):
        save_adapter(net, tmp_path / "mixed", modules_to_save=[])
