"""Files in another tool's format: said once, with the way out, and refused."""

import adapter_nets as nets
import pytest
import torch
from safetensors.torch import save_file
from test_adapters_check import assert_found, edit, peft_folder  # noqa: F401  (a fixture)

from fused_lora import check_adapter
from fused_lora.adapter_files import WEIGHTS_FILE

KOHYA = {
    f"lora_unet_{path}.{end}": torch.ones(shape)
    for path in ("down_blocks_0_to_q", "mid_block_to_k")
    for end, shape in (("lora_down.weight", (4, 6)), ("lora_up.weight", (6, 4)), ("alpha", ()))
}
DIFFUSERS = {
    f"{part}.layers.0.to_q.lora_{letter}.weight": torch.ones(4, 4)
    for part in ("unet", "text_encoder", "text_encoder_2")
    for letter in "AB"
}


@pytest.mark.parametrize(
    ("tensors", "whose", "way_out"),
    [(KOHYA, "kohya's sd-scripts", "lora_down is lora_A"), (DIFFUSERS, "diffusers", "pipeline's part before the path")],
    ids=["kohya", "diffusers"],
)
def test_another_format_is_named_once(peft_folder, tensors, whose, way_out):  # noqa: F811
    save_file(tensors, peft_folder / WEIGHTS_FILE)
    assert_found(peft_folder, "extra", f"6 of 6 tensors are in the format of {whose}", "load_lora_weights", way_out)
    assert len(check_adapter(peft_folder, nets.make_net()).findings) == len(check_adapter(peft_folder).findings) == 1


def test_in_a_file_of_pefts_a_key_of_another_format_is_one_of_many(peft_folder):  # noqa: F811
    edit(peft_folder, lambda tensors: tensors.update(KOHYA))
    found = [finding for finding in check_adapter(peft_folder).findings if finding.kind == "extra"]
    assert {finding.where for finding in found} == set(KOHYA)
