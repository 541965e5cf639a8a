"""patch_peft beside PEFT itself: files, the model's other operations, the report, undoing it, and torch.compile."""

import copy
import io
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import K, N, Projections, R, Run, assert_accurate, layers, patched_copy, peft_model, randomize, run
from torch import nn

from fused_lora import PatchReport, patch_peft, peft_status, unpatch_peft

DY = torch.randn(7, 3 * N, generator=torch.Generator().manual_seed(1))
X = torch.randn(7, K, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def buffer_of(model, directory):
    model.save_pretrained(directory)
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "README.md"}


def settings_of(files):
    """The config as parsed JSON. PEFT writes target_modules, a set, in whatever order the set and its copy have."""
    config = json.loads(files["adapter_config.json"])
    return {**config, "target_modules": sorted(config["target_modules"])}


@pytest.mark.parametrize("config", [{}, {"use_dora": True, "lora_dropout": 0.1}, {"bias": "all"}], ids=str)
def test_files_and_state_dict_are_identical(config, tmp_path):
    model = peft_model(**config)
    ours, _ = patched_copy(model)
    ours(X).sum().backward()
    assert list(ours.state_dict()) == list(model.state_dict())
    mine, other = buffer_of(ours, tmp_path / "ours"), buffer_of(model, tmp_path / "plain")
    assert mine.keys() == other.keys()
    assert mine["adapter_model.safetensors"] == other["adapter_model.safetensors"]
    assert settings_of(mine) == settings_of(other)
    loaded = PeftModel.from_pretrained(Projections(), tmp_path / "ours")
    assert patch_peft(loaded).fused == 3
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items() if "lora" in k)


def weighted(model, kind, **settings):
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=kind, **settings)
    model.set_adapter("sum")
    return model


OPERATIONS = {
    "merge_and_unload": lambda m: m.merge_and_unload(),
    "safe_merge": lambda m: m.merge_and_unload(safe_merge=True),
    "unload": lambda m: m.unload(),
    "merge-unmerge": lambda m: (m.merge_adapter(), m.unmerge_adapter(), m)[-1],
    "linear": lambda m: weighted(m, "linear"),
    "cat": lambda m: weighted(m, "cat"),
    "svd": lambda m: weighted(m, "svd"),
    "dare_linear": lambda m: weighted(m, "dare_linear", density=0.5),
    "set_adapter": lambda m: (m.set_adapter("other"), m)[-1],
    "delete_adapter": lambda m: (m.delete_adapter("default"), m)[-1],
    "new all-linear adapter": lambda m: (m.add_adapter("new", LoraConfig(target_modules="all-linear", r=2)), m)[-1],
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "scale": lambda m: ([layer.scale_layer(0.5) for layer in layers(m)], m)[-1],
}


def assert_outputs_accurate(ours, plain):
    """The accuracy rule for y, several x through both models."""
    truth, draws = copy.deepcopy(plain).double(), []
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(40, K)
            draws.append(tuple(Run({"y": y}) for y in (ours(x), plain(x), truth(x.double()))))
    assert_accurate(draws)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_work_as_before(operation):
    model = peft_model(adapters=2, other_rank=R, lora_dropout=0.2, train=False)
    ours, _ = patched_copy(model)
    results = []
    for m in (model, ours):
        torch.manual_seed(3)
        results.append(OPERATIONS[operation](m).eval())  # PEFT makes new adapters in training mode
    assert list(results[0].state_dict()) == list(results[1].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(r.state_dict().values() for r in results), strict=True))
    if isinstance(results[0], Projections):  # merged or unloaded: plain layers
        assert torch.equal(results[1](X), results[0](X))
    else:
        assert_outputs_accurate(results[1], results[0])
        assert results[0].get_layer_status() == results[1].get_layer_status()
        assert results[0].get_model_status() == results[1].get_model_status()
        assert repr(results[0]) == repr(results[1])
        assert peft_status(results[1]).fused == 3
        with results[1].disable_adapter():
            base = results[1](X)
        with results[0].disable_adapter():
            assert torch.equal(base, results[0](X))


