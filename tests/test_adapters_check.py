"""check_adapter: what PEFT takes in silence is named here, and load_adapter refuses it. And the command over it."""

import json
import re
import sys
import warnings

import adapter_nets as nets
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fused_lora import AdapterError, LoRAConfig, apply_lora, check_adapter, cli, load_adapter, save_adapter
from fused_lora.adapter_config import AdapterConfig
from fused_lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from fused_lora.tasks import Model

UP_A = "base_model.model.up.lora_A.weight"


@pytest.fixture
def peft_folder(tmp_path):
    return nets.save_peft(nets.peft_model(), tmp_path / "peft")


@pytest.fixture
def our_folder(tmp_path):
    config = LoRAConfig(r=4, lora_alpha=6, target_modules=nets.EVERYTHING)
    return save_adapter(nets.train(apply_lora(nets.make_net(), config)), tmp_path / "ours")


def edit(folder, change=lambda tensors: None, **config):
    """Rewrite the weights without our metadata's help, as another tool would, and change the config."""
    if config:
        known = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(known | config))
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


def kinds(report):
    return {finding.kind for finding in report.findings if finding.blocks}


def peft_is_silent(folder, net=None):
    """PEFT loads it without an error; a warning is the most it says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(net or nets.make_net(), folder)


def assert_found(folder, kind, *words, net=nets.make_net, only=True):
    """The report and the error both say it, for every kind of model."""
    models = (
        net(),
        apply_lora(net(), LoRAConfig(r=4, lora_alpha=6, target_modules=nets.EVERYTHING)),
        Model(net(), target_modules=nets.EVERYTHING, r=4, lora_alpha=6).add_task("a"),
    )
    for model in models:
        task = "a" if isinstance(model, Model) else None
        report = check_adapter(folder, model, task=task)
        assert kind in kinds(report) if not only else kinds(report) == {kind}, str(report)
        assert all(word in str(report) for word in words), str(report)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(AdapterError, match="nothing was loaded") as error:
            load_adapter(model, folder, task=task)
        assert all(word in str(error.value) for word in words)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# ---- the silent traps


class Renamed(nets.Net):
    """Another base: one of the two blocks has other names inside."""

    def __init__(self):
        super().__init__()
        block = self.blocks[1]
        self.blocks[1] = nn.ModuleDict({"wide": block.up, "narrow": block.down})


def test_part_of_the_names_match(peft_folder):
    peft_is_silent(peft_folder, Renamed())
    report = check_adapter(peft_folder, Renamed())
    assert not report.ok
    assert report.unmatched == ("blocks.1.down", "blocks.1.up")
    assert "8 of 10 layers fit" in str(report)
    for name in report.unmatched:
        assert f"no module {name} in the model" in str(report)
    with pytest.raises(AdapterError, match=r"4 extra: .*blocks\.1\.down\.lora_A"):
        load_adapter(Renamed(), peft_folder)


def test_a_missing_key(peft_folder):
    edit(peft_folder, lambda tensors: tensors.pop(UP_A))
    peft_is_silent(peft_folder)
    assert_found(peft_folder, "missing", UP_A)


def test_a_missing_layer(peft_folder):
    edit(peft_folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".conv2." in key])
    peft_is_silent(peft_folder)
    assert_found(peft_folder, "missing", "conv2")


def test_a_layer_that_is_missing_from_our_own_file(our_folder):
    """Without its config the file still knows what was saved."""
    tensors = load_file(our_folder / WEIGHTS_FILE)
    with safe_open(our_folder / WEIGHTS_FILE, "pt") as file:
        metadata = file.metadata()
    kept = {key: t for key, t in tensors.items() if ".conv2." not in key}
    save_file(kept, our_folder / WEIGHTS_FILE, metadata)
    known = json.loads((our_folder / CONFIG_FILE).read_text())
    targets = [name for name in known["target_modules"] if name != "conv2"]
    (our_folder / CONFIG_FILE).write_text(json.dumps(known | {"target_modules": targets}))
    assert kinds(check_adapter(our_folder)) == {"missing"}
    assert kinds(check_adapter(our_folder, nets.make_net())) == {"missing"}


def test_an_extra_key(peft_folder):
    edit(peft_folder, lambda tensors: tensors.update({"base_model.model.up.lora_C.weight": torch.ones(1)}))
    peft_is_silent(peft_folder)
    assert_found(peft_folder, "extra", "lora_C")


def test_a_key_of_a_layer_the_config_does_not_target(peft_folder):
    def add(tensors):
        tensors["base_model.model.head.lora_A.weight"] = torch.ones(4, 12)
        tensors["base_model.model.head.lora_B.weight"] = torch.ones(5, 4)

    edit(peft_folder, add)
    peft_is_silent(peft_folder)
    assert_found(peft_folder, "extra", "head")


def test_a_base_weight_in_the_file(peft_folder):
    key = "base_model.model.up.base_layer.weight"
    edit(peft_folder, lambda tensors: tensors.update({key: torch.full((12, 12), 7.0)}))
    assert torch.equal(peft_is_silent(peft_folder).base_model.model.up.base_layer.weight, torch.full((12, 12), 7.0))
    assert_found(peft_folder, "base weight", key)
    edit(peft_folder, lambda tensors: tensors.update({key: nets.make_net().up.weight.detach()}))
    report = check_adapter(peft_folder, nets.make_net())
    assert report.ok
    assert "the model's own up.weight" in str(report)
    assert check_adapter(peft_folder).findings[0].kind == "base weight"


def test_the_same_weight_unwrapped(peft_folder):
    edit(peft_folder, lambda tensors: tensors.update({"base_model.model.norm.weight": torch.zeros(12)}))
    assert_found(peft_folder, "base weight", "norm.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(peft_folder, value):
    edit(peft_folder, lambda tensors: tensors[UP_A][1, 2].fill_(value))
    peft_is_silent(peft_folder)
    assert_found(peft_folder, "values", UP_A, "1 of 48 places")
    assert kinds(check_adapter(peft_folder)) == {"values"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_whole_numbers(peft_folder, dtype):
    edit(peft_folder, lambda tensors: tensors.update({UP_A: tensors[UP_A].to(dtype)}))
    peft_is_silent(peft_folder)
    assert_found(peft_folder, "dtype", UP_A, str(dtype))


def test_flipped_rslora(our_folder, peft_folder):
    """Our own weights know their scale; PEFT's do not, and the report gives the scale that results."""
    scale = peft_is_silent(our_folder).base_model.model.up.scaling["default"]
    known = json.loads((our_folder / CONFIG_FILE).read_text())
    (our_folder / CONFIG_FILE).write_text(json.dumps(known | {"use_rslora": True}))
    assert peft_is_silent(our_folder).base_model.model.up.scaling["default"] == 2 * scale
    report = check_adapter(our_folder)
    assert kinds(report) == {"scale"}
    assert "was saved with scale 1.5, the config beside it gives 3" in str(report)
    with pytest.raises(AdapterError, match="use_rslora"):
        load_adapter(nets.make_net(), our_folder)

    assert {layer.scale for layer in check_adapter(peft_folder).layers} == {1.5}
    edit(peft_folder, use_rslora=True)
    report = check_adapter(peft_folder, nets.make_net())
    assert {layer.scale for layer in report.layers} == {3.0}
    assert "scale 3" in str(report)
    assert "a scale changed in the config would not show" in str(report)
    model = apply_lora(nets.make_net(), LoRAConfig(r=4, lora_alpha=6, target_modules=nets.EVERYTHING))
    assert kinds(check_adapter(peft_folder, model)) == {"scale"}  # a model that has LoRA knows better


