"""loralib's layers as drop-ins: their formulas, their checkpoints, and the library itself where it is installed.

x (..., K)   weight (N, K)   lora_A (R, K)   lora_B (N, R)   y (..., N); the others' shapes are in loralib_cases.py
"""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from accuracy import REGIMES, compare, wide
from loralib_cases import ALPHA, CASES, SCALE, THEIRS, K, N, R, V, load
from torch import nn

from fused_lora import lora_linear
from fused_lora.compat import loralib as lora
from fused_lora.compat import route


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def results(function, x, tensors, dy, dtype=None):
    """y and the gradients of x, lora_A and lora_B on copies, cast to ``dtype``."""
    cast = [
        t if t is None or not t.is_floating_point() else t.detach().to(dtype or t.dtype)
        for t in (x, *(tensors.get(name) for name in ("weight", "bias", "lora_A", "lora_B")))
    ]
    wanted = {"da": cast[3], "db": cast[4]} | ({"dx": cast[0]} if x.is_floating_point() else {})
    for t in wanted.values():
        t.requires_grad_()
    y = function(*cast)
    return {"y": y} | dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype)), strict=True))


@pytest.mark.parametrize("regime", ["float32", "bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_the_formula(name, regime):
    case, kind, errors = CASES[name], REGIMES[regime], {}
    for _ in range(4):
        tensors, x = case.checkpoint(kind.weight), case.input(kind.x)
        layer = load(case, lora, tensors)
        assert list(layer.state_dict()) == list(tensors)
        dy = torch.randn_like(layer(x).detach().float())

        def ours(x, weight, bias, a, b, layer=layer):
            return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, x)

        with kind.active():
            found, other = results(ours, x, tensors, dy), results(case.formula, x, tensors, dy)
        truth = results(case.formula, x, tensors, dy, torch.float64)
        for part, t in found.items():
            errors.setdefault((part, t.dtype), []).append((wide(t), wide(other[part]), wide(truth[part])))
    complaints = [compare(part, draws, dtype) for (part, dtype), draws in errors.items()]
    assert not any(complaints), "\n".join(complaints)


class TestSurface:
    @pytest.mark.parametrize(
        ("kind", "wanted"),
        [
            ("Linear", "in_features, out_features, r=0, lora_alpha=1, lora_dropout=0.0, fan_in_fan_out=False, "),
            ("MergedLinear", "in_features, out_features, r=0, lora_alpha=1, lora_dropout=0.0, enable_lora=(False,), "),
            ("Embedding", "num_embeddings, embedding_dim, r=0, lora_alpha=1, "),
            ("ConvLoRA", "conv_module, in_channels, out_channels, kernel_size, r=0, lora_alpha=1, lora_dropout=0.0, "),
        ],
    )
    def test_signatures(self, kind, wanted):
        signature = inspect.signature(getattr(lora, kind))
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        wanted += "fan_in_fan_out=False, " if kind == "MergedLinear" else ""
        assert str(signature.replace(parameters=bare)) == f"({wanted}merge_weights=True, **kwargs)"

    @pytest.mark.parametrize("name", CASES)
    def test_attributes(self, name):
        layer = CASES[name].build(lora)
        assert isinstance(layer, lora.LoRALayer)
        kind = {"Linear": nn.Linear, "MergedLinear": nn.Linear, "Embedding": nn.Embedding}.get(CASES[name].kind)
        assert isinstance(layer, kind or nn.Module)
        assert (layer.r, layer.lora_alpha, layer.scaling, layer.merged, layer.merge_weights) == (
            *(R, ALPHA, SCALE),
            *(False, True),
        )
        trainable = [n for n, p in layer.named_parameters() if p.requires_grad]
        assert trainable == [n for n, _ in layer.named_parameters() if n != "weight"], "the weight alone is frozen"
        assert layer.lora_dropout(torch.ones(3)).tolist() == [1, 1, 1]

    @pytest.mark.parametrize("name", CASES)
    def test_starts_as_its_base_and_trains_towards_anything(self, name):
        case, x = CASES[name], CASES[name].input()
        layer = case.build(lora)
        plain = case.build(lora, r=0)
        plain.load_state_dict({n: t for n, t in layer.state_dict().items() if "lora_" not in n})
        assert torch.equal(layer(x), plain(x))
        layer(x).square().sum().backward()
        moved = layer.lora_A if case.kind == "Embedding" else layer.lora_B
        assert moved.grad.any()
        assert layer.weight.grad is None

    @pytest.mark.parametrize("kind", ["Linear", "MergedLinear", "Embedding", "Conv2d"])
    def test_rank_0_is_the_plain_layer(self, kind):
        layer = CASES[{"Conv2d": "conv2d", "MergedLinear": "merged-qv"}.get(kind, kind.lower())].build(lora, r=0)
        assert not [n for n in layer.state_dict() if "lora_" in n]
        assert all(p.requires_grad for p in layer.parameters())
        before = layer.weight.clone()
        assert layer.eval().merged
        assert not layer.train().merged
        assert torch.equal(layer.weight, before)

    def test_merged_linear_with_nothing_enabled_is_plain(self):
        layer, x = lora.MergedLinear(K, N, r=R), torch.randn(3, K)
        assert list(layer.state_dict()) == ["weight", "bias"]
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))

    def test_refusals(self):
        with pytest.raises(ValueError, match="r must be at least 0"):
            lora.Linear(K, N, r=-1)
        with pytest.raises(ValueError, match=r"lora_dropout must be in \[0, 1\], got 1.5"):
            lora.Linear(K, N, r=R, lora_dropout=1.5)
        with pytest.raises(ValueError, match="enable_lora must divide out_features=36, got 5"):
            lora.MergedLinear(K, N, r=R, enable_lora=[True] * 5)
        with pytest.raises(TypeError, match=r"kernel_size must be one int, for all dimensions, got \(3, 3\)"):
            lora.Conv2d(K, N, (3, 3), r=R)
        with pytest.warns(UserWarning, match=r"lora_dropout=0\.1 has no effect in loralib's convolutions"):
            lora.Conv2d(K, N, 3, r=R, lora_dropout=0.1)


