"""loralib's merging on eval() and train(): what a user sees is loralib's, and nothing drifts or goes stale."""

import copy
import io
import pickle

import pytest
import torch
from loralib_cases import CASES, SCALE, load
from torch import nn

from fused_lora.compat import loralib as lora
from fused_lora.compat.loralib import merging

NAMES = ["linear", "linear-turned", "merged-qv-turned", "embedding", "conv2d", "conv2d-groups", "conv3d"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(name, dtype=torch.float32, **settings):
    """(case, tensors of a checkpoint, the layer that has loaded them)"""
    tensors = CASES[name].checkpoint(dtype)
    return CASES[name], tensors, load(CASES[name], lora, tensors, **settings)


def exact_sum(case, tensors):
    """weight + ΔW, formed in float64 and rounded once."""
    delta = case.delta(tensors["lora_A"].double(), tensors["lora_B"].double())
    return tensors["weight"].double() + delta


def assert_merged(case, tensors, weight):
    """``weight`` is weight + ΔW to its own rounding and that of a float32 sum."""
    wanted = exact_sum(case, tensors)
    terms = tensors["lora_A"].shape[0] + 2
    summed = tensors["weight"].double().abs() + case.delta(
        tensors["lora_A"].double().abs(), tensors["lora_B"].double().abs()
    )
    accumulate = torch.promote_types(weight.dtype, torch.float32)
    bound = wanted.abs() * torch.finfo(weight.dtype).eps / 2 + summed * terms * torch.finfo(accumulate).eps
    assert ((weight.double() - wanted).abs() <= bound).all()


class TestModes:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", NAMES)
    def test_eval_merges_and_train_restores_the_bits(self, name, dtype):
        case, tensors, layer = make(name, dtype)
        x, address, parameter = case.input(dtype), layer.weight.data_ptr(), layer.weight
        apart = layer(x)
        for _ in range(20):
            assert layer.eval() is layer
            assert layer.merged
            assert_merged(case, tensors, layer.weight)
            merged = layer(x)
            assert layer.train() is layer
            assert not layer.merged
            assert torch.equal(layer.weight, tensors["weight"])
        assert (layer.weight is parameter, layer.weight.data_ptr()) == (True, address), "written in place"
        assert torch.equal(layer(x), apart)
        plain = case.build(lora, r=0).to(dtype)
        plain.weight.data.copy_(layer.eval().weight)
        if "bias" in tensors:
            plain.bias.data.copy_(tensors["bias"])
        assert torch.equal(plain(x), merged), "merged, it is the base layer with the sum"

    @pytest.mark.parametrize("name", NAMES)
    def test_merge_weights_false(self, name):
        case, tensors, layer = make(name, merge_weights=False)
        x = case.input()
        assert torch.equal(layer.eval()(x), layer.train()(x))
        assert not layer.eval().merged
        assert torch.equal(layer.weight, tensors["weight"])

    def test_inside_a_model_and_twice(self):
        case, tensors, layer = make("linear")
        model = nn.Sequential(layer, nn.ReLU())
        assert model.eval().eval() is model
        assert_merged(case, tensors, layer.weight)
        model.train().train()
        assert torch.equal(layer.weight, tensors["weight"])

    def test_in_inference_mode_and_under_autocast(self):
        case, tensors, layer = make("linear")
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            layer.eval()
        assert_merged(case, tensors, layer.weight)
        layer.train()
        layer(case.input().requires_grad_()).sum().backward()
        assert layer.lora_B.grad.any()


class TestFollowing:
    @pytest.mark.parametrize("name", NAMES)
    def test_factors_and_scaling_that_change_while_merged(self, name):
        case, tensors, layer = make(name)
        x = case.input()
        layer.eval()(x)
        with torch.no_grad():
            layer.lora_B.mul_(-2)
        layer(x)
        assert_merged(case, tensors | {"lora_B": -2 * tensors["lora_B"]}, layer.weight)
        layer.scaling = SCALE / 2
        layer(x)
        assert_merged(case, tensors | {"lora_B": -tensors["lora_B"]}, layer.weight)
        with torch.no_grad():
            layer.lora_A.zero_()
        assert torch.equal(layer.train().weight, tensors["weight"]), "loralib would subtract another ΔW than it added"

    def test_a_weight_written_while_merged_is_the_merged_one_as_in_loralib(self):
        case, tensors, layer = make("linear", torch.float64)
        layer.eval()
        written = torch.randn_like(layer.weight)
        with torch.no_grad():
            layer.weight.copy_(written)
            layer.lora_B.mul_(2)
        x = case.input(torch.float64)
        assert torch.equal(layer(x), nn.functional.linear(x, written, tensors["bias"]))
        delta = case.delta(tensors["lora_A"], 2 * tensors["lora_B"])
        assert torch.equal(layer.weight, written)
        assert torch.allclose(layer.train().weight, written - delta, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("convert", [torch.nn.Module.double, torch.nn.Module.bfloat16], ids=["double", "bfloat16"])
    def test_conversions_while_merged(self, name, convert):
        case, tensors, layer = make(name)
        convert(layer.eval())
        kept = {key: t.to(layer.weight.dtype) for key, t in tensors.items()}
        assert_merged(case, kept, layer.weight)
        assert torch.equal(layer.train().weight, kept["weight"])

    @pytest.mark.parametrize("name", NAMES)
    def test_copies_while_merged(self, name):
        case, tensors, layer = make(name)
        x = case.input()
        layer.eval()
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.merged
            assert torch.equal(twin(x), layer(x))
            with torch.no_grad():
                twin.lora_B.mul_(3)
            twin(x)
            assert_merged(case, tensors | {"lora_B": 3 * tensors["lora_B"]}, twin.weight)
            assert torch.equal(twin.train().weight, tensors["weight"])
        assert torch.equal(layer.train().weight, tensors["weight"]), "the copies are copies"


def saved(state):
    """The state dict after torch.save and torch.load: the marks that tell merged files survive."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


class TestLoading:
    """Whatever was loaded in whichever mode, the base and the outputs are those of the file."""

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("target_mode", [True, False], ids=["into-train", "into-eval"])
    @pytest.mark.parametrize("source_mode", [True, False], ids=["from-train", "from-eval"])
    def test_whole_files_of_ours(self, name, source_mode, target_mode):
        case, tensors, source = make(name, torch.float64)
        target, x = load(case, lora, case.checkpoint(torch.float64)).train(target_mode), case.input(torch.float64)
        wanted = source(x)
        target.load_state_dict(saved(source.train(source_mode).state_dict()))
        assert target.merged == (not target_mode)
        assert torch.allclose(target(x), wanted, rtol=0, atol=1e-12)
        assert torch.allclose(target.train().weight, tensors["weight"], rtol=0, atol=1e-14)
        assert torch.allclose(target(x), wanted, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("name", NAMES)
    def test_unmarked_files_of_a_merged_layer_into_a_merged_layer(self, name):
        """What loralib itself gets right: best model of a run saved and loaded in evaluation."""
        case, tensors, source = make(name, torch.float64)
        target, x = load(case, lora, case.checkpoint(torch.float64)).eval(), case.input(torch.float64)
        state = dict(source.eval().state_dict())
        target.load_state_dict(state)
        assert torch.equal(target.weight, state["weight"])
        assert torch.equal(target(x), source(x))
        assert torch.allclose(target.train().weight, tensors["weight"], rtol=0, atol=1e-14)

    @pytest.mark.parametrize("name", NAMES)
    def test_factors_or_weight_alone_into_a_merged_layer(self, name):
        """loralib would go on with the old ΔW, or without any, and corrupt the weight on train()."""
        case, old, layer = make(name)
        new = case.checkpoint()
        layer.eval()
        layer.load_state_dict({key: t for key, t in new.items() if "lora_" in key}, strict=False)
        assert_merged(case, old | {key: t for key, t in new.items() if "lora_" in key}, layer.weight)
        layer.load_state_dict({key: t for key, t in new.items() if "lora_" not in key}, strict=False)
        assert_merged(case, new, layer.weight)
        assert torch.equal(layer.train().weight, new["weight"])

    def test_a_plain_checkpoint_and_then_lora_as_loralibs_readme_does(self):
        case, tensors, source = make("linear")
        model = nn.Sequential(case.build(lora)).eval()
        plain = nn.Sequential(nn.Linear(24, 36))
        plain[0].weight.data, plain[0].bias.data = tensors["weight"], tensors["bias"]
        missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
        assert (missing, unexpected) == (["0.lora_A", "0.lora_B"], [])
        model.load_state_dict(lora.lora_state_dict(nn.Sequential(source)), strict=False)
        x = case.input()
        assert torch.equal(model(x), source.eval()(x))

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("dropped", ["conv.", ""], ids=["weight", "conv.weight"])
    def test_a_convolution_takes_either_name_and_stays_one_parameter(self, dropped, assign):
        case, tensors, _ = make("conv2d")
        layer = case.build(lora)
        one = {key: t for key, t in tensors.items() if "lora_" in key or key.startswith("conv.") == (dropped == "")}
        layer.load_state_dict(one, assign=assign)
        for parameter in ("weight", "bias"):
            assert getattr(layer, parameter) is getattr(layer.conv, parameter)
            assert torch.equal(getattr(layer, parameter), tensors[parameter])
        assert list(layer.state_dict()) == list(tensors)

    def test_a_convolution_built_on_meta_stays_one_parameter(self):
        layer = CASES["conv2d"].build(lora, device="meta").to_empty(device="cpu")
        assert layer.weight is layer.conv.weight
        assert layer.bias is layer.conv.bias


class TestLiveStateDicts:
    """``state_dict()`` without a copy: its weight is the layer's memory, so a change of mode changes it."""

    @pytest.mark.parametrize("marked", [True, False], ids=["marked", "bare"])
    @pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
    @pytest.mark.parametrize("modes", ["ee", "et", "te", "tt", "ete", "tet"])
    @pytest.mark.parametrize("name", NAMES)
    def test_loading_ones_own_changes_nothing(self, name, modes, assign, marked):
        case, tensors, layer = make(name)
        state = layer.train(modes[0] == "t").state_dict()
        for mode in modes[1:]:
            layer.train(mode == "t")
        layer.load_state_dict(state if marked else dict(state), assign=assign)
        assert layer.merged == (modes[-1] == "e")
        if layer.merged:
            assert_merged(case, tensors, layer.weight)
        assert torch.equal(layer.train().weight, tensors["weight"])

    @pytest.mark.parametrize("name", NAMES)
    def test_new_factors_beside_ones_own_weight(self, name):
        case, tensors, layer = make(name)
        state = layer.eval().state_dict()
        state["lora_B"] = 2 * state["lora_B"]
        layer.load_state_dict(state)
        assert_merged(case, tensors | {"lora_B": state["lora_B"]}, layer.weight)
        assert torch.equal(layer.train().weight, tensors["weight"])

    @pytest.mark.parametrize("target_mode", [True, False], ids=["into-train", "into-eval"])
    @pytest.mark.parametrize("through", ["live", "deepcopy", "torch.save"])
    @pytest.mark.parametrize("modes", ["et", "te", "ete", "tet"])
    @pytest.mark.parametrize("name", ["linear-turned", "conv2d"])
    def test_modes_that_change_before_it_is_read(self, name, modes, through, target_mode):
        """The end of a run that kept its best state uncopied: the last state, but not a corrupt one."""
        case, tensors, layer = make(name, torch.float64)
        state = nn.Sequential(layer.train(modes[0] == "t")).state_dict()
        for mode in modes[1:]:
            layer.train(mode == "t")
        del layer
        state = {"live": lambda live: live, "deepcopy": copy.deepcopy, "torch.save": saved}[through](state)
        target = nn.Sequential(load(case, lora, case.checkpoint(torch.float64))).train(target_mode)
        target.load_state_dict(state)
        assert target[0].merged == (not target_mode)
        assert torch.allclose(target.train()[0].weight, tensors["weight"], rtol=0, atol=1e-14)

    def test_a_copy_put_in_its_place_stays_what_it_was(self):
        case, tensors, layer = make("linear", torch.float64)
        state = layer.eval().state_dict()
        state["weight"] = state["weight"].clone()
        target = load(case, lora, case.checkpoint(torch.float64))
        layer.train()
        target.load_state_dict(state)
        assert torch.allclose(target.weight, tensors["weight"], rtol=0, atol=1e-14)

    def test_a_conversion_while_merged(self):
        """The weight moves to new memory; the old one, unmerged for it, stays with the state dict."""
        case, tensors, layer = make("linear")
        state = layer.eval().state_dict()
        layer.double()
        target = load(case, lora, case.checkpoint())
        target.load_state_dict(state)
        assert torch.equal(target.weight, tensors["weight"])

    def test_what_was_assigned_is_followed_too(self):
        """Merged tensors of a file become a layer's own; a second layer that copies them afterwards gets it right."""
        case, tensors, source = make("linear", torch.float64)
        state = saved(source.eval().state_dict())
        first, second = (load(case, lora, case.checkpoint(torch.float64)) for _ in range(2))
        first.load_state_dict(state, assign=True)
        assert first.weight.data_ptr() == state["weight"].data_ptr()
        second.load_state_dict(state)
        for layer in (first, second):
            assert torch.allclose(layer.weight, tensors["weight"], rtol=0, atol=1e-14)

    def test_nothing_is_kept_of_a_state_dict_that_is_gone(self):
        _, _, layer = make("linear")
        for _ in range(3):
            state = layer.state_dict()
        assert len(merging._HOLDERS[layer]) == 2, "the last, and the one that it replaced"
        del state
        layer.eval()
        assert merging._HOLDERS[layer] == []


class TestFunctions:
    def model(self):
        return nn.ModuleDict(
            {
                "emb": CASES["embedding"].build(lora),
                "qkv": CASES["merged-qv"].build(lora),
                "norm": nn.LayerNorm(36),
                "conv": CASES["conv2d"].build(lora),
                "head": lora.Linear(36, 5),  # r=0
            }
        )

    FACTORS = ("emb.lora_A", "emb.lora_B", "qkv.lora_A", "qkv.lora_B", "conv.lora_A", "conv.lora_B")

    @pytest.mark.parametrize(
        ("bias", "trained", "kept"),
        [
            ("none", [], []),
            ("lora_only", ["qkv.bias", "conv.bias", "head.bias"], ["qkv.bias", "conv.bias"]),
            (
                "all",
                ["qkv.bias", "norm.bias", "conv.bias", "head.bias"],
                ["qkv.bias", "norm.bias", "conv.bias", "conv.conv.bias", "head.bias"],
            ),
        ],
    )
    def test_what_trains_and_what_is_saved(self, bias, trained, kept):
        model = self.model()
        lora.mark_only_lora_as_trainable(model, bias)
        assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == sorted([*self.FACTORS, *trained])
        state = lora.lora_state_dict(model, bias)
        assert sorted(state) == sorted([*self.FACTORS, *kept])
        assert all(t.data_ptr() == model.state_dict()[n].data_ptr() for n, t in state.items())

    def test_a_frozen_factor_stays_frozen(self):
        model = self.model()
        model["qkv"].lora_A.requires_grad_(False)
        lora.mark_only_lora_as_trainable(model)
        assert not model["qkv"].lora_A.requires_grad

    def test_refusals_change_nothing(self):
        model = self.model()
        before = [p.requires_grad for p in model.parameters()]
        for function in (lora.mark_only_lora_as_trainable, lora.lora_state_dict):
            with pytest.raises(ValueError, match="bias must be one of 'none', 'all', 'lora_only', got 'some'"):
                function(model, bias="some")
        assert [p.requires_grad for p in model.parameters()] == before
