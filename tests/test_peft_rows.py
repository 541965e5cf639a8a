"""Which test covers which situation of a PEFT layer, and that none is left without one.

``SITUATIONS`` numbers what happens to PEFT models in use (1 to 27; the named ones are this library's own additions);
each names the tests that hold a patched model against the unpatched one: ``torch.equal`` where PEFT's forward runs, the
accuracy rule where the fused one does. ``DOCS`` says which of them stand behind each row of the table in docs/peft.md.

A test is written ``file::function`` without their ``test_``, and ``[part]`` for a part of its parameters' id.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SITUATIONS = """
1: disabled adapters
    peft_fallback::falls_back_to_peft_exactly[disable]
    peft_fallback::falls_back_to_peft_exactly[merge_then_disable]
    peft_patch::operations_work_as_before
2: merged adapters
    peft_fallback::falls_back_to_peft_exactly[merge]
    peft_patch::operations_work_as_before[merge-unmerge]
3: a batch of mixed adapters
    peft_mixed::mixed_batches
    peft_mixed::mixed_batches_keep_adapters_apart
    peft_mixed::mixed_batches_that_peft_must_decide
    peft_mixed::mixed_batches_on_peft_s_forward
    peft_mixed::mixed_batches_with_another_scaling
    peft_mixed::gradients_of_mixed_batches
    peft_mixed::gradients_of_mixed_batches_of_any_shape
    peft_mixed::gradients_of_mixed_batches_that_are_asked_for
    peft_mixed::second_derivatives_of_mixed_batches
    peft_mixed::checkpointed_mixed_batches
    peft_mixed::compiled_mixed_batches
    peft_mixed::kept_bytes_of_mixed_batches
4: several active adapters
    peft_numerics::accuracy_rule[several]
    peft_numerics::accuracy_rule[several-one-rank]
    peft_numerics::adapters_of_two_dtypes
    peft_fallback::falls_back_to_peft_exactly[several_dtypes]
    peft_patch::fused_in_eager_mode_only[several]
    peft_fallback::torch_dropout_where_it_is_not_fused[two-dtypes]
5: an active adapter that is not on the layer
    peft_situations::an_active_adapter_that_the_layer_lacks
    peft_situations::an_active_adapter_that_only_some_layers_have
    peft_fallback::falls_back_to_peft_exactly[absent]
6: DoRA and the other variants
    peft_numerics::accuracy_rule[dora]
    peft_numerics::accuracy_rule[dora-conv1d]
    peft_numerics::dora_starts_as_the_frozen_layer
    peft_numerics::dora_norm_follows_every_write
    peft_fallback::a_vector_through_dora_keeps_peft_s_shape
    peft_numerics::dropout_with_the_same_mask[dora]
    peft_patch::fused_in_eager_mode_only[dora]
    peft_fallback::torch_dropout_where_it_is_not_fused[dora]
    peft_fallback::falls_back_to_peft_exactly[several_dora]
    peft_situations::variants_run_peft_s_forward
7: a bias of lora_B
    peft_numerics::accuracy_rule[lora-bias]
8: dropout
    peft_numerics::dropout_with_the_same_mask
    peft_numerics::dropout_statistics_and_independence
    peft_numerics::torch_dropout_is_peft_bit_for_bit
    peft_numerics::kept_bytes
9: autocast
    peft_numerics::accuracy_rule[R3-autocast]
    peft_numerics::accuracy_rule[R3-base16]
    peft_numerics::kept_bytes[R3-autocast]
    peft_situations::autocast_of_a_16_bit_x_over_a_float32_base
10: float32 adapters over a 16-bit base
    peft_numerics::accuracy_rule[R1-bf16]
    peft_numerics::accuracy_rule[R1-fp16]
    peft_numerics::kept_bytes[R1-bf16]
11: gradient checkpointing
    peft_numerics::checkpointing_recomputes_the_same
    peft_situations::checkpointed_as_peft
    peft_situations::a_llama_that_checkpoints_itself
12: A, B or x that wants no gradient
    peft_situations::only_the_gradients_asked_for
13: a trainable bias of the base
    peft_numerics::accuracy_rule[trained-bias]
    peft_numerics::accuracy_rule[no-bias]
14: a scaling of zero, below zero, or in a tensor
    peft_numerics::scaling
    peft_numerics::scaling_zero_does_not_hide_infinity
    peft_patch::operations_work_as_before[scale]
    peft_fallback::falls_back_to_peft_exactly[nan_scaling]