def test_a_changed_alpha(our_folder):
    known = json.loads((our_folder / CONFIG_FILE).read_text())
    for change in ({"lora_alpha": 8}, {"alpha_pattern": {"conv2": 7}}):
        (our_folder / CONFIG_FILE).write_text(json.dumps(known | change))
        assert kinds(check_adapter(our_folder)) == {"scale"}


def test_rank_and_shapes(peft_folder):
    edit(peft_folder, r=5)
    report = check_adapter(peft_folder, nets.make_net())
    assert kinds(report) == {"rank"}
    assert "has rank 4, the config says 5" in str(report)
    assert kinds(check_adapter(peft_folder)) == {"rank"}
    edit(peft_folder, lambda tensors: tensors.update({UP_A: torch.ones(4, 11)}), r=4)
    assert_found(peft_folder, "shape", UP_A, "(4, 11)", "(4, 12)")


def test_another_base(peft_folder):
    """Same names, other widths; and a base without the names' beginning."""

    def wider():
        net = nets.make_net()
        net.up = nn.Linear(13, 12)
        return net

    assert kinds(check_adapter(peft_folder, wider())) == {"shape"}
    report = check_adapter(peft_folder, nn.ModuleDict({"model": nets.make_net()}))
    assert kinds(report) == {"extra", "missing"}
    assert "no module up in the model; near: model.up" in str(report)


