"""Adapters in PEFT's files: save_adapter, load_adapter, check_adapter.

A directory with adapter_config.json and adapter_model.safetensors; keys and shapes are PEFT's, and an adapter saved by
either library loads in the other. Formats of other libraries are in ``convert.py``.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import inject
from .adapter_check import Comparison, compare
from .adapter_config import AdapterConfig, LayerSettings, describe, parse_config
from .adapter_files import (
    CONFIG_FILE,
    AdapterError,
    AdapterExistsError,
    AdapterFiles,
    adapter_folder,
    read_adapter,
    write_adapter,
)
from .adapter_keys import METADATA_KEY, base_key, factor_key
from .adapter_models import Place, Target, look, unwrap
from .adapter_report import BLOCKING, AdapterLayer, AdapterReport, Finding, list_findings, list_keys
from .config import LoRAConfig
from .layer import LoRALayer

__all__ = ["AdapterError", "AdapterExistsError", "AdapterReport", "check_adapter", "load_adapter", "save_adapter"]


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    task: str | None = None,
    subfolder: str | None = None,
    modules_to_save: Iterable[str] | None = None,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the LoRA layers of a model as PEFT's adapter_config.json and adapter_model.safetensors.

    PEFT's ``PeftModel.from_pretrained(base, directory)`` loads them, with identical factors and scales, and so does
    :func:`load_adapter`. Each file is written beside its place, brought to disk and renamed: a crash leaves the old
    file whole. The weights' metadata hold every layer's rank and scale, so that a config that is changed later shows.

    Args:
        model: with LoRA from :func:`apply_lora`, or a ``tasks.Model``.
        directory: made where it does not exist.
        task: which task of a ``tasks.Model``.
        subfolder: of ``directory``, as PEFT has it for adapters with a name.
        modules_to_save: names of modules that are saved whole, for heads that were trained beside the LoRA layers.
            None: nothing else may be trainable, so that no training is lost; [] saves the LoRA layers alone.
        base_model_name_or_path: for the config; default: what the model's own ``config`` says.
        overwrite: replace an adapter that is there.

    Returns:
        The directory that was written.

    Raises:
        AdapterExistsError (a ValueError and FileExistsError): an adapter is there and ``overwrite`` is False.
        AdapterError (a ValueError): NaN or infinity in a factor; parameters outside the LoRA layers require grad and
            ``modules_to_save`` does not say what becomes of them; ``subfolder`` leaves the directory.
        ValueError: no LoRA layers, or no such task. TypeError: an argument of another type.
    """
    folder = adapter_folder(directory, subfolder)
    target = look(model, task)
    if target.kind not in ("lora", "task"):
        raise ValueError(_not_ours(target, task))
    bias = _bias_kind(model, target)
    saved = _modules_to_save(target, bias, modules_to_save)
    settings, tensors = {}, {}
    for place in target.own_places():
        settings[place.path] = _settings(place)
        for part in ("lora_a", "lora_b", *(["magnitude"] if place.dora else [])):
            tensors[factor_key(place.path, part, place.embedding)] = getattr(place.lora, part)
    if len({layer.use_dora for layer in settings.values()}) > 1:
        raise AdapterError("nothing was saved: some layers use DoRA and some do not, which PEFT's config cannot say")
    for key, tensor in target.base.items():
        path, _, name = key.rpartition(".")
        biased = name == "bias" and (bias == "all" or (bias == "lora_only" and path in settings))
        if biased or any(f".{path}.".find(f".{module}.") >= 0 for module in saved):
            tensors[base_key(key, settings)] = tensor
    broken = [key for key, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise AdapterError(f"nothing was saved: NaN or infinity in {list_keys(broken)}")
    base = base_model_name_or_path or getattr(getattr(unwrap(model), "config", None), "name_or_path", None) or None
    if len({layer.lora_dropout for layer in settings.values()} - {None}) > 1:
        warnings.warn("lora_dropout differs between layers; the config can only say the commonest", stacklevel=2)
    _warn_of_peft(target, settings, "PeftModel.from_pretrained will compute something else with these files")
    config = describe(settings, target.names, bias, saved, base)
    layers = {path: [layer.r, layer.scale] for path, layer in settings.items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps({"version": 1, "layers": layers})}
    write_adapter(folder, config, tensors, metadata, overwrite)
    return folder


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    task: str | None = None,
    subfolder: str | None = None,
    adapter_dtype: torch.dtype | None = None,
    overwrite_base: bool = False,
    follow_symlinks: bool = False,
) -> nn.Module:
    """Load an adapter that :func:`save_adapter` or PEFT wrote, in place, all or nothing.

    A model without LoRA gets it first, on the layers the file has tensors for, as :func:`apply_lora` does it; a
    ``tasks.Model`` without the task gets the task. Where LoRA is there already, layers, ranks and scales must agree.

    Args:
        model: a model with or without LoRA, or a ``tasks.Model``.
        directory, subfolder: of adapter_config.json and adapter_model.safetensors.
        task: of a ``tasks.Model``; a new name makes a new task.
        adapter_dtype: of factors that are made; default as in :func:`apply_lora`. The file's values are converted.
        overwrite_base: let the file write over weights of the base model (``modules_to_save``, resized embeddings).
            Biases that the config's ``bias`` says were trained are loaded without it.
        follow_symlinks: read files through links that leave the directory. The hub's cache needs no permission.

    Returns:
        ``model`` itself.

    Raises:
        AdapterError (a ValueError): the files are broken or do not fit; the message lists everything that is wrong and
            the model is as it was.
        ValueError, TypeError: an argument.
    """
    files = read_adapter(adapter_folder(directory, subfolder), follow_symlinks)
    config = parse_config(files.config, str(files.directory / CONFIG_FILE))
    return load_into(model, files, config, task=task, adapter_dtype=adapter_dtype, overwrite_base=overwrite_base)


