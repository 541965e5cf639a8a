"""apply_lora on Llama, T5, GPT-2, BERT, ViT and Whisper, built from small configs of transformers."""

import copy
import warnings

import pytest
import torch
import transformers
from nets import assert_unchanged, snapshot, train
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from fused_lora import (
    LoRAConfig,
    apply_lora,
    count_parameters,
    lora_layers,
    merge_lora,
    remove_lora,
    tasks,
)

# Remembered before conftest.py replaces torch.empty: torch.device("meta") would not know the one it puts there.
torch.utils._device._device_constructors()

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # PEFT's, over Conv1D
]
SIZES = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IDS = torch.arange(2, 20).reshape(2, 9)
LABELS = torch.arange(3, 13).reshape(2, 5)


def llama():
    config = transformers.LlamaConfig(
        **SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": IDS, "labels": IDS}


def t5():
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": IDS, "labels": LABELS}


def gpt2():
    config = transformers.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return transformers.GPT2LMHeadModel(config), {"input_ids": IDS, "labels": IDS}


def bert():
    config = transformers.BertConfig(
        **SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.BertForSequenceClassification(config), {"input_ids": IDS, "labels": torch.tensor([0, 1])}


def vit():
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    inputs = {"pixel_values": torch.linspace(-1, 1, 1536).sin().reshape(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    return transformers.ViTForImageClassification(config), inputs


def whisper():
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))}
    config = transformers.WhisperConfig(
        **SIZES, **layers, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, num_mel_bins=8,
        max_source_positions=10, max_target_positions=12, decoder_start_token_id=3,
    )  # fmt: skip
    features = torch.linspace(-1, 1, 320).sin().reshape(2, 8, 20)
    return transformers.WhisperForConditionalGeneration(config), {"input_features": features, "labels": LABELS}


MODELS = {build.__name__: build for build in (llama, t5, gpt2, bert, vit, whisper)}
# Every layer that can get LoRA and that forward runs through. T5's "shared" is only tied to the two that it does.
ABLE = ("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d")


def every_layer(model):
    names = [name for name, module in model.named_modules() if type(module).__name__ in ABLE and name != "shared"]
    return LoRAConfig(r=4, lora_alpha=8, target_modules=names)


@pytest.fixture(params=MODELS)
def built(request):
    """(model in evaluation mode, inputs)"""
    torch.manual_seed(0)
    model, inputs = MODELS[request.param]()
    return model.eval(), inputs


def test_promises(built):
    model, inputs = built
    before, start = snapshot(model), model(**inputs)
    with torch.no_grad():
        quiet = model(**inputs).logits  # where weights require grad, torch itself may take another road to the product
    apply_lora(model, every_layer(model))
    kinds = {type(layer).__name__ for _, layer in lora_layers(model)}
    assert "LoRALinear" in kinds
    assert torch.equal(model(**inputs).logits, start.logits)

    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, quiet)

    outputs = train(model)(**inputs)
    for on in (False, True):
        for _, layer in lora_layers(model):
            layer.enabled = on
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, quiet) is not on
    assert not torch.equal(outputs.logits, start.logits)
    outputs.loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == name.endswith(("lora_a", "lora_b")), name

    twin = copy.deepcopy(model)
    missing = train(twin).load_state_dict(model.state_dict())
    assert not missing.missing_keys + missing.unexpected_keys
    assert torch.equal(twin(**inputs).logits, outputs.logits)
    base_only = model.load_state_dict(before[1], strict=False)
    assert not base_only.unexpected_keys, "a checkpoint of the base model fits"

    assert remove_lora(model) is model
    assert_unchanged(model, before)
    assert torch.equal(model(**inputs).logits, start.logits)