class TestFused:
    @pytest.mark.parametrize("name", ["linear", "linear-turned", "merged-qv"])
    def test_dropout_is_the_operators_and_rests_in_evaluation(self, name):
        case, x = CASES[name], torch.randn(64, K)
        layer = load(case, lora, case.checkpoint(), lora_dropout=0.3, merge_weights=False)
        weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
        torch.manual_seed(5)
        y = layer(x)
        torch.manual_seed(5)
        wide_b = case.delta(torch.eye(layer.lora_A.shape[0], K), layer.lora_B)  # lora_B with its zeros, by the formula
        wide_b = (wide_b.t() if layer.fan_in_fan_out else wide_b)[:, : layer.lora_A.shape[0]] / SCALE
        wanted = lora_linear(x, weight, layer.lora_A, wide_b, SCALE, layer.bias, dropout_p=0.3)
        assert torch.equal(y, wanted)
        assert not torch.equal(layer(x), y)
        assert torch.equal(layer.eval()(x), lora_linear(x, weight, layer.lora_A, wide_b, SCALE, layer.bias))

    @pytest.mark.parametrize("name", ["linear", "merged-qv", "merged-last", "embedding"])
    def test_the_dense_update_is_never_built_in_forward(self, name, monkeypatch):
        layer, x = load(CASES[name], lora, CASES[name].checkpoint()), CASES[name].input()
        monkeypatch.setattr(type(layer), "_delta_weight", lambda self: pytest.fail("ΔW was built"))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer(x).sum().backward()
        assert not [t for t in saved if t.shape == layer.weight.shape and t.data_ptr() != layer.weight.data_ptr()]

    def test_trainable_base_gets_its_gradient(self):
        case = CASES["merged-qv"]
        layer, x = load(case, lora, case.checkpoint()), case.input()
        layer.weight.requires_grad_()
        a, b = layer.lora_A, layer._wide_b()
        assert route.refusal(x, layer.weight, layer.bias, a, b, layer.lora_dropout) == route.TRAINABLE
        wanted = F.linear(x, layer.weight, layer.bias) + F.linear(F.linear(x, a), b) * SCALE
        assert torch.equal(layer(x), wanted)
        layer(x).sum().backward()
        assert torch.equal(layer.weight.grad, torch.ones(17, N).t() @ x)

    @pytest.mark.parametrize("name", ["linear", "merged-qv-turned", "embedding", "conv2d"])
    def test_compiles_whole_in_both_modes(self, name):
        layer, x, graphs = load(CASES[name], lora, CASES[name].checkpoint()), CASES[name].input(), []
        compiled = torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
        for mode in (True, False, True):
            layer.train(mode)
            assert torch.equal(compiled(x), layer(x))
        assert len(graphs) == 2

    @pytest.mark.parametrize("name", ["merged-qv", "merged-qv-turned", "merged-last"])
    def test_merged_linears_own_methods(self, name):
        case = CASES[name]
        tensors = case.checkpoint(torch.float64)
        layer = load(case, lora, tensors)
        assert torch.allclose(layer.merge_AB() * SCALE, case.delta(tensors["lora_A"], tensors["lora_B"]), rtol=1e-13)
        groups = len(layer.enable_lora)
        assert layer.lora_ind.view(groups, -1).float().mean(1).tolist() == [float(e) for e in layer.enable_lora]
        rows = torch.arange(1.0, len(layer.lora_B) + 1)
        padded = layer.zero_pad(rows)
        assert torch.equal(padded[layer.lora_ind], rows)
        assert not padded[~layer.lora_ind].any()

    @pytest.mark.parametrize("name", ["linear-turned", "merged-qv-turned"])
    def test_a_seed_fills_a_turned_weight_as_in_loralib(self, name):
        layer, wanted = CASES[name].build(lora), torch.empty(N, K).t()
        torch.manual_seed(3)
        layer.weight.data.normal_()
        torch.manual_seed(3)
        assert torch.equal(layer.weight, wanted.normal_())

    def test_from_pretrained_keeps_the_weight(self):
        weight = torch.randn(V, K)
        layer = lora.Embedding.from_pretrained(weight.clone(), padding_idx=3)
        assert torch.equal(layer.weight, weight)

    def test_max_norm_holds_as_in_loralib(self):
        layer, x = lora.Embedding(V, K, r=R, max_norm=1.0), torch.tensor([1, 5])
        assert torch.equal(layer(x), nn.Embedding.forward(layer, x))
        assert (layer.weight[x].norm(dim=1) <= 1 + 1e-6).all()