15: ranks padded for hot swapping
    peft_numerics::hotswap_padding
    peft_patch::hotswap_into_a_patched_model
16: FSDP2 around blocks
    peft_sharded::fsdp2[block]
    peft_sharded::fsdp2[layer-after]
17: FSDP2 around the layer before it is patched
    peft_sharded::fsdp2[layer-before]
18: FSDP2 around a factor alone
    peft_sharded::fsdp2[factor]
19: DTensors
    peft_sharded::dtensors_and_tensor_parallelism[all_distributed]
    peft_sharded::dtensors_and_tensor_parallelism[base_distributed]
20: tensor parallelism
    peft_sharded::dtensors_and_tensor_parallelism[parallel_styles]
    peft_fallback::falls_back_to_peft_exactly[pre-base_layer]
    peft_fallback::falls_back_to_peft_exactly[instance-base_layer]
    peft_fallback::falls_back_to_peft_exactly[pre-lora_A.default]
    peft_fallback::falls_back_to_peft_exactly[instance-lora_A.default]
21: tied and strided factors
    peft_situations::tied_adapters_of_a_tied_llama
    peft_numerics::tied_and_strided_factors
22: hooks of accelerate
    peft_fallback::accelerate_hooks
    peft_fallback::falls_back_to_peft_exactly[instance-base_layer]
23: x of any rank, rows and strides
    peft_numerics::shapes_of_x
    peft_numerics::strides
24: x that does not fit
    peft_fallback::bad_input_raises_what_peft_raises
25: torch.compile
    peft_patch::recompile_budget
    peft_patch::compiles_without_a_graph_break
    peft_situations::inductor
    peft_situations::a_llama_compiles_to_one_graph_as_in_peft
26: torch.func
    peft_fallback::functorch_forward_mode_and_dispatch_modes
27: double backward
    peft_numerics::double_backward
inference: a base made in inference mode
    peft_fallback::a_base_made_in_inference_mode_trains_as_in_peft
in place: x is written in place between the forward and its backward
    peft_situations::x_written_in_place
files: state dict, config and saved bytes
    peft_patch::files_and_state_dict_are_identical
operations: merging, weighting, switching, deleting, copying, pickling, the status
    peft_patch::operations_work_as_before
    peft_patch::saved_whole_and_loaded_in_one_line
    peft_patch::patching_is_idempotent_and_undone
    peft_patch::layers_added_later_are_reported
patterns: ranks and alphas by layer, rsLoRA
    peft_situations::a_whole_llama
    peft_numerics::accuracy_rule[rslora]
conv1d: transformers' Conv1D
    peft_numerics::accuracy_rule[conv1d]
    peft_numerics::shapes_of_x[conv1d]
one dtype: adapters in the base's dtype
    peft_numerics::accuracy_rule[R2-bf16]
    peft_numerics::accuracy_rule[R2-fp16]
    peft_numerics::accuracy_rule[R4-fp32]
mixtures: other mixtures of dtypes
    peft_fallback::falls_back_to_peft_exactly[half_adapter]
    peft_fallback::input_casting_off
other layers: layers that are no lora.Linear
    peft_patch::report_names_every_layer_and_strict_changes_nothing
    peft_situations::a_subclass_of_peft_s_layer_is_left_alone
base: a base layer that is more than nn.Linear
    peft_fallback::falls_back_to_peft_exactly[subclassed_base]
    peft_fallback::falls_back_to_peft_exactly[parametrized_base]
    peft_fallback::falls_back_to_peft_exactly[weight_norm_base]
hooks: hooks inside the layer, of every kind
    peft_fallback::falls_back_to_peft_exactly[forward-base_layer]
    peft_fallback::falls_back_to_peft_exactly[pre-base_layer]
    peft_fallback::falls_back_to_peft_exactly[backward-base_layer]
    peft_fallback::falls_back_to_peft_exactly[instance-base_layer]
    peft_fallback::falls_back_to_peft_exactly[forward-lora_A.default]
    peft_fallback::falls_back_to_peft_exactly[forward-lora_B.default]
    peft_fallback::falls_back_to_peft_exactly[forward-lora_dropout.default]
    peft_fallback::global_hooks
    peft_fallback::falls_back_to_peft_exactly[other_dropout]
