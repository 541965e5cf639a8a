"""Where PEFT computes something else with the files of a convolution, its user is told."""

import adapter_nets as nets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fused_lora import check_adapter, load_adapter, save_adapter


@pytest.mark.parametrize(
    ("settings", "lost"),
    [
        ({"padding": 1, "padding_mode": "reflect"}, "padding mode"),
        ({"padding": "same", "dilation": 2}, "dilation"),
        ({"padding_mode": "reflect"}, ""),
        ({"padding": 1, "stride": 2, "groups": 2}, ""),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_what_peft_leaves_out_of_a_convolution_is_said(tmp_path, settings, lost, recwarn):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3, **settings))

    theirs = get_peft_model(net(), LoraConfig(target_modules=["0"], r=2, lora_alpha=2, init_lora_weights=False))
    nets.save_peft(theirs, tmp_path / "peft")
    ours = load_adapter(net(), tmp_path / "peft")
    save_adapter(ours, tmp_path / "ours")
    x = torch.randn(2, 2, 9, 9)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5) is not bool(lost), "does PEFT still leave it out?"
    said = [w for w in recwarn if "PEFT leaves" in str(w.message)]
    assert [(f"0 ({lost})" in str(w.message), w.filename) for w in said] == ([(True, __file__)] * 2 if lost else [])
    for model in (net(), ours, theirs):
        report = check_adapter(tmp_path / "ours", model)
        assert report.ok
        assert (f"0: PEFT leaves its {lost}" in str(report)) is bool(lost)
    load_adapter(net(), tmp_path / "ours")
    assert len([w for w in recwarn if "PEFT leaves" in str(w.message)]) == len(said), "it comes from here"
