"""Patterns out of a file: they mean what re says they mean, and none of them hangs."""

import re

import pytest

from fused_lora import adapter_patterns
from fused_lora.adapter_patterns import Pattern, PatternError, first_match, suffix_matcher

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


KEYS = ["^blocks.0.up", "up", r"blocks\.1\.up", r"blocks\.\d+\.(up|down)", "0.down", r".*\.gate", "blocks.2"]


def test_the_first_key_that_fits():
    find = first_match(KEYS)
    for name in (
        "blocks.0.up",
        "blocks.1.up",
        "a.blocks.1.up",
        "blocks.0.down",
        "down",
        "x.gate",
        "gate",
        "blocks.2",
        "2",
    ):
        fits = (i for i, key in enumerate(KEYS) if re.match(rf"(.*\.)?({key})$", name))  # as PEFT asks it
        assert find(name) == next(fits, None), name


def test_a_key_for_each_of_many_layers_takes_no_time():
    """A comparison of each key with each name would take minutes."""
    names = [f"model.layers.{i}.experts.up" for i in range(40_000)]
    find = first_match([f"^{name}" if i % 2 else name for i, name in enumerate(names)])
    assert [find(name) for name in names] == list(range(40_000))


def test_expressions_times_names_are_bounded(monkeypatch):
    monkeypatch.setattr(adapter_patterns, "_MOST_TRIES", 100)
    find = first_match([rf"x{i}\d" for i in range(30)])
    assert [find(name) for name in ("a", "b", "x3.0")] == [None] * 3
    with pytest.raises(PatternError, match="30 regular expressions are too many"):
        find("c")