def test_everything_at_once_is_in_one_error(peft_folder):
    def spoil(tensors):
        tensors.pop(UP_A)
        tensors["stray"] = torch.ones(1)
        tensors["base_model.model.norm.weight"] = torch.zeros(12)
        tensors["base_model.model.turned.lora_A.weight"] = torch.ones(4, 5)
        tensors["base_model.model.conv1.lora_B.weight"] = tensors["base_model.model.conv1.lora_B.weight"].int()
        tensors["base_model.model.embed.lora_embedding_B"][0, 0] = float("nan")

    edit(peft_folder, spoil)
    wanted = {"missing", "extra", "base weight", "shape", "dtype", "values"}
    assert kinds(check_adapter(peft_folder, nets.make_net())) == wanted
    with pytest.raises(AdapterError) as error:
        load_adapter(nets.make_net(), peft_folder)
    for word in (UP_A, "stray", "norm.weight", "turned.lora_A", "conv1.lora_B", "embed.lora_embedding_B", *wanted):
        assert word in str(error.value)


def test_dora_and_lora_bias_name_the_way_out(tmp_path):
    folder = nets.save_peft(nets.peft_model(target_modules=["up"], lora_bias=True), tmp_path / "bias")
    with pytest.raises(AdapterError, match=r"lora_bias=True .*patch_peft"):
        load_adapter(nets.make_net(), folder)


# ---- what it is checked against


def test_every_kind_of_model(peft_folder):
    peft = nets.peft_model()
    models = {
        "Net": nets.make_net(),
        "PeftModel": peft,
        "Model": Model(nets.make_net(), target_modules=nets.EVERYTHING),
        "itself alone": None,
    }
    for name, model in models.items():
        report = check_adapter(peft_folder, model)
        assert report.ok, str(report)
        assert f"checked against {name}\n" in str(report)
        assert len(report.layers) == 10
        assert report.dtypes == ("float32",)
    with torch.device("meta"):
        assert check_adapter(peft_folder, nets.Net()).ok
    edit(peft_folder, lambda tensors: tensors.pop(UP_A))
    assert kinds(check_adapter(peft_folder, peft)) == {"missing"}
    with_head = nets.peft_model(modules_to_save=["head"], bias="all")
    assert check_adapter(nets.save_peft(with_head, peft_folder.parent / "head"), with_head).ok


def test_a_check_changes_nothing(peft_folder):
    for model in (nets.make_net(), nets.peft_model(), Model(nets.make_net())):
        before = {name: t.clone() for name, t in model.state_dict().items()}
        check_adapter(peft_folder, model)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_biases_that_old_peft_did_not_save(tmp_path):
    folder = nets.save_peft(nets.peft_model(bias="lora_only", target_modules=["up"]), tmp_path)
    edit(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(".bias")])
    report = check_adapter(folder, nets.make_net())
    assert report.ok
    assert "no bias is in the file" in str(report)
    ours = nets.train(apply_lora(nets.make_net(), LoRAConfig(target_modules=["up"], bias="lora_only")))
    save_adapter(ours, tmp_path / "ours")
    with safe_open(tmp_path / "ours" / WEIGHTS_FILE, "pt") as file:
        metadata = file.metadata()
    kept = {key: t for key, t in load_file(tmp_path / "ours" / WEIGHTS_FILE).items() if not key.endswith(".bias")}
    save_file(kept, tmp_path / "ours" / WEIGHTS_FILE, metadata)
    assert kinds(check_adapter(tmp_path / "ours", nets.make_net())) == {"missing"}


