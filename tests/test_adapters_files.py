"""The adapter's directory: nothing is lost by a crash, nothing is trusted that is read."""

import json
import os
import time

import pytest
import torch
from torch import nn

from fused_lora import AdapterError, LoRAConfig, adapter_files, apply_lora, check_adapter, load_adapter, save_adapter
from fused_lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterExistsError


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def adapted(seed=0):
    model = apply_lora(make_net(), LoRAConfig(r=2, target_modules=["0", "1"]))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    return save_adapter(adapted(), tmp_path / "adapter")


# ---- writing


@pytest.mark.parametrize("at", ["write", "fsync", "replace", "second replace", "save"])
def test_a_crash_leaves_the_old_files_whole(folder, monkeypatch, at):
    before = content(folder)
    calls = []

    def crash(*args, **kwargs):
        calls.append(args)
        if at == "second replace" and len(calls) == 1:
            return real(*args, **kwargs)
        raise OSError("the disk is full")

    owner, name = {
        "write": (os, "fdopen"),
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
        "second replace": (os, "replace"),
        "save": (adapter_files.json, "dumps"),
    }[at]
    real = getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash)
        with pytest.raises(OSError, match="disk is full"):
            save_adapter(adapted(1), folder, overwrite=True)
    after = content(folder)
    assert sorted(after) == sorted(before)  # no temporary file is left
    assert after[CONFIG_FILE] == before[CONFIG_FILE]
    if at != "second replace":
        assert after == before
    load_adapter(make_net(), folder)


def test_half_a_save_shows(folder, monkeypatch):
    """New weights beside the old config: the scale they were saved with is in them."""
    model = adapted(1)
    for layer in (model[0], model[1]):
        layer.set_alpha(3)
    real, calls = os.replace, []

    def crash(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("no power")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="no power"):
            save_adapter(model, folder, overwrite=True)
    with pytest.raises(AdapterError, match=r"saved with scale 1\.5, the config beside it gives 4: .*interrupted"):
        load_adapter(make_net(), folder)


def test_files_are_on_disk_before_they_get_their_names(folder, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (events.append(name), real(*args))[1])
    save_adapter(adapted(), folder, overwrite=True)
    assert events == ["fsync", "fsync", "replace", "replace", "fsync"]


def test_nothing_is_overwritten_unasked(folder):
    before = content(folder)
    with pytest.raises(AdapterExistsError, match="overwrite=True"):
        save_adapter(adapted(1), folder)
    with pytest.raises(FileExistsError):
        save_adapter(adapted(1), folder)
    assert content(folder) == before
    save_adapter(adapted(1), folder, overwrite=True)
    assert content(folder)[WEIGHTS_FILE] != before[WEIGHTS_FILE]
    for name in (CONFIG_FILE, "adapter_model.bin"):
        other = folder.parent / name.split(".")[1]
        other.mkdir()
        (other / name).write_text("a user's")
        with pytest.raises(AdapterExistsError, match="already"):
            save_adapter(adapted(), other)


def test_other_files_stay(folder):
    (folder / "README.md").write_text("mine")
    save_adapter(adapted(1), folder, overwrite=True)
    assert (folder / "README.md").read_text() == "mine"


def test_a_link_is_replaced_and_not_written_through(folder):
    precious = folder.parent / "precious"
    precious.write_text("a user's")
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).symlink_to(precious)
    save_adapter(adapted(), folder, overwrite=True)
    assert precious.read_text() == "a user's"
    assert not (folder / WEIGHTS_FILE).is_symlink()


def test_permissions_are_those_of_any_new_file(folder):
    plain = folder / "plain"
    plain.write_text("")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (folder / name).stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "", ".", "..", "a//b", "a\\..\\b", "C:x", "a\0b"])
def test_names_that_would_leave_the_directory(folder, tmp_path, name):
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for call in (
        lambda: save_adapter(adapted(), tmp_path / "new", subfolder=name),
        lambda: load_adapter(make_net(), folder, subfolder=name),
        lambda: check_adapter(folder, subfolder=name),
    ):
        with pytest.raises(AdapterError, match="subfolder"):
            call()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_subfolders(tmp_path):
    assert save_adapter(adapted(), tmp_path, subfolder="runs/second") == tmp_path / "runs" / "second"
    load_adapter(make_net(), tmp_path, subfolder="runs/second")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(AdapterError, match="leaves"):
        save_adapter(adapted(), tmp_path, subfolder="link")
    assert not list(outside.iterdir())