def test_merge_agrees(built):
    # In float64, where rounding and its growth through the network stay far below anything wrong: ΔW is of order 1.
    model, inputs = built
    model.double()
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    keys, flags, start = list(model.state_dict()), snapshot(model)[2], model(**inputs).logits
    with_lora = train(apply_lora(model, every_layer(model)))(**inputs).logits
    assert (with_lora - start).abs().max() > 1e-2
    for _, layer in lora_layers(model):
        layer.merge()
    torch.testing.assert_close(model(**inputs).logits, with_lora, rtol=1e-9, atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, see test_inject.py
        merge_lora(model)
    assert not list(lora_layers(model))
    assert list(model.state_dict()) == keys
    assert {name: flag for name, flag in snapshot(model)[2].items() if name in flags} == flags
    torch.testing.assert_close(model(**inputs).logits, with_lora, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:exclude_modules")  # what only some of the models have
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tasks_over_a_model(built, dtype):
    model, inputs = built
    model.to(dtype)
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    keys = list(model.state_dict())
    with torch.no_grad():
        start = model(**inputs).logits
        # Positions and distances between tokens have no row for each row of the batch; "shared" is never called.
        model = tasks.Model(model, r=2, exclude_modules=["embed_positions", "relative_attention_bias", "shared"])
        for name in ("a", "b"):
            model.add_task(name)
            assert torch.equal(model(**inputs, task=name).logits, start)
            for p in model.task_parameters(name):
                torch.nn.init.normal_(p, std=0.2)
        assert torch.equal(model(**inputs).logits, start)
        alone = [model(**inputs, task=name).logits for name in ("b", "a")]
        rows = model(**inputs, task=["b", "a"]).logits
        assert not torch.equal(alone[0], alone[1])
        if dtype == torch.float64:
            for i, logits in enumerate(alone):
                torch.testing.assert_close(rows[i], logits[i], rtol=1e-9, atol=1e-9)
    model(**inputs, task="a").loss.backward()
    trained = {id(p) for p in model.parameters() if p.grad is not None}
    assert trained == {id(p) for p in model.task_parameters("a")}
    assert list(model.state_dict()) == keys
    assert model.load_state_dict(model.state_dict()) == ([], [])


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2", "bert"])
def test_as_many_rows_as_tokens(name):
    """A square batch: no size tells rows from tokens, and T5 looks up the distance of every two tokens."""
    torch.manual_seed(0)
    network, _ = MODELS[name]()
    model = tasks.Model(network.double().eval(), r=2).add_task("a").add_task("b")
    for task in model.tasks:
        for p in model.task_parameters(task):
            torch.nn.init.normal_(p, std=0.2)
    inputs = {"input_ids": torch.arange(2, 38).reshape(6, 6)}
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    rows = ["a", "b", None, "a", "b", "b"]
    if name == "t5":
        with pytest.raises(
            ValueError, match=r"relative_attention_bias' got .* \(6, 6\), positions that the network made"
        ):
            model(**inputs, task=rows)
        return
    for _ in range(2):  # the second time these shapes are known
        logits = model(**inputs, task=rows).logits
        for i, task in enumerate(rows):
            alone = model(**{key: t[i : i + 1] for key, t in inputs.items()}, task=task).logits
            torch.testing.assert_close(logits[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def theirs_and_ours(model, **settings):
    """PEFT's and our model from copies of one base, with the same factors."""
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
    ours = train(apply_lora(model, LoRAConfig(**settings)))
    tuned = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    assert tuned.keys() == dict(lora_layers(ours)).keys()
    for name, layer in lora_layers(ours):
        assert tuned[name].scaling["default"] == layer.scale, name
        with torch.no_grad():
            tuned[name].lora_A["default"].weight.copy_(layer.lora_a)
            tuned[name].lora_B["default"].weight.copy_(layer.lora_b)
    return theirs.eval(), ours


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_all_linear_is_pefts(built, init):
    model, inputs = built
    theirs, ours = theirs_and_ours(model.double(), target_modules="all-linear", r=4, init_lora_weights=init)
    assert count_parameters(ours)[:2] == theirs.get_nb_trainable_parameters()[::-1]
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=1e-9, atol=1e-9)


def test_patterns_and_layers_are_pefts():
    torch.manual_seed(0)
    model, inputs = llama()
    settings = {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.down_proj": 3},
        "alpha_pattern": {"self_attn.v_proj": 5},
        "use_rslora": True,
    }
    theirs, ours = theirs_and_ours(model.double().eval(), **settings)
    assert {layer.r for _, layer in lora_layers(ours)} == {8, 2, 3}
    losses = [m(**inputs).loss for m in (theirs, ours)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    for loss in losses:
        loss.backward()
    for name, layer in lora_layers(ours):
        module = theirs.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.lora_a.grad, module.lora_A["default"].weight.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.lora_b.grad, module.lora_B["default"].weight.grad, rtol=1e-9, atol=1e-12)


def test_t5_small_counts():
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=512, d_ff=2048, num_layers=6))
    apply_lora(model, LoRAConfig(r=8, target_modules=["q", "v"]))
    assert len(list(lora_layers(model))) == 36
    assert count_parameters(model).trainable == 294_912


def test_ties_survive_what_transformers_does_to_them():
    torch.manual_seed(0)
    model, inputs = gpt2()
    apply_lora(model, LoRAConfig(r=4, target_modules=["wte", "c_attn"]))
    embedding = model.get_input_embeddings()
    model.tie_weights()
    assert model.lm_head.weight is embedding.weight
    train(model).eval()
    wanted = model(**inputs).logits
    model.gradient_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model(**inputs).loss.backward()
    gradients = [layer.lora_a.grad.clone() for _, layer in lora_layers(model)]
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model(**inputs).loss.backward()
    assert all(torch.equal(g, layer.lora_a.grad) for g, (_, layer) in zip(gradients, lora_layers(model), strict=True))
    assert torch.equal(model.eval()(**inputs).logits, wanted)
