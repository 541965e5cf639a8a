"""What apply_lora refuses, by name and with the fix, and that a refusal changes nothing."""

import re
import warnings

import pytest
import torch
from nets import EVERYTHING, assert_unchanged, config, make_net, snapshot
from peft import LoraConfig, get_peft_model
from torch import nn

from fused_lora import apply_lora, lora_layers, lora_report, merge_lora, remove_lora
from fused_lora.tasks import Model


@pytest.fixture
def net():
    return make_net()


def forward_patched(net):
    net.alias.forward = net.alias.forward


def weight_normed(net):
    torch.nn.utils.weight_norm(net.alias)


def parametrized(net):
    nn.utils.parametrize.register_parametrization(net.alias, "weight", nn.Identity())


def spectral(net):
    torch.nn.utils.spectral_norm(net.alias)


def complex_weight(net):
    net.alias.weight = nn.Parameter(torch.zeros(12, 8, dtype=torch.complex64))


def state_hooked(net):
    net.alias.register_state_dict_post_hook(lambda *args: None)


def clipped(net):
    net.embed.max_norm = 1.0


class OtherLinear(nn.Linear):
    pass


def subclassed(net):
    net.blocks[1].down = OtherLinear(12, 8)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"targets": ["upp"]}, "matches none of the 15 modules; near names: up"),
            ({"targets": ["block.0.up"]}, "near names: blocks.0.up, blocks.1.up, blocks.2.up"),
            ({"targets": ["xyz"]}, "names that can get LoRA end in: alias, conv, down, embed, head, up"),
            ({"targets": "u"}, "target_modules 'u' matches none of the 15 modules; near names: up"),
            ({"targets": ["up"], "exclude_modules": ["up"]}, "matches none of the 15 modules once exclude_modules is"),
            ({"targets": ["up"], "layers_to_transform": 7, "layers_pattern": "blocks"}, "in layers_to_transform=(7,)"),
            ({"targets": ["norm"]}, "norm cannot get LoRA: it is a LayerNorm. Supported are Linear, Conv1D of trans"),
            ({"targets": ["blocks.1"]}, "blocks.1 cannot get LoRA: it is a Block"),
            ({"targets": [*EVERYTHING, "norm"]}, "leave others out with exclude_modules=['norm']"),
            ({"rank_pattern": {"conv": 3}, "conv_groups": 2}, "layer 'conv': r=3 is not a multiple of groups=2"),
        ],
    )
    def test_config_that_does_not_fit(self, net, settings, words):
        if settings.pop("conv_groups", None):
            net.conv = nn.Conv2d(2, 8, 3, groups=2)
        before = snapshot(net)
        with pytest.raises(ValueError, match=re.escape(words)):
            apply_lora(net, config(**settings))
        assert_unchanged(net, before)

    @pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
    @pytest.mark.parametrize(
        ("prepare", "words"),
        [
            (forward_patched, "blocks.1.up cannot get LoRA: its forward was replaced on this one object"),
            (weight_normed, "its weight is computed from other tensors (weight_g, weight_v)"),
            (spectral, "its weight is computed from other tensors"),
            (parametrized, "it is a ParametrizedLinear, a Linear whose forward may do something else"),
            (complex_weight, "its weight is a Parameter of torch.complex64"),
            (state_hooked, "it has hooks on its state dict"),
            (clipped, "embed cannot get LoRA: it has max_norm or sparse set"),
            (subclassed, "blocks.1.down cannot get LoRA: it is a OtherLinear, a Linear whose forward may do something"),
            (lambda net: net.double().to(torch.float8_e4m3fn), "embed (and 6 more) cannot get LoRA"),
        ],
    )
    def test_layers_that_would_lose_something(self, net, prepare, words):
        prepare(net)
        before = snapshot(net) if prepare is not spectral else None  # it changes its own state when read
        with pytest.raises(ValueError, match=re.escape(words)):
            apply_lora(net, config())
        assert not list(lora_layers(net))
        if before is not None and next(net.parameters()).dtype == torch.float32:
            assert_unchanged(net, before)

    def test_twice(self, net):
        apply_lora(net, config(["up"]))
        before = snapshot(net)
        for targets in (["up"], ["down"]):
            with pytest.raises(ValueError, match=r"blocks\.0\.up is a LoRALinear already: put all targets into one"):
                apply_lora(net, config(targets))
        with pytest.raises(ValueError, match="the model is a LoRALinear already"):
            apply_lora(net.alias, config(["up"]))
        assert_unchanged(net, before)

    @pytest.mark.parametrize("targets", [["blocks.1.down"], "all-linear"], ids=str)
    def test_over_peft(self, net, targets):
        peft_model = get_peft_model(net, LoraConfig(target_modules=["blocks.0.up"], r=2))
        for wrap in (lambda: apply_lora(peft_model, config(targets)), lambda: Model(peft_model)):
            with pytest.raises(ValueError, match=r"blocks\.0\.up is a Linear of PEFT already: patch_peft runs a PEFT"):
                wrap()
        assert not list(lora_layers(peft_model))
        apply_lora(peft_model.unload(), config(targets))

    def test_a_single_layer_and_nothing_to_take(self):
        with pytest.raises(ValueError, match=r"The model itself is one layer: use LoRALinear\.from_linear"):
            apply_lora(nn.Linear(3, 3), config("all-linear"))
        with pytest.raises(ValueError, match="no layer here can get LoRA"):
            apply_lora(nn.Sequential(nn.ReLU()), config("all-linear"))
        with pytest.raises(TypeError, match="config must be a LoRAConfig, got dict"):
            apply_lora(nn.Sequential(nn.Linear(3, 3)), {"r": 8})

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float32"], ids=str)
    def test_dtypes_that_factors_cannot_have(self, net, dtype):
        before = snapshot(net)
        with pytest.raises(TypeError, match=rf"adapter_dtype must be one of torch\.float64, .* got '?{dtype}"):
            apply_lora(net, config(), adapter_dtype=dtype)
        assert_unchanged(net, before)

    @pytest.mark.parametrize("call", [lambda m: apply_lora(m, config()), remove_lora, merge_lora, lora_report])
    def test_what_is_no_module(self, call):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
            call("llama")

    def test_entries_without_effect_warn(self, net):
        settings = {"exclude_modules": ["hed"], "rank_pattern": {"dwn": 4}, "alpha_pattern": {"up": 1}}
        with pytest.warns(UserWarning, match="has no effect") as caught:
            apply_lora(net, config(["up", "dwon"], **settings))
        assert sorted(str(w.message) for w in caught) == [
            "exclude_modules: 'hed' matches no module and has no effect; near names: head",
            "rank_pattern: 'dwn' matches no module and has no effect; near names: down",
            "target_modules: 'dwon' matches no module and has no effect; near names: down",
        ]
        assert {w.filename for w in caught} == {__file__}
        remove_lora(net)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            apply_lora(net, config(["up"], exclude_modules=["alias"], rank_pattern={"blocks.0.up": 1}))