def test_paths_that_are_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is a file"):
        save_adapter(adapted(), tmp_path / "file")
    with pytest.raises(AdapterError, match="is a file"):
        load_adapter(make_net(), tmp_path / "file")
    with pytest.raises(AdapterError, match="no directory"):
        load_adapter(make_net(), tmp_path / "none")
    with pytest.raises(AdapterError, match=f"no {CONFIG_FILE}"):
        load_adapter(make_net(), tmp_path)
    for wrong in (None, "", 3):
        with pytest.raises(TypeError, match="path"):
            load_adapter(make_net(), wrong)


# ---- reading: links


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_links_out_of_the_directory(folder, tmp_path, name):
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(AdapterError, match="follow_symlinks=True"):
        load_adapter(make_net(), folder)
    assert not check_adapter(folder).ok
    load_adapter(make_net(), folder, follow_symlinks=True)
    outside.rename(folder / "inside")
    (folder / name).unlink()
    (folder / name).symlink_to("inside")
    load_adapter(make_net(), folder)
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    with pytest.raises(AdapterError):
        load_adapter(make_net(), folder)


def test_the_hub_cache_is_made_of_links(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).rename(blobs / name[:9])
        (snapshot / name).symlink_to(f"../../blobs/{name[:9]}")
        if name == CONFIG_FILE:
            (blobs / name[:9]).rename(blobs / "c")
            (snapshot / name).unlink()
            (snapshot / name).symlink_to("../../blobs/c")
    load_adapter(make_net(), snapshot)


def test_no_pipes(folder):
    (folder / WEIGHTS_FILE).unlink()
    os.mkfifo(folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match="not a regular file"):
        load_adapter(make_net(), folder)


def test_pickles_are_refused_with_the_way_out(folder):
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"pickle.*weights_only=True"):
        load_adapter(make_net(), folder)


# ---- reading: broken files