def load_into(
    model: nn.Module,
    files: AdapterFiles,
    config: AdapterConfig,
    *,
    task: str | None,
    adapter_dtype: torch.dtype | None,
    overwrite_base: bool,
) -> nn.Module:
    """What :func:`load_adapter` does once the files are read and the config is understood."""
    target = look(model, task)
    if target.kind == "peft":
        raise TypeError("this is a PeftModel: use its own load_adapter, and patch_peft to run it fused")
    if adapter_dtype is not None and target.kind != "plain":
        raise ValueError(f"adapter_dtype={adapter_dtype} is for a model without LoRA: this one has its factors already")
    result = compare(files, config, target, overwrite_base)
    blocking = [finding for finding in result.findings if finding.blocks]
    if blocking:
        raise AdapterError(f"{files.directory} does not fit this model; nothing was loaded; {list_findings(blocking)}")
    rounded = [finding.where for finding in result.findings if "will be rounded" in finding.detail]
    if rounded and adapter_dtype is None:
        warnings.warn(f"rounded to the dtype of the model's factors: {list_keys(rounded)}", stacklevel=3)
    if METADATA_KEY not in files.metadata:
        _warn_of_peft(target, result.factors, "if PEFT trained these factors, it computed something else with them", 4)
    if target.kind == "plain":
        inject.apply_lora(unwrap(model), _lora_config(config, result), adapter_dtype=adapter_dtype)
    elif target.kind == "new task":
        assert task is not None
        _add_task(unwrap(model), task, config, result, target)
    _copy(look(model, task), result)
    return model


def check_adapter(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    task: str | None = None,
    subfolder: str | None = None,
    follow_symlinks: bool = False,
) -> AdapterReport:
    """Report what would go wrong, loudly or silently, if this adapter were loaded into this model.

    Args:
        directory, subfolder: of the adapter.
        model: what it is meant for: a model with or without LoRA, a ``tasks.Model`` (with ``task``) or a ``PeftModel``,
            on the meta device too. None: the files alone.
        task: of a ``tasks.Model``, there or new.
        follow_symlinks: as in :func:`load_adapter`.

    Returns:
        The report; files that cannot be read at all are a finding in it too.
    """
    folder = adapter_folder(directory, subfolder)
    target = None if model is None else look(model, task, any_task=True)
    against = "itself alone" if model is None else type(unwrap(model)).__name__
    try:
        files = read_adapter(folder, follow_symlinks)
        result = compare(files, parse_config(files.config, str(folder / CONFIG_FILE)), target)
    except AdapterError as error:
        finding = Finding("file" if error.file else "config", error.file or CONFIG_FILE, str(error))
        return AdapterReport(str(folder), against, (), (), (), (), (finding,))
    layers = [AdapterLayer(name, r, result.scales[name]) for name, r in result.ranks.items()]
    faulty = {
        path for path, parts in result.factors.items() if any(result.has(w, *BLOCKING) for w in (path, *parts.values()))
    }
    fitting, unfit = (tuple(layer for layer in layers if (layer.name in faulty) == bad) for bad in (False, True))
    dtypes = tuple(sorted({str(stored.dtype).removeprefix("torch.") for stored in files.stored.values()}))
    return AdapterReport(str(folder), against, fitting, unfit, tuple(result.unmatched), dtypes, tuple(result.findings))