def test_layers_to_transform_as_peft_reads_it_now_and_up_to_0_18():
    names = ["blocks.1.up", "model.blocks.1.up", "model.blocks.2.experts.1.up", "model.blocks.1.experts.2.up"]
    readings = {  # PEFT's expressions; whether old
        ("blocks", False): r"(?:^|.*?\.)blocks\.(\d+)\.",
        ("blocks", True): r".*\.blocks\.(\d+)\.",
        (None, False): r".*?\.[^.]*\.(\d+)\.",
        (None, True): r".*\.[^.]*\.(\d+)\.",
    }
    for (pattern, old), expression in readings.items():
        config = AdapterConfig(target_modules=("up",), layers_to_transform=(1,), layers_pattern=pattern)
        found = {name for name in names if (match := re.match(expression, name)) and match[1] == "1"}
        assert config.targets(names, old) == found


def test_a_layer_with_several_names_is_said(peft_folder):
    net = nets.make_net()
    net.alias = net.blocks[1].up
    report = check_adapter(peft_folder, net)
    assert report.ok
    assert "blocks.1.up: is alias too" in str(report)
    net = nets.make_net()
    net.blocks.append(net.blocks[0])  # where the whole block is shared PEFT does the same
    assert "too" not in str(check_adapter(peft_folder, net))


def test_unreadable_files_are_a_finding(tmp_path):
    report = check_adapter(tmp_path / "none")
    assert not report.ok
    assert "no directory" in str(report)


def test_a_regex_that_has_no_bound_is_not_run(peft_folder):
    edit(peft_folder, target_modules=r"(?:(blocks)\.\d\.(up|down)|embed|up|turned|conv\d)(?<=\w)")
    report = check_adapter(peft_folder, nets.make_net())
    assert report.ok
    assert "target_modules: not compared with the tensors" in str(report)
    edit(peft_folder, rank_pattern={r"(up)\1": 3})
    with pytest.raises(AdapterError, match="rank_pattern"):
        load_adapter(nets.make_net(), peft_folder)


# ---- the command


def command(capsys, *args):
    code = cli.main(["check", *map(str, args)])
    out, err = capsys.readouterr()
    assert err == ""
    assert out.isascii()
    return code, out


def test_command(capsys, tmp_path, peft_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_models_of_the_test.py").write_text(
        "import adapter_nets\nbuild = adapter_nets.make_net\nnumber = 3\n"
    )
    code, out = command(capsys, peft_folder)
    assert (code, "itself alone" in out) == (0, True)
    code, out = command(capsys, peft_folder, "--model", "my_models_of_the_test:build")
    assert (code, "ok: nothing is wrong" in out) == (0, True)
    edit(peft_folder, lambda tensors: tensors.pop(UP_A))
    code, out = command(capsys, peft_folder, "--model", "my_models_of_the_test:build")
    assert code == 1
    assert UP_A in out
    assert "NOT OK" in out
    assert command(capsys, tmp_path / "none")[0] == 1
    assert command(capsys, tmp_path, "--subfolder", "peft")[0] == 1
    assert str(tmp_path) not in sys.path


def test_command_with_a_model_of_transformers(capsys, tmp_path):
    from test_adapters import tiny_llama

    llama = tiny_llama()
    llama.config.architectures = ["LlamaForCausalLM"]
    llama.config.save_pretrained(tmp_path / "model")
    peft = nets.peft_model(net=llama, target_modules=["q_proj", "v_proj"])
    folder = nets.save_peft(peft, tmp_path / "adapter")
    code, out = command(capsys, folder, "--model", tmp_path / "model")
    assert (code, "LlamaForCausalLM" in out, "4 layers" in out) == (0, True, True)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--model", "no_such_module_of_ours:build"], "no_such_module_of_ours"),
        (["--model", "json:dumps_nothing"], "dumps_nothing"),
        (["--model", "os:getcwd"], "not a module"),
        (["--subfolder", "../x"], "subfolder"),
        (["--task", "x"], "unknown arguments"),
    ],
)
def test_mistakes_on_the_command_line(capsys, peft_folder, args, word):
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", str(peft_folder), *args])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert word in err
    assert err.count("\n") == 1
