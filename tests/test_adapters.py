"""Adapters between this library and PEFT, in both directions: the same bits in the file, the same outputs."""

import json
import math

import adapter_nets as nets
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from fused_lora import (
    AdapterError,
    LoRAConfig,
    LoRALinear,
    apply_lora,
    check_adapter,
    load_adapter,
    lora_layers,
    merge_lora,
    remove_lora,
    save_adapter,
)
from fused_lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from fused_lora.tasks import Model

SETTINGS = {
    "one rank": {},
    "linear": {"target_modules": ["up", "down"]},
    "conv": {"target_modules": ["conv1", "conv2", "conv3"]},
    "embedding": {"target_modules": ["embed"]},
    "transposed": {"target_modules": ["turned"], "fan_in_fan_out": True},
    "rank pattern": {"rank_pattern": {"down": 2, "blocks.1.up": 3}},
    "alpha pattern": {"alpha_pattern": {"^up": 3, "embed": 1.5}},
    "both patterns, regex": {"rank_pattern": {r"blocks\.\d+\.(up|down)": 2}, "alpha_pattern": {r".*\.up": 7}},
    "rslora": {"use_rslora": True, "lora_alpha": 5, "rank_pattern": {"conv1": 3}},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only", "target_modules": ["up", "conv1", "turned"]},
    "regex": {"target_modules": r"blocks\.\d\.(?:up|down)|conv\d"},
    "layers": {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "excluded": {"exclude_modules": ["blocks.0.up", "conv2"]},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
}


def tensors(folder):
    return load_file(folder / WEIGHTS_FILE)


def same_tensors(one, other):
    one, other = tensors(one), tensors(other)
    assert list(one) == list(other)
    assert all(one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_from_peft_and_back(tmp_path, settings):
    """PEFT's file loads here; saved from here it holds the same bits, and PEFT computes the same with it."""
    peft = nets.peft_model(**settings)
    first = nets.save_peft(peft, tmp_path / "peft")
    model = nets.make_net()
    assert load_adapter(model, first) is model
    if settings.get("bias") == "lora_only" and not any(key.endswith(".bias") for key in tensors(first)):
        pytest.skip("this PEFT does not save the biases of lora_only")
    nets.assert_same_outputs(model, peft)
    scales = {name: module.scaling["default"] for name, module in peft.base_model.model.named_modules() if
              hasattr(module, "scaling")}  # fmt: skip
    assert {name: layer.scale for name, layer in lora_layers(model)} == scales

    second = save_adapter(model, tmp_path / "ours")
    same_tensors(first, second)
    again = nets.load_peft(second)
    with torch.no_grad():
        assert torch.equal(again(nets.IDS), peft(nets.IDS))
    assert check_adapter(second, nets.make_net()).ok
    assert check_adapter(second, again).ok


@pytest.mark.parametrize(
    ("base", "adapters"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]
)
def test_dtypes(tmp_path, base, adapters):
    dtype = getattr(torch, base)
    peft = nets.peft_model(dtype)
    first = nets.save_peft(peft, tmp_path / "peft")
    model = load_adapter(nets.make_net(dtype), first)
    assert {layer.lora_a.dtype for _, layer in lora_layers(model)} == {getattr(torch, adapters)}
    same_tensors(first, save_adapter(model, tmp_path / "ours"))


def test_an_adapter_of_16_bits_keeps_its_values(tmp_path):
    peft = nets.peft_model().bfloat16()
    folder = nets.save_peft(peft, tmp_path)
    model = load_adapter(nets.make_net(), folder)
    up = dict(lora_layers(model))["up"]
    assert torch.equal(up.lora_a, tensors(folder)["base_model.model.up.lora_A.weight"].float())
    half = load_adapter(nets.make_net(), folder, adapter_dtype=torch.bfloat16)
    assert dict(lora_layers(half))["up"].lora_a.dtype == torch.bfloat16


def test_rounding_is_said(tmp_path):
    model = nets.train(apply_lora(nets.make_net(), LoRAConfig(target_modules=["up"])))
    save_adapter(model, tmp_path)
    narrow = apply_lora(nets.make_net(), LoRAConfig(target_modules=["up"]), adapter_dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="rounded"):
        load_adapter(narrow, tmp_path)
    with torch.no_grad():
        dict(lora_layers(model))["up"].lora_a[0, 0] = 1e6
    save_adapter(model, tmp_path, overwrite=True)
    narrow = apply_lora(nets.make_net(), LoRAConfig(target_modules=["up"]), adapter_dtype=torch.float16)
    with pytest.raises(AdapterError, match="too large"):
        load_adapter(narrow, tmp_path)


def test_into_a_model_that_has_lora(tmp_path):
    config = LoRAConfig(r=4, lora_alpha=6, target_modules=nets.EVERYTHING, lora_dropout=0.1)
    model = nets.train(apply_lora(nets.make_net(), config))
    save_adapter(model, tmp_path)
    other = apply_lora(nets.make_net(), config)
    parameters = list(other.parameters())
    for _, layer in lora_layers(other):
        layer.merge()  # a merged layer takes the new factors too
    load_adapter(other, tmp_path)
    assert all(one is two for one, two in zip(parameters, other.parameters(), strict=True))
    assert all(
        layer.merged and torch.equal(layer._merged_weight, layer._sum_weight()) for _, layer in lora_layers(other)
    )
    for _, layer in lora_layers(other):
        layer.unmerge()
    with torch.no_grad():
        assert torch.equal(other(nets.IDS), model(nets.IDS))


def test_loaded_lora_can_be_taken_out_again(tmp_path):
    folder = nets.save_peft(nets.peft_model(), tmp_path)
    with torch.no_grad():
        expected = nets.make_net()(nets.IDS)
        adapted = load_adapter(nets.make_net(), folder)(nets.IDS)
        assert torch.equal(remove_lora(load_adapter(nets.make_net(), folder))(nets.IDS), expected)
        merged = merge_lora(load_adapter(nets.make_net(), folder))(nets.IDS)
    assert not torch.equal(adapted, expected)
    torch.testing.assert_close(merged, adapted)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"r": 3}, ("rank", "has rank 3 in the model, 4 in the config")),
        ({"lora_alpha": 8}, ("scale", "has scale 2 in the model, 1.5 in the config")),
        ({"use_rslora": True}, ("scale", "has scale 3 in the model")),
        ({"target_modules": ["up"]}, ("extra", "blocks.0.down has no LoRA")),
    ],
)
def test_layers_that_do_not_agree(tmp_path, changed, words):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]}
    save_adapter(nets.train(apply_lora(nets.make_net(), LoRAConfig(**settings))), tmp_path)
    model = apply_lora(nets.make_net(), LoRAConfig(**settings | changed))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(AdapterError, match="nothing was loaded") as error:
        load_adapter(model, tmp_path)
    assert all(word in str(error.value) for word in words)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_hand_made_layers_with_settings_of_their_own(tmp_path):
    """Ranks, alphas, rsLoRA and scales that differ from layer to layer, and a scale that was set."""
    net = nets.make_net()
    net.up = LoRALinear.from_linear(net.up, r=3, lora_alpha=5, lora_dropout=0.1)
    net.blocks[0].up = LoRALinear.from_linear(net.blocks[0].up, r=7, lora_alpha=2, use_rslora=True)
    net.blocks[1].up = LoRALinear.from_linear(net.blocks[1].up, r=3, lora_alpha=5)
    net.blocks[1].up.set_scale(0.1)
    net.requires_grad_(False)
    for _, layer in lora_layers(net):
        layer.lora_a.requires_grad_(True)
        layer.lora_b.requires_grad_(True)
    nets.train(net)
    with pytest.warns(UserWarning, match="lora_dropout differs"):
        save_adapter(net, tmp_path)
    peft = nets.load_peft(tmp_path)
    nets.assert_same_outputs(net, peft)
    for name, layer in lora_layers(net):
        theirs = peft.base_model.model.get_submodule(name).scaling["default"]
        assert abs(theirs - layer.scale) <= math.ulp(layer.scale)  # 0.1 is no lora_alpha over 3
    nets.assert_same_outputs(load_adapter(nets.make_net(), tmp_path), peft)


