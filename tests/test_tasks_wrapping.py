"""What tasks.Model wraps, wrappers of users, and what nn.Module does to the result."""

import copy
import pickle

import pytest
import torch
from tasks_net import inputs, make_model, make_net
from torch import nn

from fused_lora import LoRALinear, tasks
from fused_lora.task_layer import TaskLayer
from fused_lora.tasks import Model

X = torch.ones(4, 3)


class Scaled(nn.Module):
    """A wrapper that keeps its module as a submodule and starts as it."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.gain, self.steps = nn.Parameter(torch.ones(1)), nn.Buffer(torch.zeros(1))

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs) * self.gain


@pytest.fixture
def registered():
    tasks.register_base_module_wrapper(nn.Sequential, Scaled)
    yield
    tasks.register_base_module_wrapper(nn.Sequential, None)


def test_registered_wrapper(registered):
    class Special(nn.Sequential):
        pass

    net = nn.ModuleDict({"body": Special(nn.Linear(4, 4), nn.Tanh()), "head": nn.Linear(4, 2)})
    net.forward = lambda x: net["head"](net["body"](x))
    inner, x = net["body"][0], torch.randn(3, 4)
    before = net(x)
    model = Model(net, r=2).add_task("a").add_task("b")
    assert [layer.path for layer in model.lora_layers()] == ["body", "head"]
    assert net["body"].base[0] is inner  # what is inside is left alone
    assert isinstance(net["body"].tasks["a"], Scaled)
    assert torch.equal(model(x, task="a"), before)
    nn.init.constant_(net["body"].tasks["a"].gain, 3.0)
    torch.testing.assert_close(model(x, task="a"), net["head"].base(3 * net["body"].base(x)))
    assert torch.equal(model(x, task="b"), before)
    assert list(model.state_dict(task="a")) == ["body.a.gain", "body.a.steps", "head.a.lora_a", "head.a.lora_b"]
    assert list(model.state_dict()) == ["body.0.weight", "body.0.bias", "head.weight", "head.bias"]
    assert len(model.task_parameters("a")) == 3
    model.requires_grad_(True)
    model.requires_grad_(False, task="a")
    assert inner.weight.requires_grad
    assert not net["body"].tasks["a"].gain.requires_grad
    saved = copy.deepcopy(model.state_dict(task="a"))
    nn.init.constant_(net["body"].tasks["a"].gain, 7.0)
    model.load_state_dict(saved, task="a")
    assert net["body"].tasks["a"].gain == 3

    wanted = torch.cat([model(x[i : i + 1], task=name) for i, name in enumerate(["a", None, "a"])])
    torch.testing.assert_close(model(x, task=["a", None, "a"]), wanted)
    model.train()
    net["body"].base[1].eval()
    modes = [module.training for module in net["body"].base.modules()]
    assert model.add_task("c").model["body"].tasks["c"].training
    assert [module.training for module in net["body"].base.modules()] == modes
    with pytest.raises(TypeError, match=r"'body'.*wrapper of Special gives a Scaled, which has none"):
        model(x, tasks=["a", "b"])


def test_registered_wrapper_rows_it_cannot_take_apart(registered):
    class Odd(nn.Sequential):
        def forward(self, x, other):
            return x.sum() if other.dim() == 2 else x

    model = Model(Odd(nn.Linear(2, 2))).add_task("a")
    with pytest.raises(ValueError, match=r"a registered Odd, got a tensor of shape \(5, 2\)"):
        model(torch.ones(3, 2), torch.ones(5, 2), task=["a", None, "a"])
    with pytest.raises(TypeError, match="does not return tensors whose first dimension is the batch"):
        model(torch.ones(3, 2), torch.ones(3, 2), task=["a", None, "a"])
    assert model(torch.ones(3, 2), other=torch.ones(3), task=["a", None, "a"]).shape == (3, 2)


def test_registering():
    class Own(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(3, 3), Own(3, 3))
    assert [layer.path for layer in Model(copy.deepcopy(net)).lora_layers()] == ["0"]  # exact types only
    Model.register_base_module_wrapper(Own, lambda module: LoRALinear.from_linear(module, r=1))
    try:
        model = Model(net).add_task("a")
        assert [layer.tasks["a"].r for layer in model.lora_layers()] == [8, 1]
        tasks.register_base_module_wrapper(Own, lambda module: "text")
        with pytest.raises(TypeError, match="layer '1': the constructor for Own returned 'text', not a module"):
            model.add_task("b")
        assert model.tasks == ["a"]
        assert [list(layer.tasks) for layer in model.lora_layers()] == [["a"], ["a"]]
    finally:
        tasks.register_base_module_wrapper(Own, None)
    with pytest.raises(ValueError, match="no wrapper is registered for Own any more"):
        model.add_task("b")
    with pytest.raises(TypeError, match=r"must be a subclass of nn\.Module, got 3"):
        tasks.register_base_module_wrapper(3, Scaled)
    with pytest.raises(TypeError, match="constructor must be callable, got int"):
        tasks.register_base_module_wrapper(Own, 3)


def test_one_wrapper_for_all_names_of_a_layer():
    model = make_model("a")
    net = model.model
    assert net.alias is net.layers[0][0]
    assert isinstance(net.alias, TaskLayer)
    assert sum(1 for _ in model.lora_layers()) == 17
    twice = nn.Module()
    twice.x = twice.y = nn.Linear(2, 2)
    assert [layer.path for layer in Model(twice).lora_layers()] == ["x"]
    assert twice.x is twice.y


def nest(depth):
    """A linear layer at the bottom of containers of every kind."""
    inner = nn.Linear(3, 3)
    for i in range(depth):
        kinds = (nn.Sequential, lambda m: nn.ModuleList([m]), lambda m: nn.ModuleDict({"tasks": m, "base": nn.Tanh()}))
        inner = kinds[i % 3](inner)
    return inner


@pytest.mark.parametrize(
    ("build", "layers"),
    [(lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(300))), 300), (lambda: nest(120), 1)],
    ids=["long", "deep"],
)
def test_containers_of_any_length_and_depth(build, layers):
    net = build()
    keys = list(net.state_dict())
    model = Model(net, r=1).add_task("base").add_task("tasks")
    assert sum(1 for _ in model.lora_layers()) == layers
    assert list(model.state_dict()) == keys
    state = {key: t + 1 for key, t in model.state_dict(task="base").items()}
    assert len(state) == 2 * layers
    assert model.load_state_dict(state, task="base") == ([], [])
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict(task="base").items())
    assert not any(layer.tasks["tasks"].lora_b.any() for layer in model.lora_layers())
    if layers > 1:
        assert torch.equal(model(X), model(X, task="tasks"))
        assert not torch.equal(model(X), model(X, task="base"))


def test_choosing_layers():
    def paths(**settings):
        return [layer.path for layer in Model(make_net(), r=2, **settings).lora_layers()]

    assert paths(target_modules=["fc", "fc10"]) == ["fc", "fc10"]
    assert paths(target_modules=r".*\.1?1\.0") == ["layers.1.0", "layers.11.0"]
    assert "embed" not in paths(target_modules="all-linear")
    assert len(paths(exclude_modules=["embed", "conv"])) == 15
    model = (
        Model(make_net(), target_modules=["fc", "fc1"], rank_pattern={"fc1": 3}, r=2).add_task("a").add_task("b", r=5)
    )
    assert [layer.tasks[t].r for t in ("a", "b") for layer in model.lora_layers()] == [2, 3, 5, 3]
    with pytest.raises(ValueError, match=r"'fd1' matches none.*near names: fc1"):
        paths(target_modules=["fd1"])
    with pytest.raises(ValueError, match=r"norm cannot get LoRA: it is a BatchNorm2d\. Supported are Linear"):
        paths(target_modules=["norm", "fc"])
    with pytest.warns(UserWarning, match="'nothing' matches no module"):
        paths(target_modules=["fc", "nothing"])


def test_layers_that_cannot_get_lora_are_left_alone():
    attention = nn.MultiheadAttention(4, 2)  # reads the weight of its output layer
    normed = nn.utils.weight_norm(nn.Linear(4, 4))
    net = nn.ModuleList([attention, normed, nn.Embedding(3, 4, max_norm=1.0), nn.Linear(4, 4)])
    assert [layer.path for layer in Model(net).lora_layers()] == ["3"]


@pytest.mark.parametrize(
    ("settings", "attribute", "wanted"),
    [({}, "scale", 4.0), ({"lora_alpha": 6}, "scale", 1.5), ({"use_rslora": True}, "scale", 8.0)],
)
def test_settings_of_a_task(settings, attribute, wanted):
    model = make_model(lora_dropout=0.25).add_task("a", **settings)
    assert {getattr(layer.tasks["a"], attribute) for layer in model.lora_layers()} == {wanted}
    assert model.model.fc.tasks["a"].lora_dropout == 0.25


def test_an_unfrozen_base_trains_beside_a_task():
    for build, x in (
        (lambda: nn.Linear(3, 3), X),
        (lambda: nn.Conv1d(4, 2, 1), X[None]),
        (lambda: nn.Embedding(4, 3), X.long()),
    ):
        torch.manual_seed(0)
        model = make_model("a", "b", net=build(), r=2)
        outputs = [model(x, task="a"), model(x, tasks=["a", "b"]), model(x)]
        model.requires_grad_(True)
        for arguments, wanted in zip(({"task": "a"}, {"tasks": ["a", "b"]}, {}), outputs, strict=True):
            model.zero_grad()
            y = model(x, **arguments)
            torch.testing.assert_close(y, wanted)
            y.square().sum().backward()
            assert model.model.base.weight.grad.abs().sum() > 0
            assert all((p.grad is not None) is (arguments != {}) for p in model.task_parameters("a"))
        model.add_task("c")
        assert model.model.base.weight.requires_grad


def test_module_calls():
    model = make_model("a", lora_dropout=0.5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*inputs(), task="a"), model(*inputs(), task="a"))
        assert twin.model.fc.tasks["a"].weight is twin.model.fc.base.weight is not model.model.fc.base.weight
        assert list(twin.add_task("b").state_dict()) == list(model.state_dict())
    assert model.tasks == ["a"]
    model.train()
    assert model.model.fc.tasks["a"].training
    assert not torch.equal(model(*inputs(), task="a"), model(*inputs(), task="a"))
    model.eval().half()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.to(torch.float64).model.fc.tasks["a"].weight is model.model.fc.base.weight
    ids, picture = inputs(dtype=torch.float64)
    assert model(ids, picture, task="a").dtype == torch.float64
    assert repr(model).startswith("Model(\n  tasks=['a']")
    assert model.model.fc.in_features == 14
    names = [name for name, _ in model.named_parameters() if ".fc1." in name]
    assert names == [f"model.fc1.{n}" for n in ("base.weight", "base.bias", "tasks.a.lora_a", "tasks.a.lora_b")]
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.model.fc.nothing


def test_moving_to_new_storage_keeps_the_weights_shared():
    model = make_model("a").to("meta")
    assert {p.device.type for p in model.add_task("b").parameters()} == {"meta"}
    model.to_empty(device="cpu")
    for layer in model.lora_layers():
        for task in layer.tasks.values():
            assert task.weight is layer.base.weight
            assert task.bias is getattr(layer.base, "bias", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_task_follows_the_dtype_of_its_base(dtype):
    model = make_model("a", net=nn.Linear(4, 4), dtype=dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in model.task_parameters("a")} == {wanted}
    assert model(torch.ones(2, 4, dtype=dtype), tasks=["a"]).dtype == dtype


def test_hooks_of_a_wrapped_layer_run_once_whatever_is_selected():
    net, seen = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), []
    early = net[0].register_forward_hook(
        lambda module, args, y: seen.append(("early", type(module), module.in_features))
    )
    model = Model(net).add_task("a")
    late = model.model[0].register_forward_pre_hook(lambda module, args: seen.append(("late", len(args))))
    for arguments in ({}, {"task": "a"}, {"tasks": ["a"]}, {"task": ["a", None, "a", "a"]}):
        seen.clear()
        model(X, **arguments)
        assert seen == [("late", 1), ("early", TaskLayer, 3)]
    early.remove()
    late.remove()
    seen.clear()
    model(X, task="a")
    assert seen == []


def test_layers_called_with_keywords():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.embed = nn.Linear(3, 3), nn.Embedding(4, 3)

        def forward(self, ids):
            return self.fc(input=self.embed(input=ids))

    model, ids = make_model("a", "b", net=Keywords()), torch.tensor([[1], [2]])
    for arguments in ({}, {"task": "a"}, {"tasks": ["a", "b"]}, {"task": ["b", None]}):
        assert model(ids, **arguments).shape == (2, 1, 3)
