"""State dicts of loralib and torchtune, in and out: the same outputs as their layers, the same bits in the factors."""

import adapter_nets as nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_lora import AdapterError, LoRAConfig, apply_lora, load_adapter, lora_layers, save_adapter
from fused_lora.convert import load_loralib, load_torchtune, to_loralib, to_torchtune
from fused_lora.tasks import Model


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attn, self.out = nn.Embedding(10, 6), nn.Linear(6, 18), nn.Linear(18, 4)

    def forward(self, ids):
        return self.out(self.attn(self.embed(ids)))


IDS = torch.arange(10).reshape(2, 5)


def make_net(dtype=torch.float64):
    torch.manual_seed(0)
    return Small().to(dtype)


def factors(paths, r=3, dtype=torch.float64):
    """{path: (A, B)} with values that show."""
    torch.manual_seed(1)
    shapes = {"embed": (10, 6), "attn": (6, 18), "out": (18, 4)}
    return {
        path: (torch.randn(r, shapes[path][0], dtype=dtype), torch.randn(shapes[path][1], r, dtype=dtype))
        for path in paths
    }


def with_deltas(deltas):
    """The network with its weights changed by hand: what the peers' layers compute once merged."""
    net = make_net()
    with torch.no_grad():
        for path, delta in deltas.items():
            net.get_submodule(path).weight += delta
    return net


def test_from_loralib():
    made = factors(["embed", "attn", "out"])
    state = {f"{path}.lora_{'AB'[i]}": pair[i] for path, pair in made.items() for i in (0, 1)}
    model = load_loralib(make_net(), state, lora_alpha=6)
    deltas = {path: 2.0 * (b @ a).t() if path == "embed" else 2.0 * b @ a for path, (a, b) in made.items()}
    torch.testing.assert_close(model(IDS), with_deltas(deltas)(IDS))
    back = to_loralib(model, lora_alpha=6)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_from_loralib_with_biases():
    made = factors(["attn"])
    state = {"attn.lora_A": made["attn"][0], "attn.lora_B": made["attn"][1], "attn.bias": torch.ones(18).double()}
    model = load_loralib(make_net(), state, lora_alpha=3, bias="lora_only")
    assert torch.equal(model.attn.bias, state["attn.bias"])
    with pytest.raises(AdapterError, match=r"base weight: .*attn\.bias"):
        load_loralib(make_net(), state, lora_alpha=3)
    with pytest.raises(AdapterError, match=r"missing: .*out\.bias"):
        load_loralib(make_net(), state, lora_alpha=3, bias="all")


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, False], [True, True, True]])
def test_from_merged_linear(enabled):
    """ΔW as loralib forms it: a grouped convolution of A with B, its rows put where LoRA is enabled."""
    groups, r = sum(enabled), 2
    torch.manual_seed(2)
    a, b = torch.randn(r * groups, 6).double(), torch.randn(6 * groups, r).double()
    packed = F.conv1d(a[None], b[..., None], groups=groups)[0]
    delta = torch.zeros(3, 6, 6).double()
    delta[torch.tensor(enabled)] = packed.view(groups, 6, 6)
    state = {"attn.lora_A": a, "attn.lora_B": b}
    model = load_loralib(make_net(), state, lora_alpha=5, enable_lora={"attn": enabled})
    torch.testing.assert_close(model(IDS), with_deltas({"attn": 2.5 * delta.view(18, 6)})(IDS))
    assert torch.equal(model.attn.lora_a, a)
    assert model.attn.scale == 2.5
    if groups < 3:
        with pytest.raises(AdapterError, match="nothing was loaded"):
            load_loralib(make_net(), state, lora_alpha=5)
    with pytest.raises(AdapterError, match="not those of a MergedLinear"):
        load_loralib(make_net(), state, lora_alpha=5, enable_lora={"attn": [True] * 4})
    with pytest.raises(AdapterError, match="enable_lora names out"):
        load_loralib(make_net(), state, lora_alpha=5, enable_lora={"attn": enabled, "out": [True]})


