"""The functions that go with torchtune's LoRALinear, ``fuse``, and the drop-in beside torchtune where installed."""

import inspect
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from test_compat_torchtune import ALPHA, K, LoRALinear, N, R, checkpoint_of, formula, make_layer
from torch import nn

from fused_lora import lora_linear
from fused_lora.compat import route
from fused_lora.compat import torchtune as compat


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class TestFunctions:
    def model(self):
        return nn.Sequential(make_layer(), nn.Linear(N, K), make_layer())

    def test_adapter_params_and_freezing(self):
        model = self.model()
        wanted = [f"{i}.lora_{f}.weight" for i in (0, 2) for f in "ab"]
        found = compat.get_adapter_params(model)
        assert list(found) == wanted
        assert all(found[name] is model.get_parameter(name) for name in wanted)
        compat.set_trainable_params(model, found)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == wanted
        state = compat.get_adapter_state_dict(model.state_dict())
        assert list(state) == wanted
        assert list(compat.get_adapter_params(model[0])) == ["lora_a.weight", "lora_b.weight"]
        model[0].adapter_params = lambda: ["lora_c"]
        with pytest.raises(ValueError, match=r"adapter_params\(\) of 0 names 'lora_c'; it has weight, bias"):
            compat.get_adapter_params(model)

    def test_disable_adapter_restores_what_was(self):
        model, x = self.model(), torch.randn(3, K)
        model[2].disabled = True
        with compat.disable_adapter(model):
            assert torch.equal(model[0](x), F.linear(x, model[0].weight, model[0].bias))
        assert [model[0].disabled, model[2].disabled] == [False, True]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_merged_checkpoint_is_the_exact_sum_rounded_once(self, dtype):
        state = {f"layers.0.{name}": t for name, t in checkpoint_of(dtype).items()} | checkpoint_of(dtype)
        state["layers.0.magnitude"] = torch.rand(N).to(dtype) + 0.5
        before = dict(state)
        kept = {name: t.clone() for name, t in state.items()}
        merged = compat.get_merged_lora_ckpt(state, R, ALPHA)
        assert merged is state
        assert sorted(merged) == ["bias", "layers.0.bias", "layers.0.weight", "weight"]
        assert all(torch.equal(before[name], t) for name, t in kept.items()), "a live model's weights are not written"
        for prefix in ("", "layers.0."):
            weight, a, b = (kept[prefix + name].double() for name in ("weight", "lora_a.weight", "lora_b.weight"))
            wanted = weight + (ALPHA / R) * b @ a
            if prefix:
                wanted *= (kept[prefix + "magnitude"].double() / wanted.norm(dim=1))[:, None]
            found = merged[prefix + "weight"]
            assert found.dtype == dtype
            slack = 2 * torch.finfo(torch.float32).eps * K
            assert ((found.double() - wanted).abs() <= wanted.abs() * torch.finfo(dtype).eps / 2 + slack).all()

    def test_merging_refuses_what_it_does_not_know(self):
        state = checkpoint_of() | {"experts.lora_gate_a": torch.ones(2)}
        del state["lora_b.weight"]
        before = dict(state)
        with pytest.raises(ValueError, match=r"\['experts.lora_gate_a'\] belong to neither, \['lora_b.weight'\]"):
            compat.get_merged_lora_ckpt(state, R, ALPHA)
        assert state == before


class TheirLinear(nn.Module):
    """A layer with the attributes of torchtune's, computed by the formula."""

    def __init__(self, tensors):
        super().__init__()
        self.rank, self.alpha, self.disabled, self._quantize_base = R, ALPHA, False, False
        self.weight, self.bias = nn.Parameter(tensors["weight"], False), nn.Parameter(tensors["bias"], False)
        self.dropout = nn.Identity()
        self.lora_a, self.lora_b = nn.Linear(K, R, bias=False), nn.Linear(R, N, bias=False)
        self.load_state_dict(tensors)

    def forward(self, x):
        return formula(x, self.weight, self.lora_a.weight, self.lora_b.weight, self.bias)


class TestFuse:
    @pytest.fixture(autouse=True)
    def theirs(self, monkeypatch):
        for name in ("torchtune", "torchtune.modules", "torchtune.modules.peft"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["torchtune.modules.peft"].LoRALinear = TheirLinear
        compat._fused_class.cache_clear()
        yield
        compat._fused_class.cache_clear()

    def test_only_the_class_changes(self):
        model, x = nn.Sequential(TheirLinear(checkpoint_of()), nn.ReLU()), torch.randn(5, K)
        parameters, keys, before = list(model.parameters()), list(model.state_dict()), model[0](x)
        assert compat.fuse(model) == 1
        assert compat.fuse(model) == 0
        assert isinstance(model[0], TheirLinear)
        assert isinstance(model[0], LoRALinear)
        assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
        assert list(model.state_dict()) == keys
        assert model[0]._get_name() == "LoRALinear"
        layer = model[0]
        a, b = layer.lora_a.weight, layer.lora_b.weight
        assert torch.equal(layer(x), lora_linear(x, layer.weight, a, b, ALPHA / R, layer.bias))
        assert torch.allclose(layer(x), before)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))

    def test_without_torchtune(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchtune.modules.peft", None)
        with pytest.raises(ImportError, match="fuse\\(\\) is for models built with torchtune"):
            compat.fuse(nn.Linear(3, 3))


class TestAgainstTorchtune:
    @pytest.fixture
    def theirs(self):
        return pytest.importorskip("torchtune.modules.peft", reason="torchtune is not installed")

    @pytest.mark.parametrize("bias", [False, True])
    def test_same_start_keys_and_output(self, theirs, bias):
        layers = []
        for kind in (theirs.LoRALinear, LoRALinear):
            torch.manual_seed(3)
            layers.append(kind(K, N, R, ALPHA, use_bias=bias))
        assert list(layers[0].state_dict()) == list(layers[1].state_dict())
        assert all(map(torch.equal, layers[0].state_dict().values(), layers[1].state_dict().values()))
        x, tensors = torch.randn(5, K), checkpoint_of(bias=bias)
        for layer in layers:
            layer.load_state_dict(tensors)
        assert torch.equal(layers[0](x), layers[1](x)), "trainable: the same expression"
        assert str(inspect.signature(theirs.LoRALinear)).split("->")[0].count(",") == 7

    def test_fuse_a_model_of_its_builders(self, theirs, monkeypatch):
        from torchtune.models.llama2 import lora_llama2

        model = lora_llama2(
            lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            apply_lora_to_output=True,
            **{"vocab_size": 50, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64},
            **{"max_seq_len": 64, "lora_rank": 4, "lora_alpha": 8.0},
        ).double()
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                nn.init.normal_(parameter, std=0.3)
        compat.set_trainable_params(model, theirs.get_adapter_params(model))
        tokens, calls, fused = torch.randint(0, 50, (2, 16)), [], route.fused
        before, keys = model(tokens), list(model.state_dict())
        assert compat.fuse(model) == 2 * 7 + 1
        monkeypatch.setattr(route, "fused", lambda *args: calls.append(1) or fused(*args))
        assert torch.allclose(model(tokens), before, rtol=0, atol=1e-10)
        assert len(calls) == 2 * 7 + 1
        assert list(model.state_dict()) == keys
        assert list(theirs.get_adapter_params(model)) == list(compat.get_adapter_params(model))