def test_targets_of_the_config_are_exactly_the_layers(tmp_path):
    """``up`` alone would take the blocks' as well, ``down`` need not be spelt out."""

    def targets(name, chosen):
        model = apply_lora(nets.make_net(), LoRAConfig(target_modules=chosen))
        return json.loads((save_adapter(model, tmp_path / name) / CONFIG_FILE).read_text())["target_modules"]

    assert targets("short", ["down", "embed"]) == ["down", "embed"]
    assert targets("blocks", ["blocks.0.up", "blocks.1.up"]) == ["blocks.0.up", "blocks.1.up"]
    assert targets("root", "up") == "up"
    assert {name for name, _ in lora_layers(load_adapter(nets.make_net(), tmp_path / "root"))} == {"up"}
    assert nets.load_peft(tmp_path / "root").targeted_module_names == ["up"]


def test_biases_go_with_the_adapter(tmp_path):
    model = nets.train(apply_lora(nets.make_net(), LoRAConfig(target_modules=["up"], bias="all")))
    save_adapter(model, tmp_path)
    keys = set(tensors(tmp_path))
    assert {"base_model.model.up.base_layer.bias", "base_model.model.norm.bias"} <= keys
    fresh = load_adapter(nets.make_net(), tmp_path)
    assert torch.equal(fresh.norm.bias, model.norm.bias)
    assert fresh.norm.bias.requires_grad
    with pytest.raises(AdapterError, match=r"norm\.bias .would change norm\.bias for every task"):
        load_adapter(Model(nets.make_net(), target_modules=["up"]), tmp_path, task="a")


