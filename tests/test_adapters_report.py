"""Which layers a report counts among those that fit, and how it says so."""

import json
import sys

import adapter_nets as nets
import pytest
import torch
from safetensors.torch import save_file
from test_adapters_check import UP_A, edit, peft_folder  # noqa: F401  (a fixture)
from torch import nn

from fused_lora import LoRAConfig, adapters, apply_lora, check_adapter, load_adapter, save_adapter
from fused_lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from fused_lora.adapter_keys import layer_of

PREFIX = "base_model.model."


def models():
    """None, the plain model, and the model with LoRA."""
    config = LoRAConfig(r=4, lora_alpha=6, target_modules=nets.EVERYTHING)
    return None, nets.make_net(), apply_lora(nets.make_net(), config)


def grow(key):
    return lambda tensors: tensors.update({key: torch.cat([tensors[key]] * 2)})


def break_value(key):
    return lambda tensors: tensors[key].view(-1)[:1].fill_(float("nan"))


UP_B = UP_A.replace("lora_A", "lora_B")
FAULTS = {
    "without its A": (lambda tensors: tensors.pop(UP_A), "missing (1)"),
    "without its B": (lambda tensors: tensors.pop(UP_B), "missing (1)"),
    "another rank": (grow(UP_A), "rank ("),
    "no number": (break_value(UP_B), "values (1)"),
    "whole numbers": (lambda tensors: tensors.update({UP_A: tensors[UP_A].int()}), "dtype (1)"),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_layer_with_a_fault_does_not_fit(peft_folder, name):  # noqa: F811
    change, said = FAULTS[name]
    edit(peft_folder, change)
    for model in models():
        report = check_adapter(peft_folder, model)
        assert not report.ok
        assert [layer.name for layer in report.faulty] == ["up"], str(report)
        assert len(report.layers) == 9
        assert "  9 of 10 layers fit; rank 4; " in str(report)
        assert said in str(report)


def test_a_shape_that_the_model_does_not_have(peft_folder):  # noqa: F811
    edit(peft_folder, grow(UP_B))
    for model in models()[1:]:
        report = check_adapter(peft_folder, model)
        assert [layer.name for layer in report.faulty] == ["up"], str(report)
        assert "  9 of 10 layers fit" in str(report)


def test_layers_without_a_fault_all_fit(peft_folder):  # noqa: F811
    for model in models():
        report = check_adapter(peft_folder, model)
        assert report.ok
        assert (len(report.layers), report.faulty) == (10, ())
        assert "  10 layers; rank 4; " in str(report)


def test_a_fault_beside_layers_without_a_place(peft_folder):  # noqa: F811
    def change(tensors):
        tensors.pop(UP_A)
        for letter in "AB":
            tensors[f"{PREFIX}elsewhere.lora_{letter}.weight"] = torch.ones(4, 4)

    edit(peft_folder, change)
    report = check_adapter(peft_folder, nets.make_net())
    assert report.unmatched == ("elsewhere",)
    assert "  9 of 11 layers fit" in str(report)


def cut(path, size=40):
    path.write_bytes(path.read_bytes()[:size])


UNREADABLE = {  # what is done to the folder; the file that is named, and what is said of it
    "weights cut short": (lambda folder: cut(folder / WEIGHTS_FILE), WEIGHTS_FILE, "is cut short"),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), WEIGHTS_FILE, "has no adapter_model.safetensors"),
    "config cut short": (lambda folder: cut(folder / CONFIG_FILE), CONFIG_FILE, "is not valid JSON"),
    "no config": (lambda folder: (folder / CONFIG_FILE).unlink(), CONFIG_FILE, "has no adapter_config.json"),
    "a pickle": (lambda folder: (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin"), "", "a pickle"),
    "no directory": (lambda folder: folder.rename(folder.with_name("elsewhere")), "", "there is no directory"),
}


@pytest.mark.parametrize("name", list(UNREADABLE))
def test_what_cannot_be_read_is_found_under_its_own_name(peft_folder, name):  # noqa: F811
    change, file, said = UNREADABLE[name]
    change(peft_folder)
    for model in models():
        report = check_adapter(peft_folder, model)
        (finding,) = report.findings
        assert (finding.kind, finding.where) == ("file", file or str(peft_folder))
        assert said in finding.detail
        assert "  file (1): what is not there, broken, or not to be trusted\n" in str(report)
        assert not report.ok


def test_values_that_cannot_be_read_are_the_weights_fault(peft_folder, monkeypatch):  # noqa: F811
    """The header was whole; the file changes before its values are read."""
    whole = adapters.read_adapter

    def read_and_cut(folder, follow_symlinks):
        files = whole(folder, follow_symlinks)
        cut(folder / WEIGHTS_FILE)
        return files

    monkeypatch.setattr(adapters, "read_adapter", read_and_cut)
    (finding,) = check_adapter(peft_folder).findings
    assert (finding.kind, finding.where) == ("file", WEIGHTS_FILE)
    assert "cannot be read" in finding.detail


def test_a_config_that_asks_for_too_much_is_the_configs_fault(peft_folder):  # noqa: F811
    edit(peft_folder, lora_bias=True)
    (finding,) = check_adapter(peft_folder).findings
    assert (finding.kind, finding.where) == ("config", CONFIG_FILE)


CROWDS = {  # how many of n layers have an A, the metadata name, the model has
    "half layers": (1, 0, 0),
    "layers that were saved and are gone": (0, 1, 0),
    "layers that the config targets": (0, 0, 1),
}


def calls(function, *args):
    """How many calls it makes, of Python and of C, each step of a generator among them; and its result."""
    count = 0

    def note(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        result = function(*args)
    finally:
        sys.setprofile(None)
    return count, result


@pytest.mark.parametrize("name", list(CROWDS))
def test_work_grows_with_the_layers_and_not_with_their_square(tmp_path, name):
    """A header may name a hundred thousand layers: each held against every finding, that was most of an hour.

    From n to 2n and from 2n to 4n layers the calls grow by d and by 2d where they are linear, by d and by 4d where they
    are quadratic.
    """
    stored, known, held = CROWDS[name]
    counts = []
    for n in (200, 400, 800):
        tensors = {f"{PREFIX}layers.{i}.lora_A.weight": torch.zeros(1, 1) for i in range(stored * n)}
        layers = {f"layers.{i}": [1, 1.0] for i in range(known * n)}
        save_file(tensors, tmp_path / WEIGHTS_FILE, {"fused_lora": json.dumps({"version": 1, "layers": layers})})
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ".*"}
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
        model = nn.ModuleDict({str(i): nn.Linear(1, 1) for i in range(n)}) if held else None
        count, report = calls(check_adapter, tmp_path, model)
        counts.append(count)
        assert len(report.faulty) == stored * n
        assert sum(finding.kind == "missing" for finding in report.findings) >= n
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    assert second < 3 * first


def test_a_layer_is_not_taken_for_another_whose_name_ends_alike(tmp_path):
    """ "up" is part of "blocks.0.up", of which a tensor is found: that says nothing of "up", which is missing too."""
    layers = {name: [1, 1.0] for name in ("up", "blocks.0.up", "blocks.0")}
    tensors = {f"{PREFIX}blocks.0.up.lora_A.weight": torch.zeros(1, 1)}
    save_file(tensors, tmp_path / WEIGHTS_FILE, {"fused_lora": json.dumps({"version": 1, "layers": layers})})
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    missing = [finding.where for finding in check_adapter(tmp_path).findings if finding.kind == "missing"]
    assert missing == [f"{PREFIX}blocks.0.up.lora_B.weight", "blocks.0", "up"]


@pytest.mark.parametrize(
    ("where", "layer"),
    [
        (UP_A, "up"),
        (f"{PREFIX}a.lora_b.lora_embedding_A", "a.lora_b"),
        (f"{PREFIX}.lora_A.weight", ""),
        (f"{PREFIX}a.bias", f"{PREFIX}a.bias"),
        ("a.lora_b", "a.lora_b"),
        ("lora_alpha", "lora_alpha"),
    ],
)
def test_the_layer_that_a_finding_names(where, layer):
    assert layer_of(where) == layer


@pytest.mark.parametrize("alpha", [1e308, -sys.float_info.max, 10**308], ids=["float", "least", "int"])
def test_any_finite_alpha_goes_there_and_back(tmp_path, alpha):
    """What a layer takes, a file of it gives back; what is no finite number is refused in these words."""
    model = apply_lora(nn.ModuleDict({"q": nn.Linear(2, 3)}), LoRAConfig(r=2, lora_alpha=alpha, target_modules=["q"]))
    folder = save_adapter(model, tmp_path)
    assert check_adapter(folder, model).ok
    assert load_adapter(nn.ModuleDict({"q": nn.Linear(2, 3)}), folder)["q"].scale == alpha / 2
    for value in (10**309, -(10**309)):
        edit(folder, lora_alpha=value, alpha_pattern={"q": value})
        (finding,) = check_adapter(folder).findings
        assert "lora_alpha must be a finite number, got " in finding.detail
        assert "alpha_pattern must be a table of finite numbers, got " in finding.detail