def test_torchtune_there_and_back(tmp_path):
    made = factors(["attn", "out"], dtype=torch.float32)
    state = {f"{path}.lora_{'ab'[i]}.weight": pair[i] for path, pair in made.items() for i in (0, 1)}
    model = load_torchtune(make_net(torch.float32), state, lora_alpha=6)
    back = to_torchtune(model, lora_alpha=6)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    folder = save_adapter(model, tmp_path)  # and on to PEFT
    peft = nets.load_peft(folder, net=make_net(torch.float32))
    assert torch.equal(peft.base_model.model.attn.lora_A["default"].weight, made["attn"][0])
    assert peft.base_model.model.attn.scaling["default"] == 2
    renamed = {f"layers.{key}": t for key, t in state.items()}
    again = load_torchtune(make_net(torch.float32), renamed, lora_alpha=6, rename=lambda p: p.removeprefix("layers."))
    with torch.no_grad():
        assert torch.equal(again(IDS), model(IDS))


def test_a_rename_that_gives_two_layers_one_path():
    """One of them would be lost, and nothing would tell which."""
    made = factors(["attn"], dtype=torch.float32)["attn"]
    state = {f"{i}.lora_{'ab'[j]}.weight": made[j] for i in (0, 1) for j in (0, 1)}
    net = make_net(torch.float32)
    with pytest.raises(AdapterError, match="rename gives '0' and '1' the same path 'attn': nothing was loaded"):
        load_torchtune(net, state, lora_alpha=6, rename=lambda path: "attn")
    assert not list(lora_layers(net))


@pytest.mark.parametrize("rename", ["attn", 3, {"0": "attn"}, ["attn"]], ids=str)
def test_a_rename_that_is_no_function(rename):
    with pytest.raises(TypeError, match=rf"^rename must be a function .*, got {type(rename).__name__} .*__getitem__"):
        load_torchtune(make_net(), {}, lora_alpha=6, rename=rename)


@pytest.mark.parametrize("new", [None, 3, ["attn"], b"attn"], ids=str)
def test_a_rename_that_gives_no_string(new):
    state = {f"0.lora_{letter}.weight": torch.ones(1, 1) for letter in "ab"}
    with pytest.raises(TypeError, match=rf"^rename must return .* a string, got {type(new).__name__} .* for '0'"):
        load_torchtune(make_net(), state, lora_alpha=6, rename=lambda path: new)


def test_a_rename_by_a_table():
    made = factors(["attn"], dtype=torch.float32)["attn"]
    state = {f"0.lora_{'ab'[j]}.weight": made[j] for j in (0, 1)}
    model = load_torchtune(make_net(torch.float32), state, lora_alpha=6, rename={"0": "attn"}.__getitem__)
    assert torch.equal(model.attn.lora_a, made[0])


def test_into_tasks_and_out():
    made = factors(["attn", "out"], dtype=torch.float32)
    state = {f"{path}.lora_{'ab'[i]}.weight": pair[i] for path, pair in made.items() for i in (0, 1)}
    model = Model(make_net(torch.float32), target_modules=["attn", "out"])
    load_torchtune(model, state, lora_alpha=6, task="a")
    with torch.no_grad():
        assert torch.equal(model(IDS, task="a"), load_torchtune(make_net(torch.float32), state, lora_alpha=6)(IDS))
    assert torch.equal(to_loralib(model, lora_alpha=6, task="a")["out.lora_B"], made["out"][1])


def test_a_scale_that_the_format_would_lose():
    model = apply_lora(make_net(), LoRAConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["attn", "out"]))
    with pytest.raises(AdapterError, match=r"attn \(12\), out \(12\)"):
        to_loralib(model, lora_alpha=6)
    assert to_torchtune(model, lora_alpha=12)


