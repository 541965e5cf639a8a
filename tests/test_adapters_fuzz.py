"""Broken adapters by the hundred: loading gives finite values or AdapterError, never anything else."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_adapters_files import VALUES, adapted, make_net

from fused_lora import AdapterError, load_adapter, save_adapter
from fused_lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = save_adapter(adapted(), tmp_path_factory.mktemp("fuzz"))
    return folder, (folder / WEIGHTS_FILE).read_bytes(), (folder / CONFIG_FILE).read_bytes()


def survives(folder):
    """It loads finite values, or it is our error and nothing else."""
    model = make_net()
    try:
        load_adapter(model, folder)
    except AdapterError:
        assert set(model.state_dict()) == set(make_net().state_dict())
    else:
        assert all(torch.isfinite(t).all() for t in model.state_dict().values())


BOUNDED = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@BOUNDED
@given(cut=st.integers(0, 2000), place=st.integers(0, 2000), new=st.binary(max_size=12), which=st.booleans())
def test_fuzz_bytes(good, cut, place, new, which):
    folder, weights, config = good
    data = weights if which else config
    data = data[: len(data) - cut % len(data)] if cut % 3 == 0 else data
    place %= len(data)
    data = data[:place] + new + data[place + (len(new) if cut % 2 else 0) :]
    (folder / WEIGHTS_FILE).write_bytes(data if which else weights)
    (folder / CONFIG_FILE).write_bytes(config if which else data)
    survives(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@BOUNDED
@given(changes=st.dictionaries(st.sampled_from(sorted(VALUES)), JSON, max_size=3))
def test_fuzz_config(good, changes):
    folder, weights, config = good
    (folder / WEIGHTS_FILE).write_bytes(weights)
    (folder / CONFIG_FILE).write_text(json.dumps(json.loads(config) | changes))
    survives(folder)


KEYS = [f"base_model.model.{n}.{s}" for n in "012" for s in ("lora_A.weight", "lora_B.weight", "weight", "bias")]
SHAPES = st.sampled_from([(2, 3), (4, 2), (2, 4), (2, 2), (4,), (), (0, 3), (2, 3, 1)])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool])


@BOUNDED
@given(tensors=st.dictionaries(st.sampled_from(KEYS), st.tuples(SHAPES, DTYPES, st.sampled_from([0.5, float("nan")]))))
def test_fuzz_tensors(good, tensors):
    folder, _, config = good
    made = {
        key: torch.full(shape, 1 if dtype in (torch.int8, torch.bool) else value, dtype=dtype)
        for key, (shape, dtype, value) in tensors.items()
    }
    save_file(made, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_bytes(config)
    survives(folder)