def test_modules_to_save(tmp_path):
    peft = nets.peft_model(modules_to_save=["head"])
    folder = nets.save_peft(peft, tmp_path / "peft")
    with pytest.raises(AdapterError, match=r"2 base weight: .*head\.weight .*overwrite_base=True"):
        load_adapter(nets.make_net(), folder)
    model = load_adapter(nets.make_net(), folder, overwrite_base=True)
    nets.assert_same_outputs(model, peft)

    second = save_adapter(model, tmp_path / "ours", modules_to_save=["head"])
    same_tensors(folder, second)
    with torch.no_grad():
        assert torch.equal(nets.load_peft(second)(nets.IDS), peft(nets.IDS))
    with pytest.raises(ValueError, match="no module 'haed'"):
        save_adapter(model, tmp_path / "typo", modules_to_save=["haed"])
    both = nets.save_peft(nets.peft_model(modules_to_save=["head"], bias="all"), tmp_path / "both")
    assert load_adapter(nets.make_net(), both, overwrite_base=True) is not None


def test_what_trains_beside_lora_is_not_lost_in_silence(tmp_path):
    model = apply_lora(nets.make_net(), LoRAConfig(target_modules=["up"]))
    model.head.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"head\.weight, head\.bias require grad .*modules_to_save"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    save_adapter(model, tmp_path / "a", modules_to_save=["head"])
    assert "base_model.model.head.weight" in tensors(tmp_path / "a")
    save_adapter(model, tmp_path / "b", modules_to_save=[])
    assert "base_model.model.head.weight" not in tensors(tmp_path / "b")