own hooks: hooks on the LoRA layer
    peft_fallback::hooks_on_the_layer_itself_fire
trainable: a trainable base weight
    peft_fallback::falls_back_to_peft_exactly[trainable_base]
modes: dispatch modes, tracing, export
    peft_fallback::functorch_forward_mode_and_dispatch_modes
    peft_fallback::selective_checkpointing
    peft_fallback::export
"""
SITUATIONS = {block.partition(":")[0]: block.splitlines() for block in re.split(r"\n(?=\w)", SITUATIONS.strip())}
# How a row of docs/peft.md's table begins: the situations it speaks of.
DOCS = {
    "adapters are disabled or merged": [1, 2, 5],
    "the base layer has a bias": [13],
    "`lora_bias`, `use_rslora`": [7, "patterns"],
    "`scaling` is 0": [14, 15],
    "tied, transposed or strided factors": [21],
    "transformers' `Conv1D`": ["conv1d"],
    "float32 adapters over": [10],
    "adapters in the base's dtype": ["one dtype"],
    "autocast": [9],
    "other mixtures of dtypes": ["mixtures"],
    "`lora_dropout`": [8],
    '`lora_dropout` with `patch_peft(model, dropout="torch")`': [8],
    "several active adapters": [4],
    "mixed batches": [3],
    "`use_dora`": [6],
    "other variants": [6],
    "embeddings, convolutions": ["other layers"],
    "a base layer that is a subclass": ["base"],
    "hooks, or a forward of its own": ["hooks", 20, 22],
    "hooks on the LoRA layer itself": ["own hooks", 22],
    "the base weight is trainable": ["trainable"],
    "A, B or x without requires_grad": [12],
    "gradient checkpointing": [11],
    "FSDP2 around whole blocks": [16],
    "FSDP2 around the LoRA layer before": [17],
    "FSDP around lora_A or lora_B alone": [18, 19],
    "x of any rank": [23],
    "x of a wrong width": [24],
    "a base made in inference mode": ["inference"],
    "`torch.compile`": [25],
    "`torch.func`": [26, "modes"],
    "double backward": [27],
    "x is written in place": ["in place"],
}


@pytest.fixture(scope="module")
def collected():
    """The ids of the tests in this folder's test_peft_*.py, as pytest collects them in a process of its own."""
    files = sorted(path.name for path in TESTS.glob("test_peft_*.py") if path.name != Path(__file__).name)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTEST_ADDOPTS": ""}
    listing = subprocess.run(
        [*command, *files], cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300
    )
    assert listing.returncode == 0, listing.stdout + listing.stderr
    return re.findall(r"^(?:.*/)?test_(\w+)\.py::test_(.*)$", listing.stdout, re.M)


def found(test, collected):
    file, _, name = test.partition("::")
    function, _, part = name.rstrip("]").partition("[")
    wanted = re.compile(rf"{function}\[(.*-)?{re.escape(part)}(-.*)?\]" if part else rf"{function}(\[.*)?")
    return any(where == file and wanted.fullmatch(what) for where, what in collected)


def test_the_numbered_situations_are_complete():
    assert [key for key in SITUATIONS if key.isdigit()] == [str(number) for number in range(1, 28)]


@pytest.mark.parametrize("key", SITUATIONS)
def test_every_situation_has_the_tests_it_names(key, collected):
    title, *tests = SITUATIONS[key]
    assert tests, title
    missing = [test.strip() for test in tests if not found(test.strip(), collected)]
    assert not missing, f"{title}: there is no {', '.join(missing)}"


def test_every_row_of_the_docs_is_a_situation():
    text = (TESTS.parent / "docs" / "peft.md").read_text()
    table = text.split("## What happens when …")[1].split("##")[0]
    rows = re.findall(r"^\| ([^| \n][^|]*?) \|", table, re.M)
    for row in rows:
        assert any(row.startswith(opening) for opening in DOCS), f"no situation for: {row}"
    for opening, keys in DOCS.items():
        assert any(row.startswith(opening) for row in rows), f"no row begins with: {opening}"
        assert all(str(key) in SITUATIONS for key in keys), opening
    assert len(rows) == len(DOCS)
    spoken_of = [str(key) for keys in DOCS.values() for key in keys]
    assert all(key in spoken_of for key in SITUATIONS if key.isdigit())