class TestAgainstLoralib:
    @pytest.fixture
    def theirs(self):
        return pytest.importorskip("loralib", reason="loralib is not installed")

    def pair(self, theirs, name, dtype=torch.float64, **settings):
        layers = []
        for library in (theirs, lora):
            torch.manual_seed(3)
            layers.append(CASES[name].build(library, **settings))
        other, ours = (layer.state_dict() for layer in layers)
        # The release 0.1.2 names a convolution's parameters conv.weight and conv.bias alone, the repository both ways.
        assert [key for key in ours if key in other] == list(other)
        assert {key for key in ours if key not in other} <= ({"weight", "bias"} if "conv" in name else set())
        assert all(torch.equal(ours[key], t) for key, t in other.items()), "a seed starts both the same way"
        if other.keys() == ours.keys():
            assert [n for n, _ in layers[0].named_parameters()] == [n for n, _ in layers[1].named_parameters()]
        tensors = CASES[name].checkpoint(dtype)
        layers[0].to(dtype).load_state_dict({key: tensors[key] for key in other})
        layers[1].to(dtype).load_state_dict(layers[0].state_dict())
        return layers

    @pytest.mark.parametrize("name", THEIRS)
    def test_same_start_outputs_and_checkpoints_both_ways(self, theirs, name):
        (other, ours), x = self.pair(theirs, name), CASES[name].input(torch.float64)
        for mode in (True, False, True, False):
            other.train(mode)
            assert ours.train(mode) is ours
            assert ours.merged == other.merged
            weights = [getattr(layer, "conv", layer).weight for layer in (other, ours)]
            assert torch.allclose(*weights, rtol=0, atol=1e-14)
            assert torch.allclose(ours(x), other(x), rtol=0, atol=1e-12)
            keys = list(other.state_dict())
            for source, target in ((other, ours), (ours, other)):
                state = source.state_dict()
                target.load_state_dict({key: state[key] for key in keys})
                assert torch.equal(*weights)
                assert torch.allclose(target(x), source(x), rtol=0, atol=1e-12)
        for bias in ("none", "all", "lora_only"):
            assert theirs.lora_state_dict(other, bias).keys() <= lora.lora_state_dict(ours, bias).keys()

    @pytest.mark.parametrize("name", THEIRS)
    def test_training_goes_the_same_way(self, theirs, name):
        layers, x = self.pair(theirs, name), CASES[name].input(torch.float64)
        losses = []
        for layer in layers:
            (theirs if layer is layers[0] else lora).mark_only_lora_as_trainable(layer, bias="all")
            optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.01)
            losses.append([])
            for step in range(6):
                optimizer.zero_grad()
                loss = layer(x).square().mean()
                loss.backward()
                optimizer.step()
                layer.eval() if step % 2 else layer.train()
                losses[-1].append(layer(x).square().mean().item())
                layer.train()
        assert losses[0] == pytest.approx(losses[1], rel=1e-10, abs=0)
        assert losses[0][-1] < losses[0][0]

    def test_dropout_has_the_same_statistics(self, theirs):
        with warnings.catch_warnings():
            layers, x = self.pair(theirs, "linear", lora_dropout=0.25), torch.randn(1, K, dtype=torch.float64)
        with torch.no_grad():
            spread = [layer(x.expand(4000, K)) for layer in layers]
        sigma = torch.stack([y.std(0) for y in spread]).mean(0)
        assert ((spread[0].mean(0) - spread[1].mean(0)).abs() < 5 * sigma * (2 / 4000) ** 0.5).all()
        assert ((spread[0].std(0) / spread[1].std(0)) - 1).abs().max() < 5 * (1 / 4000) ** 0.5
