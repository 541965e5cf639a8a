"""The keys of an adapter's file: PEFT's names for the tensors of a layer, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PREFIX = "base_model.model."
METADATA_KEY = "fused_lora"
SUFFIXES = {
    ".lora_A.weight": "lora_a",
    ".lora_B.weight": "lora_b",
    ".lora_embedding_A": "lora_a",
    ".lora_embedding_B": "lora_b",
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}

# Formats that are told by their keys: (whose, a pattern of a key, what becomes of the keys in PEFT's files).
_OTHER_FORMATS = (
    (
        "kohya's sd-scripts",
        re.compile(r".*\.(?:lora_(?:down|up|mid)\.weight|alpha)|lora_(?:unet|te\d?)_.*"),
        "lora_down is lora_A, lora_up lora_B, and the path has its dots back; alpha goes into the config",
    ),
    (
        "diffusers",
        re.compile(r"(?:unet|text_encoder(?:_\d)?|transformer\.(?:single_)?transformer_blocks)\..*"),
        "the name of the pipeline's part before the path goes, one adapter to a part",
    ),
)


def other_format(key: str) -> tuple[str, str] | None:
    """(whose format a key is of, how it becomes PEFT's); None where it is of none that is known."""
    return next(((whose, how) for whose, pattern, how in _OTHER_FORMATS if pattern.fullmatch(key)), None)


def factor_key(path: str, part: str, embedding: bool) -> str:
    """PEFT's key of lora_a, lora_b or magnitude of a layer."""
    if part == "magnitude":
        return f"{PREFIX}{path}.lora_magnitude_vector"
    letter = part[-1].upper()
    return f"{PREFIX}{path}.lora_embedding_{letter}" if embedding else f"{PREFIX}{path}.lora_{letter}.weight"


def base_key(key: str, adapted: Mapping[str, Any]) -> str:
    """PEFT's key of a tensor of the base model: a layer with LoRA is inside a wrapper, as its ``base_layer``."""
    path, _, name = key.rpartition(".")
    return f"{PREFIX}{path}.base_layer.{name}" if path in adapted else f"{PREFIX}{key}"


def layer_of(where: str) -> str:
    """The path of the layer whose factor's key this is; any other key or word as it is."""
    path, factor, _ = where.removeprefix(PREFIX).rpartition(".lora_")
    return path if factor and where.startswith(PREFIX) else where
