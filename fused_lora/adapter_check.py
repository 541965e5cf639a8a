"""An adapter held against a model: every key accounted for, before anything is touched."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .adapter_config import AdapterConfig
from .adapter_files import AdapterFiles
from .adapter_keys import METADATA_KEY, PREFIX, SUFFIXES, base_key, factor_key, layer_of, other_format
from .adapter_models import Place, Target
from .adapter_patterns import PatternError
from .adapter_report import KINDS, Finding
from .layer import lora_scale

_SEE_PATCH = "PEFT loads it: PeftModel.from_pretrained, then fused_lora.patch_peft"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Comparison:
    """What :func:`compare` found, and what loading would write.

    ``factors``: for each layer, its parts (lora_a, lora_b, magnitude) -> key of the file. ``base``: key of the base
    model's state dict -> key of the file. ``ranks``, ``alphas`` and ``scales``: by layer, as the config has them.
    ``unmatched``: layers of the file without a place. ``tensors``: what was read, by key of the file.
    """

    findings: list[Finding] = field(default_factory=list)
    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    unmatched: dict[str, None] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    _kinds: dict[str, set[str]] = field(default_factory=dict)

    def add(self, kind: str, where: str, detail: str) -> None:
        assert kind in KINDS
        self.findings.append(Finding(kind, where, detail))
        for name in {where, layer_of(where)}:
            self._kinds.setdefault(name, set()).add(kind)

    def has(self, where: str, *kinds: str) -> bool:
        """Whether a finding of these kinds names this key, field or layer, or a factor of this layer."""
        # Not by a search in the findings: a header may name a hundred thousand layers, each with one.
        return not self._kinds.get(where, set()).isdisjoint(kinds)


def compare(
    files: AdapterFiles, config: AdapterConfig, target: Target | None, overwrite_base: bool = False
) -> Comparison:
    """Hold the files against the model (None: against each other only).

    Values are read last, and only of tensors whose shapes have a place: a file cannot take more memory than the model.

    Raises:
        AdapterError: the values cannot be read.
    """
    result = Comparison()
    if _of_another_format(result, files):
        return result
    in_base = _sort_keys(result, files, config, target)
    _check_pairs(result, files, config, target)
    if target is not None:
        _check_targets(result, config, target)
    _check_ranks(result, files, config, target)
    _check_metadata(result, files)
    readable = _check_factor_types(result, files)
    if target is None:
        _list_base(result, config, in_base)
    else:
        readable += _fitting_base(result, files, config, target, in_base)
    result.tensors = files.tensors(readable)
    _check_values(result, target)
    if target is not None:
        _check_base(result, config, target, in_base, overwrite_base)
    order = list(KINDS)
    result.findings.sort(key=lambda finding: order.index(finding.kind))
    return result


def _of_another_format(result: Comparison, files: AdapterFiles) -> bool:
    """Whether no key is PEFT's and some are another format's: that is one finding, not one for each tensor."""
    formats = [] if any(key.startswith(PREFIX) for key in files.stored) else list(map(other_format, files.stored))
    for found in dict.fromkeys(filter(None, formats)):
        detail = (
            f"{formats.count(found)} of {len(formats)} tensors are in the format of {found[0]}, not in PEFT's. "
            "diffusers' pipeline.load_lora_weights loads it. Here its keys must become "
            f"{PREFIX}<path>.lora_A.weight and .lora_B.weight: {found[1]}"
        )
        result.add("extra", next(key for key, of in zip(files.stored, formats, strict=True) if of == found), detail)
    return bool(result.findings)


def _sort_keys(result: Comparison, files: AdapterFiles, config: AdapterConfig, target: Target | None) -> dict[str, str]:
    """Fill ``factors``; return what is no factor, by its key in the base model."""
    in_base = {}
    for key in files.stored:
        if not key.startswith(PREFIX):
            result.add("extra", key, f"does not begin with {PREFIX}")
            continue
        inner = key[len(PREFIX) :]
        suffix = next((suffix for suffix in SUFFIXES if inner.endswith(suffix)), None)
        if suffix is not None:
            _sort_factor(result, key, inner.removesuffix(suffix), suffix, config, target)
        elif config.modules_to_save and (".modules_to_save." in inner or ".original_module." in inner):
            # With bias="all" PEFT writes the biases of these modules three times.
            result.add("note", key, "is PEFT's second copy of a saved module's tensor, and not read")
        else:
            in_base[inner.replace(".base_layer.", ".")] = key
    return in_base


def _sort_factor(
    result: Comparison, key: str, path: str, suffix: str, config: AdapterConfig, target: Target | None
) -> None:
    part = SUFFIXES[suffix]
    if part == "magnitude" and not config.use_dora:
        result.add("extra", key, "is of DoRA, which the config does not use")
        return
    if part == "lora_bias":
        result.add("config", key, f"LoRA layers have no bias on B; {_SEE_PATCH}")
        return
    if target is not None:
        fault = _misplaced(target, path, None if part == "magnitude" else "embedding" in suffix)
        if fault:
            result.add("extra", key, fault)
            result.unmatched[path] = None
            return
        path = target.places[path].path
    parts = result.factors.setdefault(path, {})
    if part in parts:
        result.add("extra", key, f"belongs to the same layer as {parts[part]}")
    else:
        parts[part] = key


def _misplaced(target: Target, path: str, embedding: bool | None) -> str:
    """Why factors cannot go to this module; "" where they can."""
    if path not in target.aliases:
        near = [name for name in target.places if name.endswith(f".{path}") or path.endswith(f".{name}")]
        return f"no module {path} in the model" + (f"; near: {min(near, key=len)}" if near else "")
    place = target.places.get(path)
    if place is None:
        return f"{path} has no LoRA" if target.adapted or target.kind == "new task" else f"{path} cannot get LoRA"
    if place.refusal:
        return f"{path} cannot get LoRA: {place.refusal}"
    if embedding is not None and place.embedding != embedding:
        return f"{path} is {'an' if place.embedding else 'no'} embedding"
    return ""


def _check_pairs(result: Comparison, files: AdapterFiles, config: AdapterConfig, target: Target | None) -> None:
    wanted = ("lora_a", "lora_b", "magnitude") if config.use_dora else ("lora_a", "lora_b")
    if target is not None and target.adapted:
        for place in target.own_places():
            if place.path not in result.factors:
                for part in wanted:
                    result.add("missing", factor_key(place.path, part, place.embedding), f"{place.path} has LoRA")
    for path, parts in result.factors.items():
        key = next(iter(parts.values()))
        for part in wanted:
            if part not in parts:
                result.add(
                    "missing", factor_key(path, part, "lora_embedding_" in key), f"of its layer only {key} is there"
                )
    if not result.factors and not result.findings:
        result.add("missing", str(files.directory), "there is no tensor of a LoRA layer in the file")


def _check_targets(result: Comparison, config: AdapterConfig, target: Target) -> None:
    """The layers that the config names against those the file has tensors for."""
    for path in result.factors:
        if lost := target.places[path].lost_in_peft:
            result.add("note", path, f"PEFT leaves its {lost} out of lora_A: there the file computes something else")
        ends = (name.rpartition(".") for name in target.places[path].names)
        if len({(target.aliases.get(holder, ""), name) for holder, _, name in ends}) > 1:
            names = ", ".join(target.places[path].names[1:])
            result.add("note", path, f"is {names} too, all one layer here; PEFT puts LoRA under the first name alone")
    try:
        named = config.targets(target.names)
    except PatternError as error:
        result.add("note", "target_modules", f"not compared with the tensors, because {error}")
        return
    if named is None:
        return
    if config.layers_to_transform is not None and named != result.factors.keys():
        old = config.targets(target.names, old=True) or set()
        named = old if old == result.factors.keys() else named
    for path in result.factors:
        if path not in named and not named.intersection(target.places[path].names):
            for key in result.factors[path].values():
                result.add("extra", key, f"the config does not target {path}")
    for name in sorted(named):
        place = target.places.get(name)
        tensors = place is not None and place.path in result.factors
        if not tensors and not result.has(name, "missing", "extra"):
            result.add("missing", name, "the config targets it, the file has no tensors for it")


def _check_ranks(result: Comparison, files: AdapterFiles, config: AdapterConfig, target: Target | None) -> None:
    try:
        result.ranks, result.alphas = config.ranks(result.factors), config.alphas(result.factors)
    except PatternError as error:
        result.add("config", "rank_pattern, alpha_pattern", str(error))
        return
    result.scales = {path: lora_scale(r, result.alphas[path], config.use_rslora) for path, r in result.ranks.items()}
    for path, parts in result.factors.items():
        r, place = result.ranks[path], None if target is None else target.places[path]
        shapes = {part: (key, files.stored[key].shape) for part, key in parts.items() if part != "magnitude"}
        _check_shapes(result, path, shapes, r, place)
        if config.use_dora and place is not None:
            _check_magnitude(result, files, parts.get("magnitude"), place, target)
        if place is not None and place.r is not None:
            _check_against_layer(result, place, r, result.scales[path], config.use_dora)


def _check_magnitude(
    result: Comparison, files: AdapterFiles, key: str | None, place: Place, target: Target | None
) -> None:
    shapes = place.shapes(1)
    if target is not None and target.kind in ("task", "new task"):
        result.add("config", place.path, f"use_dora goes with apply_lora, not with tasks; {_SEE_PATCH}")
    elif place.embedding or len(shapes[0]) != 2:
        result.add("config", place.path, f"use_dora goes with linear layers only; {_SEE_PATCH}")
    elif key is not None and files.stored[key].shape != shapes[1][:1]:
        result.add("shape", key, f"has shape {files.stored[key].shape}, {place.path} needs {shapes[1][:1]}")


def _check_shapes(
    result: Comparison, path: str, shapes: Mapping[str, tuple[str, tuple[int, ...]]], r: int, place: Place | None
) -> None:
    """A layer's factors, part -> (key, shape), against the config's rank and the layer."""
    thin = [(key, shape) for key, shape in shapes.values() if len(shape) < 2]
    for key, shape in thin:
        result.add("shape", key, f"has shape {shape}, a factor has at least two dimensions")
    if thin:
        return
    stored = shapes["lora_a"][1][0] if "lora_a" in shapes else r
    if stored != r:
        for key, _ in shapes.values():
            result.add("rank", key, f"has rank {stored}, the config says {r}")
    if place is None:
        b, shape = shapes.get("lora_b", ("", (1, stored)))
        if not shape[1] or stored % shape[1]:  # a convolution with groups has a part of the ranks in each
            result.add("shape", b, f"has shape {shape}, which does not go with rank {stored}")
        return
    if stored == 0 or (place.r is None and stored % place.groups):
        result.add("rank", path, f"has rank {stored}, no multiple of its {place.groups} groups")
        return
    for part, (key, shape) in shapes.items():
        wanted = place.shapes(stored)[part == "lora_b"]
        # Another rank than the model's is said of the layer.
        if shape != wanted and place.r in (None, stored):
            result.add("shape", key, f"has shape {shape}, {path} needs {wanted}")


def _check_against_layer(result: Comparison, place: Place, r: int, scale: float, dora: bool) -> None:
    assert place.scale is not None
    if place.dora != dora:
        result.add("config", place.path, f"use_dora is {dora} in the config, {place.dora} in the model")
    if place.r != r:
        result.add("rank", place.path, f"has rank {place.r} in the model, {r} in the config")
    elif not math.isclose(place.scale, scale, rel_tol=1e-12):
        result.add(
            "scale",
            place.path,
            f"has scale {place.scale:g} in the model, {scale:g} in the config; use set_scale first, or load into the "
            "model without LoRA",
        )


def _check_metadata(result: Comparison, files: AdapterFiles) -> None:
    """What save_adapter wrote beside the weights, against the config beside them."""
    text = files.metadata.get(METADATA_KEY)
    if text is None:
        result.add("note", METADATA_KEY, "not written by save_adapter: a scale changed in the config would not show")
        return
    try:
        known = {name: (int(r), float(scale)) for name, (r, scale) in json.loads(text)["layers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        result.add("config", METADATA_KEY, "the metadata of the weights cannot be read")
        return
    for path in result.scales.keys() & known.keys():
        r, scale = known[path]
        if r == result.ranks[path] and not math.isclose(scale, result.scales[path], rel_tol=1e-12):
            result.add(
                "scale",
                path,
                f"was saved with scale {scale:g}, the config beside it gives {result.scales[path]:g}: use_rslora, "
                "lora_alpha, r or a pattern was changed, or a save was interrupted",
            )
    for path in sorted(known.keys() - result.factors.keys()):
        if not result.has(path, "missing", "extra"):
            result.add("missing", path, "was saved with LoRA, the file has no tensors for it")


def _check_factor_types(result: Comparison, files: AdapterFiles) -> list[str]:
    """The keys of the factors that are worth reading: of a floating dtype, and of the right shape."""
    keys = [key for parts in result.factors.values() for key in parts.values()]
    for key in keys:
        if files.stored[key].dtype not in _FLOATS:
            result.add("dtype", key, f"holds {files.stored[key].dtype}, not floating numbers")
    unfit = {finding.where for finding in result.findings if finding.kind in ("dtype", "shape", "rank")}
    return [key for key in keys if key not in unfit]


def _check_values(result: Comparison, target: Target | None) -> None:
    layers = {key: path for path, parts in result.factors.items() for key in parts.values()}
    for key, tensor in result.tensors.items():
        dtype = target.places[layers[key]].dtype if target is not None and key in layers else None
        if not tensor.is_floating_point():
            continue
        broken = ~torch.isfinite(tensor)
        if broken.any():
            result.add("values", key, f"holds NaN or infinity in {int(broken.sum())} of {tensor.numel()} places")
        elif dtype is not None and torch.promote_types(dtype, tensor.dtype) != dtype:
            if torch.isfinite(tensor.to(dtype)).all():
                result.add("note", key, f"is {tensor.dtype} and will be rounded to the model's {dtype}")
            else:
                result.add("values", key, f"holds {tensor.dtype} that is too large for the model's {dtype}")


def _list_base(result: Comparison, config: AdapterConfig, in_base: Mapping[str, str]) -> None:
    for inner, key in in_base.items():
        name = inner.rpartition(".")[2]
        if config.bias == "none" or name != "bias":
            result.add("base weight", key, "would be written over the base model's")


def _fitting_base(
    result: Comparison, files: AdapterFiles, config: AdapterConfig, target: Target, in_base: Mapping[str, str]
) -> list[str]:
    """The keys of the base model's tensors that are worth reading; finds what is missing and what has no place."""
    biases = _biases(config, target, result)
    if config.bias == "lora_only" and METADATA_KEY not in files.metadata and biases.isdisjoint(in_base):
        result.add("note", "bias", "lora_only, but no bias is in the file: PEFT up to 0.18 does not save them")
        biases = set()
    for inner in sorted(biases.difference(in_base)):
        result.add("missing", base_key(inner, result.factors), f"bias={config.bias!r} trains it")
    for name in config.modules_to_save:
        if not any(f".{name}." in f".{inner}" for inner in in_base):
            result.add("missing", name, "the config has it in modules_to_save, the file has no tensors for it")
    fitting = []
    for inner, key in in_base.items():
        here, stored = target.base.get(inner), files.stored[key]
        if here is None:
            result.add("extra", key, f"the model has no {inner}")
        elif here.shape != stored.shape:
            result.add("shape", key, f"has shape {stored.shape}, the model's {inner} has {tuple(here.shape)}")
        elif here.is_floating_point() != stored.dtype.is_floating_point:
            result.add("dtype", key, f"holds {stored.dtype}, the model's {inner} {here.dtype}")
        else:
            fitting.append(key)
    return fitting


def _check_base(
    result: Comparison, config: AdapterConfig, target: Target, in_base: Mapping[str, str], overwrite_base: bool
) -> None:
    """What becomes of the file's tensors for the base model."""
    biases = _biases(config, target, result)
    for inner, key in in_base.items():
        if key not in result.tensors:
            continue
        here = target.base[inner].detach()
        if not here.is_meta and torch.equal(here.cpu(), result.tensors[key].to(here.dtype)):
            result.add("note", key, f"is the model's own {inner}")
        elif target.kind in ("task", "new task"):
            result.add("base weight", key, f"would change {inner} for every task")
        elif inner in biases or overwrite_base:
            result.base[inner] = key
        else:
            result.add("base weight", key, f"would overwrite {inner}; load_adapter(..., overwrite_base=True) allows it")


def _biases(config: AdapterConfig, target: Target, result: Comparison) -> set[str]:
    """The biases that the config says were trained, by their keys in the base model."""
    if config.bias == "none":
        return set()
    return {
        key
        for key, tensor in target.base.items()
        if key.rpartition(".")[2] == "bias"
        and isinstance(tensor, nn.Parameter)
        and (config.bias == "all" or target.aliases.get(key.rpartition(".")[0]) in result.factors)
    }