def test_layers_that_the_formats_do_not_have():
    conv = apply_lora(nn.Sequential(nn.Conv1d(2, 4, 3)), LoRAConfig(r=2, lora_alpha=2, target_modules=["0"]))
    for convert in (to_loralib, to_torchtune):
        with pytest.raises(AdapterError, match="0 cannot be converted"):
            convert(conv, lora_alpha=2)
    embedding = apply_lora(make_net(), LoRAConfig(r=2, lora_alpha=2, target_modules=["embed"]))
    with pytest.raises(AdapterError, match="linear layers only"):
        to_torchtune(embedding, lora_alpha=2)
    state = {"0.lora_A": torch.ones(6, 6), "0.lora_B": torch.ones(12, 6)}  # of loralib's Conv1d(2, 4, 3, r=2)
    with pytest.raises(AdapterError, match="shape"):
        load_loralib(nn.Sequential(nn.Conv1d(2, 4, 3)), state, lora_alpha=1)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda state: state.pop("out.lora_A"), "missing"),
        (lambda state: state.update({"nowhere.lora_A": torch.ones(3, 6)}), "nowhere"),
        (lambda state: state["out.lora_B"].fill_(float("nan")), "values"),
        (lambda state: state.update({"out.weight": torch.ones(4, 18).double()}), "base weight"),
        (lambda state: state.update({"out.lora_B": torch.ones(4, 3).int()}), "dtype"),
        (lambda state: state.update({"out.lora_A": torch.ones(3, 17).double()}), "shape"),
    ],
)
def test_all_or_nothing(change, word):
    state = {f"{path}.lora_{'AB'[i]}": pair[i] for path, pair in factors(["attn", "out"]).items() for i in (0, 1)}
    change(state)
    net = make_net()
    with pytest.raises(AdapterError, match=word):
        load_loralib(net, state, lora_alpha=6)
    assert not list(lora_layers(net))


@pytest.mark.parametrize(
    ("load", "a", "b"), [(load_loralib, "lora_A", "lora_B"), (load_torchtune, "lora_a.weight", "lora_b.weight")]
)
def test_errors_say_the_keys_of_the_state_dict(load, a, b):
    pairs = factors(["attn", "out", "embed"])
    state = {f"{path}.{key}": pair[i] for path, pair in pairs.items() for i, key in enumerate((a, b))}
    state[f"out.{a}"] = torch.ones(3, 17).double()
    state[f"attn.{b}"][0] = float("nan")
    state |= {f"nowhere.{a}": torch.ones(3, 6), "out.weight": torch.ones(4, 18).double(), "lone.bias": torch.ones(2)}
    state["other.lora_A.weight"] = torch.ones(3, 6)  # PEFT's ending: said as it stands there
    state.pop(f"embed.{b}")
    with pytest.raises(AdapterError, match="nothing was loaded") as error:
        load(make_net(), state, lora_alpha=6)
    message = str(error.value)
    assert "base_model" not in message
    for key in (
        f"out.{a}",
        f"attn.{b}",
        f"nowhere.{a}",
        "out.weight",
        "lone.bias",
        "other.lora_A.weight",
        f"embed.{b}",
    ):
        assert f" {key} (" in message, message


def test_arguments():
    for wrong in ([], {"a": 1}, {1: torch.ones(1)}):
        with pytest.raises(TypeError, match="state dict"):
            load_loralib(make_net(), wrong, lora_alpha=1)
    for wrong, error in ((float("nan"), ValueError), ("1", TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match="lora_alpha must be"):
            load_torchtune(make_net(), {}, lora_alpha=wrong)
        with pytest.raises(error, match="lora_alpha must be"):
            load_loralib(make_net(), {}, lora_alpha=wrong)
    with pytest.raises(ValueError, match="bias"):
        load_loralib(make_net(), {}, lora_alpha=1, bias="some")
    with pytest.raises(ValueError, match="no LoRA layer"):
        to_loralib(make_net(), lora_alpha=1)
    with pytest.raises(AdapterError):
        load_adapter(make_net(), "no such directory")
