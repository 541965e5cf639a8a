"""Which layers a report counts among those that fit, and how it says so."""

import adapter_nets as nets
import pytest
import torch
from test_adapters_check import UP_A, edit, peft_folder  # noqa: F401  (a fixture)

from fused_lora import LoRAConfig, apply_lora, check_adapter

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