def test_patching_is_idempotent_and_undone():
    model = peft_model()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    patch_peft(model, dropout="torch")
    first = str(patch_peft(model))
    assert str(patch_peft(model)) == first == str(peft_status(model))
    model.merge_adapter()
    model.unmerge_adapter()
    model(X)
    assert unpatch_peft(model) == 3
    assert unpatch_peft(model) == 0
    assert all(type(layer) is lora.Linear for layer in layers(model))
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert {n: v.keys() for n, v in after.items()} == {n: v.keys() for n, v in before.items()}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, N, N))

    def forward(self, x):
        return x @ self.weight.sum(0)


class Varied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.line = nn.Embedding(5, K), nn.Linear(K, N)
        self.conv, self.attention = nn.Conv1d(K, N, 1), nn.MultiheadAttention(N, 3)
        self.experts = Experts()

    def forward(self, ids):
        x = self.table(ids)
        y = self.experts(self.line(x) + self.conv(x.t()).t())
        return self.attention(y, y, y)[0]


def varied_model():
    torch.manual_seed(0)
    targets = ["table", "line", "conv", "attention"]
    config = LoraConfig(r=4, target_modules=targets, target_parameters=["experts.weight"])
    model = get_peft_model(Varied(), config)
    randomize(model)
    return model


def test_report_names_every_layer_and_strict_changes_nothing():
    model = varied_model()
    with pytest.raises(ValueError, match="strict=True") as raised:
        patch_peft(model, strict=True)
    words = ("lora.Embedding", "lora.Conv1d", "lora.MultiheadAttention", "lora.ParamWrapper")
    assert all(word in str(raised.value) for word in words)
    assert type(model.base_model.model.line) is lora.Linear
    report = patch_peft(model)
    assert isinstance(report, PatchReport)
    assert report.fused == 1
    assert len(report.unfused) == len(report.layers) - 1 == 5
    assert all(status.reason for status in report.unfused)
    torch.testing.assert_close(model(torch.arange(5)), varied_model()(torch.arange(5)))
    late = peft_model()
    patch_peft(late, strict=True)
    with pytest.raises(ValueError, match="no LoRA layers"):
        patch_peft(nn.Linear(3, 3), strict=True)
    assert str(patch_peft(nn.Linear(3, 3))) == "fused-lora: the model has no LoRA layers"


def test_layers_added_later_are_reported():
    model = get_peft_model(Projections(), LoraConfig(r=4, target_modules=["q"]))
    patch_peft(model, strict=True)
    model.add_adapter("wider", LoraConfig(r=4, target_modules=["q", "k"]))
    assert "call patch_peft(model)" in str(peft_status(model))
    patch_peft(model)
    model.set_adapter("wider")
    assert peft_status(model).fused == 2


@pytest.mark.parametrize("call", [patch_peft, unpatch_peft, peft_status])
def test_misuse(call):
    with pytest.raises(TypeError, match="got list"):
        call([1])
    with pytest.raises(ValueError, match="'fused' or 'torch', got 'nn'"):
        patch_peft(nn.Linear(2, 2), dropout="nn")


