"""Patterns out of a file: they mean what re says they mean, and none of them hangs."""

import re

import pytest

from fused_lora.adapter_patterns import Pattern, PatternError, suffix_matcher

PATTERNS = [
    r".*\.(q|v)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:up))",
    r"^(?!.*vision).*proj$",
    r"(?=.*q)model\.layers\.(?:1|2)\..*",
    r"model\.layers\.[0-2]\.\w+\.[^.]+",
    r"\D+|a{2,3}|b{0}|c?|(?:xy)*z",
    r"\Amodel\b.*\bq_proj\Z|\S+\s\W",
]
NAMES = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.12.mlp.up",
    "vision.layers.0.q_proj",
    "text_model.layers.2.mlp.up",
    "q_proj",
    "",
    "aa",
    "aaaa",
    "c",
    "xyxyz",
    "model.layers.2.mlp.up",
    "modelx.q_proj",
    "ä.v_proj",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_re_says(pattern):
    ours = Pattern(pattern)
    assert [ours.matches(name) for name in NAMES] == [re.fullmatch(pattern, name) is not None for name in NAMES]


@pytest.mark.parametrize(
    "pattern", [r"(a)\1", r"(?i)a", r"(?<=a)b", "a{100000}", "(", "(" * 5000, "a" * 30_000, "[z-a]"]
)
def test_patterns_that_are_refused(pattern):
    with pytest.raises(PatternError):
        Pattern(pattern).matches("a")


def test_patterns_have_a_budget():
    pattern = Pattern("(?=a)(?:" + "|".join("a*" * 20 for _ in range(200)) + ")*b")
    with pytest.raises(PatternError, match="too long"):
        pattern.matches("a" * 3000 + "c")


def test_keys_of_rank_pattern():
    assert suffix_matcher("up")("blocks.0.up")
    assert not suffix_matcher("up")("blocks.0.group")
    assert not suffix_matcher("^up")("blocks.0.up")
    assert suffix_matcher(r"blocks\.0\.up")("model.blocks.0.up")
    assert suffix_matcher(r"blocks\.\d+\.up")("model.blocks.12.up")
    assert not suffix_matcher(r"blocks\.\d+\.up")("model.blocks.x.up")