def _not_ours(target: Target, task: str | None) -> str:
    if target.kind == "peft":
        return "this is a PeftModel: its own save_pretrained writes these files"
    if target.kind == "new task":
        return f"unknown task {task!r}: add_task makes it"
    return "there is no LoRA layer in this model; was apply_lora called on it?"


def _warn_of_peft(target: Target, paths: Iterable[str], so: str, stacklevel: int = 3) -> None:
    lost = [f"{path} ({place.lost_in_peft})" for path in paths if (place := target.places[path]).lost_in_peft]
    if lost:
        warnings.warn(
            f"PEFT leaves a setting of a convolution out of lora_A: {list_keys(lost)}; {so}", stacklevel=stacklevel
        )


def _settings(place: Place) -> LayerSettings:
    layer = place.lora
    if not isinstance(layer, LoRALayer):
        raise AdapterError(f"{place.path} cannot be saved: {place.refusal}, which PEFT's files have no keys for")
    if any(t.is_meta or hasattr(t, "full_tensor") for t in layer.trained()):
        raise AdapterError(f"nothing was saved: the factors of {place.path} are sharded or on the meta device")
    dropout = None if place.embedding else layer.lora_dropout
    transposed = getattr(layer, "fan_in_fan_out", False)
    return LayerSettings(
        layer.r, layer.scale, layer.lora_alpha, layer.use_rslora, layer.magnitude is not None, dropout, transposed
    )


def _bias_kind(model: nn.Module, target: Target) -> str:
    """Which biases belong to the adapter: what apply_lora was told."""
    if target.kind == "task":
        return "none"
    record = unwrap(model).__dict__.get(inject._RECORD)
    return "none" if record is None else record.bias


def _modules_to_save(target: Target, bias: str, names: Iterable[str] | None) -> list[str]:
    if names is not None:
        saved = [names] if isinstance(names, str) else list(names)
        for name in saved:
            if not isinstance(name, str) or name not in target.aliases or not name:
                raise ValueError(f"modules_to_save: there is no module {name!r}")
            if name in target.places:
                raise ValueError(f"modules_to_save: {name!r} has LoRA")
        return saved
    trained = [
        key
        for key, t in target.base.items()
        if t.requires_grad and not (bias != "none" and key.rpartition(".")[2] == "bias")
    ]
    if trained:
        raise AdapterError(
            f"nothing was saved: {list_keys(trained)} require grad and are in no LoRA layer; name their modules in "
            "modules_to_save to save them whole, or pass modules_to_save=[] to save the LoRA layers alone"
        )
    return []


def _lora_config(config: AdapterConfig, result: Comparison) -> LoRAConfig:
    """A config for exactly the layers of the file, in expressions of our own making."""
    settings = _task_settings(config, result, {}) | {"bias": config.bias, "use_dora": config.use_dora}
    return LoRAConfig(target_modules=_any_of(result.factors), **settings)


def _task_settings(config: AdapterConfig, result: Comparison, others: Mapping[str, int]) -> dict[str, Any]:
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "rank_pattern": _patterns({**result.ranks, **others}, config.r),
        "alpha_pattern": _patterns(result.alphas, config.lora_alpha),
    }


def _patterns(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    different = sorted({value for value in values.values() if value != usual})
    return {f"^(?:{_any_of(n for n in values if values[n] == value)})": value for value in different}


def _any_of(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in names)


def _add_task(model: Any, task: str, config: AdapterConfig, result: Comparison, target: Target) -> None:
    # Wrapped layers that the adapter leaves alone get the smallest LoRA there is, with zero delta.
    others = {place.path: place.groups for place in target.own_places() if place.path not in result.factors}
    model.add_task(task, **_task_settings(config, result, others))


@torch.no_grad()
def _copy(target: Target, result: Comparison) -> None:
    tensors = result.tensors
    for path, parts in result.factors.items():
        layer = target.places[path].lora
        assert layer is not None
        for part, key in parts.items():
            getattr(layer, part).copy_(tensors[key])
        layer._remerge()
    for inner, key in result.base.items():
        target.base[inner].copy_(tensors[key])