def recompiles(model, adapters, **compile_args):
    """How many graphs a script of adapter switches, row counts, modes and gradients compiles."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, **compile_args)
    for adapter in adapters:
        model.set_adapter(adapter)
        for rows in (4, 7, 0):
            compiled(torch.randn(rows, K, requires_grad=True)).sum().backward()
    compiled(torch.randn(2, 5, K))
    with torch.no_grad(), model.disable_adapter():
        compiled(X)
    return len(graphs)


def test_recompile_budget():
    model = peft_model(adapters=2, target_modules=["q"], lora_dropout=0.1)
    model.set_adapter("default")
    ours, report = patched_copy(model)
    assert report.fused == 1
    with torch._dynamo.config.patch(recompile_limit=64):  # beyond the default limit both would count the same
        mine, other = (recompiles(m, ("default", "other", "default")) for m in (ours, model))
    print(f"\n{mine} graphs patched, {other} with PEFT")
    assert mine <= other + 2


@pytest.mark.parametrize("mode", ["fused", "torch"])
@pytest.mark.parametrize("config", [{}, {"base": "conv1d"}, {"lora_dropout": 0.2}], ids=str)
def test_compiles_without_a_graph_break(config, mode):
    model = peft_model(**config)
    ours, _ = patched_copy(model, dropout=mode)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    result = run(compiled, X, DY)
    if "lora_dropout" not in config:
        expected = run(ours, X, DY)
        for name, t in expected.results.items():
            torch.testing.assert_close(result.results[name.replace("dbase", "d_orig_mod.base")], t)


@pytest.mark.parametrize(
    "config", [{"use_dora": True, "lora_dropout": 0.2}, {"adapters": 2, "lora_dropout": 0.2}], ids=["dora", "several"]
)
def test_fused_in_eager_mode_only(config):
    """Compiled these are PEFT's forward, and the same bits."""
    model = peft_model(**config)
    ours, report = patched_copy(model)
    assert report.fused == 3
    results = []
    for m in (ours, model):
        torch._dynamo.reset()
        torch.manual_seed(8)
        results.append(run(torch.compile(m, backend="aot_eager"), X, DY))
    assert results[0].equals(results[1])


def test_hotswap_into_a_patched_model(tmp_path):
    first, second = peft_model(seed=1), peft_model(seed=2, r=2 * R)
    second.save_pretrained(tmp_path)
    prepare_model_for_compiled_hotswap(first, target_rank=2 * R)
    ours, report = patched_copy(first, strict=True)
    assert report.fused == 3
    for model in (first, ours):
        hotswap_adapter(model, tmp_path, "default")
    assert peft_status(ours).fused == 3
    assert_outputs_accurate(ours, first)


def test_saved_whole_and_loaded_in_one_line():
    ours, _ = patched_copy(peft_model(lora_dropout=0.1), dropout="torch")
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert peft_status(loaded).fused == 3
    assert layers(loaded)[0].__dict__["_fused_lora_dropout"] == "torch"


@pytest.mark.parametrize("mixed", [False, True])
def test_a_plain_adapter_beside_an_alora_is_fused(mixed, monkeypatch):
    """PEFT hands every layer of such a model the offsets, which only the aLoRA's own layers read."""
    model = peft_model(target_modules=["q"], alora_invocation_tokens=[5, 6])
    model.add_adapter("plain", LoraConfig(target_modules=["v"], r=2))
    model.base_model.set_adapter(["default", "plain"])
    randomize(model)
    ours, _ = patched_copy(model)
    called = []
    forward = lora.Linear.forward
    monkeypatch.setattr(lora.Linear, "forward", lambda self, *a, **k: called.append(self) or forward(self, *a, **k))
    names = {"adapter_names": ["plain"] * len(X)} if mixed else {}
    ours.base_model.model.v.eval()(X, alora_offsets=[1] * len(X), **names)
    assert called == []


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("config", [{}, {"lora_bias": True}, {"adapters": 2}], ids=str)
def test_torchs_dropout_in_a_compiled_graph_is_one_mask(config, backend):
    """The forward and the backward of a graph that torch's checkpointing runs eagerly inside draw two."""
    model = peft_model(lora_dropout=0.5, **config)
    ours, _ = patched_copy(model, dropout="torch")
    found = []
    for m in (ours, model):
        torch._dynamo.reset()
        torch.manual_seed(5)
        x = X.clone().requires_grad_()
        y = torch.compile(m, backend=backend)(x)
        y.backward(DY)
        found.append([y, x.grad, *(p.grad for p in m.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