def test_broken_factors_are_not_saved(tmp_path):
    model = apply_lora(nets.make_net(), LoRAConfig(target_modules=["up"]))
    with torch.no_grad():
        model.up.lora_a[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"NaN or infinity in base_model\.model\.up\.lora_A"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# ---- tasks


def test_a_peft_adapter_as_a_task(tmp_path):
    """Several adapters, of other ranks and on fewer layers than are wrapped, in one network."""
    model = Model(nets.make_net(), target_modules=nets.EVERYTHING)
    pefts = {}
    settings = ({"rank_pattern": {"down": 2}}, {"target_modules": ["up"], "r": 3, "use_rslora": True})
    for name, these in zip(("first", "second"), settings, strict=True):
        pefts[name] = nets.peft_model(**these)
        load_adapter(model, nets.save_peft(pefts[name], tmp_path / name), task=name)
    for name, peft in pefts.items():
        nets.assert_same_outputs(model, peft, lambda m, ids, name=name: m(ids, task=name))
    assert model.tasks == ["first", "second"]
    back = nets.load_peft(save_adapter(model, tmp_path / "back", task="first"))
    with torch.no_grad():
        assert torch.equal(back(nets.IDS), pefts["first"](nets.IDS))
        assert torch.equal(model(nets.IDS), nets.make_net()(nets.IDS))


def test_a_task_that_is_there(tmp_path):
    model = Model(nets.make_net(), target_modules=["up", "conv2"], r=4)
    model.add_task("a").add_task("b")
    for parameter in model.task_parameters("a"):
        nn.init.normal_(parameter)
    load_adapter(model, save_adapter(model, tmp_path, task="a"), task="b")
    with torch.no_grad():
        assert torch.equal(model(nets.IDS, task="a"), model(nets.IDS, task="b"))
    fresh = Model(nets.make_net(), target_modules=["up", "conv2"], r=3).add_task("a")
    with pytest.raises(AdapterError, match="rank"):
        load_adapter(fresh, tmp_path, task="a")


def test_task_is_asked_for(tmp_path):
    model = Model(nets.make_net(), target_modules=["up"])
    with pytest.raises(ValueError, match="needs task"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="unknown task 'a'"):
        save_adapter(model, tmp_path, task="a")
    with pytest.raises(TypeError, match=r"goes with a tasks\.Model"):
        save_adapter(apply_lora(nets.make_net(), LoRAConfig(target_modules=["up"])), tmp_path, task="a")
    with pytest.raises(AdapterError, match="down has no LoRA"):
        load_adapter(model, nets.save_peft(nets.peft_model(), tmp_path / "p"), task="a")
    assert model.tasks == []


# ---- models of transformers


def tiny_llama(**settings):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes, **settings)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens", "lm_head"]], ids=["linear", "embeddings"])
def test_llama(tmp_path, targets):
    """PEFT writes the embeddings' own weights beside their LoRA: the model's own are no hindrance."""
    peft = nets.peft_model(net=tiny_llama(), target_modules=targets)
    folder = nets.save_peft(peft, tmp_path / "peft")
    model = load_adapter(tiny_llama(), folder)
    ids = torch.arange(60).reshape(6, 10) % 32
    nets.assert_same_outputs(model, peft, None, lambda m, ids: m(ids).logits)
    again = nets.load_peft(save_adapter(model, tmp_path / "ours"), net=tiny_llama())
    with torch.no_grad():
        assert torch.equal(again(ids).logits, peft(ids).logits)


def test_base_weights_that_differ_are_refused(tmp_path):
    net = tiny_llama()
    with torch.no_grad():
        net.model.embed_tokens.weight += 1
    folder = nets.save_peft(nets.peft_model(net=net, target_modules=["embed_tokens"]), tmp_path)
    model = tiny_llama()
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(AdapterError, match=r"1 base weight: .*embed_tokens\.base_layer\.weight"):
        load_adapter(model, folder)
    assert torch.equal(model.model.embed_tokens.weight, before)
    load_adapter(model, folder, overwrite_base=True)
    assert torch.equal(model.model.embed_tokens.weight, net.model.embed_tokens.weight)


# ---- wrappers, and what is no model for these functions


def test_compiled_and_parallel_models_have_plain_names(tmp_path):
    for name, wrap in (("compiled", torch.compile), ("parallel", nn.DataParallel)):
        model = nets.train(apply_lora(nets.make_net(), LoRAConfig(target_modules=["up"])))
        save_adapter(wrap(model), tmp_path / name)
        fresh = nets.make_net()
        load_adapter(wrap(fresh), tmp_path / name)
        with torch.no_grad():
            assert torch.equal(fresh(nets.IDS), model(nets.IDS))


def test_models_that_are_not_ours(tmp_path):
    folder = nets.save_peft(nets.peft_model(), tmp_path / "peft")
    with pytest.raises(ValueError, match="save_pretrained"):
        save_adapter(nets.peft_model(), tmp_path / "a")
    with pytest.raises(TypeError, match="its own load_adapter"):
        load_adapter(nets.peft_model(), folder)
    with pytest.raises(ValueError, match="no LoRA layer"):
        save_adapter(nets.make_net(), tmp_path / "a")
    with pytest.raises(ValueError, match="the model itself is one layer"):
        save_adapter(LoRALinear(3, 4), tmp_path / "a")
    with pytest.raises(TypeError, match=r"nn\.Module"):
        load_adapter({}, folder)
    model = apply_lora(nets.make_net(), LoRAConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match="adapter_dtype"):
        load_adapter(model, folder, adapter_dtype=torch.float64)


def test_the_config_is_one_that_peft_reads_without_a_word(tmp_path, recwarn):
    model = apply_lora(nets.make_net(), LoRAConfig(target_modules=["up"], r=5, lora_alpha=2.5, use_rslora=True))
    save_adapter(model, tmp_path, base_model_name_or_path="some/model")
    config = LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.use_rslora) == (5, 2.5, True)
    assert config.base_model_name_or_path == "some/model"
    assert not [w for w in recwarn if "Unexpected keyword" in str(w.message)]
