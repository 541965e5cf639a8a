"""LoRAConfig: names and patterns mean what they mean in PEFT; bad values are refused by name."""

import copy
import dataclasses
import pickle
import re

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from fused_lora import LoRAConfig

NAMES = [
    "q_proj",
    "xq_proj",
    "model.q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "layers.1.q_proj",
    "h.1.attn.c_attn",
    "transformer.h.2.attn.c_attn",
    "encoder.block.1.layer.0.SelfAttention.q",
    "decoder.block.0.layer.1.EncDecAttention.q",
    "model.layers.1",
    "lm_head",
]
CHOICES = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "v_proj", "q"]},
    {"target_modules": {"self_attn.q_proj", "lm_head"}},
    {"target_modules": ["proj", "layers.1.q_proj"]},
    {"target_modules": "q_proj"},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"model\.layers\.\d\..*"},
    {"target_modules": ["q_proj", "c_attn", "q", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "c_attn", "q", "up_proj"], "layers_to_transform": [0, 2, 11]},
    {"target_modules": ["q_proj", "v_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {
        "target_modules": ["q_proj", "v_proj", "c_attn"],
        "layers_to_transform": [1, 2],
        "layers_pattern": ["h", "layers"],
    },
    {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "experts"},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.q_proj", "v_proj"]},
    {"target_modules": r".*proj", "exclude_modules": r".*layers\.1\..*"},
]


def _id(choice):
    # Sorted: the order of a set changes from process to process, and pytest-xdist's workers must agree on the names.
    return "-".join(str(sorted(value) if isinstance(value, set) else value) for value in choice.values())


@pytest.mark.parametrize("choice", CHOICES, ids=_id)
def test_chooses_what_peft_chooses(choice):
    ours, theirs = LoRAConfig(**choice), LoraConfig(**choice)
    for name in NAMES:
        chosen = ours.targets(name) and not ours.excludes(name)
        assert chosen == bool(check_target_module_exists(theirs, name)), name


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 2},
        {"layers.1.self_attn.v_proj": 2, "v_proj": 3, "q_proj": 4},
        {r"layers\.\d+\.self_attn\.q_proj": 2, "q_proj": 5},
        {"^q_proj": 3, "attn.*": 2},
        {"nothing": 9},
    ],
    ids=str,
)
def test_patterns_mean_what_they_mean_in_peft(pattern):
    ours = LoRAConfig(target_modules=["q_proj"], r=7, lora_alpha=11, rank_pattern=pattern, alpha_pattern=pattern)
    for name in NAMES:
        key = get_pattern_key(pattern.keys(), name)
        assert ours.rank(name) == pattern.get(key, 7), name
        assert ours.alpha(name) == pattern.get(key, 11), name


def test_field_names_and_defaults_are_pefts():
    theirs = LoraConfig()
    ours = LoRAConfig(target_modules=["q"])
    for field in dataclasses.fields(ours):
        assert hasattr(theirs, field.name), field.name
        if field.name != "target_modules":
            assert (getattr(ours, field.name) or None) == (getattr(theirs, field.name) or None), field.name


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": "8"}, TypeError, "r must be an int, got str '8'"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha must be finite, got inf"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha must be a number, got str '16'"),
        ({"lora_dropout": -0.1}, ValueError, "must be in [0, 1], got -0.1"),
        ({"lora_dropout": "a"}, TypeError, "lora_dropout must be a number in [0, 1], got 'a'"),
        ({"use_rslora": "no"}, TypeError, "use_rslora must be True or False, got str 'no'"),
        ({"use_dora": 2}, TypeError, "use_dora must be True or False, got int 2"),
        ({"target_modules": 5}, TypeError, "target_modules must be a string or a list of strings, got 5"),
        ({"rank_pattern": ["q"]}, TypeError, "rank_pattern must be a dict from regular expressions to numbers"),
        ({"alpha_pattern": {1: 2}}, TypeError, "alpha_pattern must hold regular expressions, got 1"),
        ({"layers_to_transform": 1.5}, ValueError, "layers_to_transform must hold indices from 0, got 1.5"),
        ({"layers_pattern": 3, "layers_to_transform": 0}, TypeError, "layers_pattern must hold regular expressions"),
        ({"bias": "lora"}, ValueError, "bias must be one of none, all, lora_only, got 'lora'"),
        ({"init_lora_weights": "olora"}, ValueError, "got 'olora'"),
        ({"target_modules": None}, ValueError, "target_modules is empty: give a list"),
        ({"target_modules": []}, ValueError, "target_modules is empty"),
        ({"target_modules": "(q"}, ValueError, "target_modules: '(q' is not a regular expression"),
        (
            {"target_modules": ["q", ""]},
            TypeError,
            "target_modules must be a string or hold strings that are not empty",
        ),
        ({"target_modules": ["q", 3]}, TypeError, "got 3"),
        ({"exclude_modules": "["}, ValueError, "exclude_modules: '[' is not a regular expression"),
        ({"rank_pattern": {"q": 0}}, ValueError, "r must be at least 1, got 0"),
        ({"rank_pattern": {"(": 1}}, ValueError, "rank_pattern: '(' is not a regular expression"),
        ({"alpha_pattern": {"q": float("nan")}}, ValueError, "lora_alpha must be finite, got nan"),
        ({"layers_to_transform": [0, -1]}, ValueError, "layers_to_transform must hold indices from 0, got -1"),
        ({"layers_to_transform": True}, ValueError, "layers_to_transform must hold indices from 0, got True"),
        ({"layers_pattern": "h"}, ValueError, "layers_pattern='h' needs layers_to_transform"),
        ({"layers_pattern": "(", "layers_to_transform": 0}, ValueError, "layers_pattern: '(' is not a regular"),
        ({"target_modules": "q.*", "layers_to_transform": 0}, ValueError, "put the layers into the regular expression"),
        ({"target_modules": "all-linear", "layers_to_transform": 0}, ValueError, "not with 'all-linear'"),
    ],
    ids=str,
)
def test_refusals(settings, error, words):
    with pytest.raises(error, match=re.escape(words)):
        LoRAConfig(**{"target_modules": ["q"]} | settings)


def test_is_frozen_and_independent_of_what_it_was_made_from():
    targets, pattern = ["q"], {"q": 2}
    config = LoRAConfig(target_modules=targets, rank_pattern=pattern)
    targets.append("v")
    pattern["q"] = 3
    assert config.target_modules == ("q",)
    assert config.rank("q") == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert dataclasses.replace(config, r=4).r == 4
    assert LoRAConfig(target_modules="ALL-Linear").target_modules == "all-linear"
    assert LoRAConfig(target_modules={"v", "q"}).target_modules == ("q", "v"), "a set has no order of its own"
    assert LoRAConfig(target_modules=["q"], rank_pattern=None, alpha_pattern=None).rank_pattern == {}