def refused(folder, *words):
    """Loading raises our error in little time, the report says the same, and the model is as it was."""
    model, start = make_net(), time.perf_counter()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(AdapterError) as error:
        load_adapter(model, folder)
    assert not check_adapter(folder, make_net()).ok
    assert time.perf_counter() - start < 20
    message = str(error.value).replace(str(folder), "")  # which holds the test's name
    assert all(word in message for word in words), message
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def file_of(header, data=b"", length=None):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(start, stop, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


WEIGHTS = {
    "empty": (b"", "cut short"),
    "seven bytes": (b"1234567", "cut short"),
    "huge header": (file_of(b"{}", length=1 << 62), "cut short"),
    "header past the end": (file_of(b"{}", length=100), "cut short"),
    "no JSON": (file_of(b"not json"), "not valid JSON"),
    "no text": (file_of(b"\xff\xfe"), "not valid JSON"),
    "a list": (file_of([]), "a list"),
    "nested": (file_of(b"[" * 100_000), "not valid JSON"),
    "key twice": (file_of(b'{"a": 1, "a": 2}'), "twice"),
    "long number": (file_of(b'{"a": ' + b"9" * 10_000 + b"}"), WEIGHTS_FILE),
    "no tensor": (file_of({"a": 5}), "not a tensor"),
    "no shape": (file_of({"a": {"dtype": "F32"}}), "'a'"),
    "a negative shape": (file_of({"a": entry(0, 4, [-1])}, bytes(4)), "'a'"),
    "a shape of bools": (file_of({"a": entry(0, 4, [True])}, bytes(4)), "'a'"),
    "many dimensions": (file_of({"a": entry(0, 4, [1 << 62] * 100_000)}, bytes(4)), "'a'"),
    "a huge shape": (file_of({"a": entry(0, 4, [1 << 62, 1 << 62])}, bytes(4)), "does not take"),
    "an odd dtype": (file_of({"a": entry(0, 4, dtype="F4")}, bytes(4)), "F4"),
    "a dtype that is a list": (file_of({"a": entry(0, 4, dtype=[])}, bytes(4)), "dtype"),
    "overlap": (file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlap"),
    "gap": (file_of({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "gap"),
    "too little data": (file_of({"a": entry(0, 8)}, bytes(4)), "cut short"),
    "too much data": (file_of({"a": entry(0, 4)}, bytes(8)), "cut short"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "metadata"),
    "metadata that is a list": (file_of({"__metadata__": [1]}), "metadata"),
    "no tensors": (file_of({}), "no tensor of a LoRA layer"),
}


@pytest.mark.parametrize(("data", "word"), WEIGHTS.values(), ids=WEIGHTS)
def test_broken_weights(folder, data, word):
    (folder / WEIGHTS_FILE).write_bytes(data)
    refused(folder, word)


def test_a_header_is_bounded_before_memory_is_taken(folder, monkeypatch):
    with open(folder / WEIGHTS_FILE, "wb") as file:  # a hole: a terabyte that is not there
        file.write((1 << 39).to_bytes(8, "little"))
        file.truncate(1 << 40)
    refused(folder, "header of 549,755,813,888 bytes")
    with open(folder / CONFIG_FILE, "wb") as file:
        file.truncate(1 << 40)
    refused(folder, "more than")


def test_tensors_without_a_place_are_not_read(folder):
    """A hole of a terabyte that the header declares as one tensor: its shape is refused, its values stay unread."""
    header = json.dumps({"base_model.model.0.lora_A.weight": entry(0, 1 << 40, [1 << 36, 4])}).encode()
    with open(folder / WEIGHTS_FILE, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 40))
    refused(folder, "rank")


CONFIGS = {
    "empty": (b"", "not valid JSON"),
    "no JSON": (b"{r: 8}", "not valid JSON"),
    "a list": (b"[1, 2]", "a list"),
    "a string": (b'"LORA"', "a str"),
    "NaN": (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
    "infinity": (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha"),
    "nested": (b'{"a":' * 50_000, "not valid JSON"),
    "twice": (b'{"peft_type": "LORA", "r": 2, "r": 4}', "'r' appears twice"),
}


@pytest.mark.parametrize(("data", "word"), CONFIGS.values(), ids=CONFIGS)
def test_broken_configs(folder, data, word):
    (folder / CONFIG_FILE).write_bytes(data)
    refused(folder, word, CONFIG_FILE)


VALUES = {
    "peft_type": ["IA3", None, 3],
    "r": [0, -1, "4", 1e12, 10**12, 2.0, True, None],
    "lora_alpha": ["16", None, [16], True],
    "lora_dropout": [-0.1, 1.1, "0", None],
    "use_rslora": [1, "true", None],
    "bias": ["some", None, 0],
    "target_modules": [3, ["0", 1], {"0": 1}, [""]],
    "exclude_modules": [3, [None]],
    "rank_pattern": [[1], {"0": "2"}, {"0": 0}, {"0": None}, "0"],
    "alpha_pattern": [{"0": "2"}, {"0": None}],
    "layers_to_transform": ["1", -1, [1.5], True],
    "layers_pattern": [3, [3]],
    "modules_to_save": [3, [None]],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", None, 3],
    "use_dora": ["yes"],
    "lora_bias": [True],
    "layer_replication": [[[0, 1]]],
    "target_parameters": [["w"]],
    "trainable_token_indices": [[1]],
    "alora_invocation_tokens": [[1]],
    "use_bdlora": [{"x": 1}],
    "something_new": [True],
}


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in VALUES.items() for v in values], ids=lambda value: str(value)
)
def test_wrong_values_in_the_config(folder, field, value):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {field: value}))
    refused(folder, field)


def test_all_faults_of_a_config_are_in_one_message(folder):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"r": 0, "lora_alpha": "x", "lora_bias": True}))
    refused(folder, "r must be", "lora_alpha must be", "lora_bias=True", "patch_peft")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*.*)*x", "(a?){60}a{60}", "((a*)*)*b"])
def test_patterns_with_nested_quantifiers_do_not_hang(tmp_path, field, pattern):
    name = "a" * 300
    model = apply_lora(nn.ModuleDict({name: nn.Linear(2, 3)}), LoRAConfig(r=2, target_modules=[name]))
    folder = save_adapter(model, tmp_path)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config[field] = {pattern: 2} if field.endswith("pattern") else pattern
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    start = time.perf_counter()
    report = check_adapter(folder, nn.ModuleDict({name: nn.Linear(2, 3)}))
    assert time.perf_counter() - start < 20
    assert report.layers or not report.ok
