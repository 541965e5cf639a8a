"""tasks.Model: its steps, training in turns, several tasks at once, a task per row."""

import copy

import pytest
import torch
from tasks_net import inputs, make_model, make_net, same, values
from torch import nn

from fused_lora.tasks import Model


def test_the_steps_as_written():
    net, (ids, picture) = make_net().eval(), inputs()
    base_output = net(ids, picture)
    base_checkpoint = {key: t.clone() for key, t in net.state_dict().items()}

    model = Model(model=net)
    model.add_task("minimalist")
    model.add_task("anime")
    assert model.tasks == ["minimalist", "anime"]
    model.remove_task("anime")
    assert model.tasks == ["minimalist"]
    model.requires_grad_(requires_grad=False)
    model.requires_grad_(requires_grad=False, task="minimalist")
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(requires_grad=True, task="minimalist")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in model.task_parameters("minimalist")}

    assert torch.equal(model(ids, picture), base_output)
    assert torch.equal(model(ids, picture=picture, task="minimalist"), base_output)  # zero delta
    for parameter in model.task_parameters("minimalist"):
        nn.init.normal_(parameter)
    assert not torch.equal(model(ids, picture, task="minimalist"), base_output)
    assert torch.equal(model(ids, picture), base_output)

    checkpoint = model.state_dict()
    assert list(checkpoint) == list(base_checkpoint)
    assert all(torch.equal(checkpoint[key], t) for key, t in base_checkpoint.items())
    task_checkpoint = {key: t.clone() for key, t in model.state_dict(task="minimalist").items()}
    changed = model(ids, picture, task="minimalist")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert model.load_state_dict(base_checkpoint) == ([], [])
    assert torch.equal(model(ids, picture), base_output)
    assert model.load_state_dict(task_checkpoint, task="minimalist") == ([], [])
    assert torch.equal(model(ids, picture, task="minimalist"), changed)


def test_calls_chain_and_names_of_methods_are_names_of_tasks():
    model = Model(nn.Linear(4, 4)).add_task("train").add_task("keys").add_task("with space")
    assert model.remove_task("keys").requires_grad_(False, task="train").tasks == ["train", "with space"]
    assert model(torch.ones(2, 4), task="train").shape == (2, 4)


def test_three_tasks_trained_in_turns():
    torch.manual_seed(0)
    model = make_model()
    for name in ("a", "b", "c"):
        model.add_task(name, r=2)
    ids, picture = inputs(8)
    targets = {name: torch.randn(8, 4) for name in model.tasks}
    optimizers = {name: torch.optim.Adam(model.task_parameters(name), lr=0.02) for name in model.tasks}
    base, losses = values(model.model.state_dict().values()), {}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert len(frozen) + sum(len(model.task_parameters(name)) for name in model.tasks) == len(list(model.parameters()))
    frozen_before = values(frozen)
    for step in range(24):
        name = model.tasks[step % 3]
        others = [p for other in model.tasks if other != name for p in model.task_parameters(other)]
        before = values(others)
        loss = (model(ids, picture, task=name) - targets[name]).square().mean()
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
        assert same(others, before)
        losses.setdefault(name, []).append(loss.item())
    assert all(history[-1] < 0.8 * history[0] for history in losses.values())
    assert same(frozen, frozen_before)
    assert not same(model.model.state_dict().values(), base)
    assert all(p.grad is None for p in frozen)


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (6, 7)),
    "linear in 3 dimensions, no bias": (lambda: nn.Linear(7, 5, bias=False), (6, 3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding="valid"), (6, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="reflect"), (6, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (6, 2, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(11, 5, padding_idx=2), (6, 3)),
}


def make_layer(kind, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    model = make_model("a", "b", "c", net=build(), dtype=dtype, **settings)
    embedding = isinstance(model.model.base, nn.Embedding)
    return model, torch.randint(11, shape) if embedding else torch.randn(shape, dtype=dtype)


def gradients(model, y):
    """The gradients of a loss of y, by parameter."""
    parameters = [p for name in model.tasks for p in model.task_parameters(name)]
    return torch.autograd.grad(y.sin().sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("kind", LAYERS)
def test_several_at_once_is_the_sum_of_the_deltas(kind):
    model, x = make_layer(kind)
    base = model(x)
    deltas = {name: model(x, task=name) - base for name in model.tasks}
    weight = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)
    for chosen in (["a", "c"], {"b": 2, "a": 0.25, "c": weight}, {"a": 0.0, "b": 1.0}):
        wanted = base + sum(deltas[name] * (chosen[name] if isinstance(chosen, dict) else 1) for name in chosen)
        y = model(x, tasks=chosen)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(model, y), gradients(model, wanted), rtol=1e-10, atol=1e-12)
        if isinstance(chosen, dict) and "c" in chosen:
            grads = [torch.autograd.grad(out.sin().sum(), weight)[0] for out in (model(x, tasks=chosen), wanted)]
            torch.testing.assert_close(*grads)
    torch.testing.assert_close(model(x, tasks=["b"]), model(x, task="b"))
    model.model.tasks["a"].enabled = False
    torch.testing.assert_close(model(x, tasks=["a", "b"]), model(x, task="b"))
    assert torch.equal(model(x, tasks=["a"]), base)


def test_several_at_once_with_dropout():
    model, _ = make_layer("linear", lora_dropout=0.5)
    model.train()
    x = torch.ones(20000, 7, dtype=torch.float64)
    mean = model(x, tasks=["a", "b"]).mean(0)
    wanted = model.eval()(x[:1], tasks=["a", "b"])[0]
    spread = model.train()(x, tasks=["a", "b"]).std(0) / 20000**0.5
    assert ((mean - wanted).abs() < 5 * spread).all()
    assert (spread > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_at_once_is_as_accurate_as_adding_branches(dtype):
    torch.manual_seed(0)
    model = make_model("a", "b", net=nn.Linear(96, 64), dtype=dtype, r=8)
    x = torch.randn(200, 96, dtype=dtype)
    exact = copy.deepcopy(model).double()
    truth = exact(x.double(), tasks={"a": 0.3, "b": 1.7})
    layer = model.model
    plain = layer.base(x)
    for name, weight in (("a", 0.3), ("b", 1.7)):
        task = layer.tasks[name]
        a, b = task.lora_a, task.lora_b
        plain = (plain + weight * task.scale * nn.functional.linear(nn.functional.linear(x.to(a.dtype), a), b)).to(
            dtype
        )
    ours = model(x, tasks={"a": 0.3, "b": 1.7})
    assert ours.dtype == dtype
    for norm in (torch.amax, torch.mean):
        assert norm((ours.double() - truth).abs()) <= 2 * norm((plain.double() - truth).abs())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_task_per_row_of_one_layer(kind):
    model, x = make_layer(kind)
    for rows in (["a", "b", "a", None, "c", "b"], ["a"] * 6, [None] * 6, ["a", "a", "b", "b", "c", "c"]):
        wanted = torch.cat([model(x[i : i + 1], task=name) for i, name in enumerate(rows)])
        y = model(x, task=rows)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
        if y.requires_grad:
            torch.testing.assert_close(gradients(model, y), gradients(model, wanted), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_task_per_row_of_a_network(dtype):
    model = make_model("a", "b", dtype=dtype)
    ids, picture = inputs(6, dtype)
    rows = ("b", None, "a", "b", "a", None)
    alone = [model(ids[i : i + 1], picture[i : i + 1], task=name) for i, name in enumerate(rows)]
    ours = model(ids, picture, task=rows)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, torch.cat(alone), rtol=1e-11, atol=1e-12)
        return
    exact = copy.deepcopy(model).double()
    truth = torch.cat([exact(ids[i : i + 1], picture[i : i + 1].double(), task=name) for i, name in enumerate(rows)])
    error, alone_error = (t.double() - truth for t in (ours, torch.cat(alone)))
    assert error.square().mean() <= 4 * alone_error.square().mean()


def test_positions_that_all_rows_share():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.place = nn.Embedding(9, 4), nn.Embedding(5, 4)

        def forward(self, ids):
            return self.token(ids) * self.place(torch.arange(ids.shape[1])[None])

    model, ids = make_model("a", "b", net=Positions()), torch.randint(9, (3, 5))
    wanted = torch.cat([model(ids[i : i + 1], task=name) for i, name in enumerate(["b", None, "a"])])
    torch.testing.assert_close(model(ids, task=["b", None, "a"]), wanted)


class Looks(nn.Module):
    """Adds what it looks up for ``index(x)``."""

    def __init__(self, index):
        super().__init__()
        self.fc, self.place, self.index = nn.Linear(4, 4), nn.Embedding(9, 4), index

    def forward(self, x):
        return self.fc(x) * self.place(self.index(x))


POSITIONS = {
    "positions": lambda x: torch.arange(x.shape[1]),
    "from a distance": lambda x: (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs().log1p().long(),
    "written in place": lambda x: torch.zeros(x.shape[1], dtype=torch.long).add_(torch.arange(x.shape[1])).view(-1),
}
OF_ROWS = {
    "from the batch": lambda x: x.argmax(-1),
    "random for each row": lambda x: torch.randint(9, (len(x), 1)),
    "from Python": lambda x: torch.tensor([[i] for i in range(len(x))]),
    "the same for all rows": lambda x: torch.zeros(x.shape[:2], dtype=torch.long),
    "made, then mixed with the batch": lambda x: torch.arange(len(x))[:, None] + x.argmax(-1) * 0,
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_that_look_like_rows_are_refused(kind):
    model, x = make_model("a", net=Looks(POSITIONS[kind])), torch.randn(5, 5, 4)
    for rows in (5, 3):
        with pytest.raises(ValueError, match=r"layer 'place' got an input of shape \(5.*leave the layer out"):
            model(x[:rows], task=["a", None, "a", None, "a"][:rows])
    model = make_model("a", net=Looks(POSITIONS[kind]), exclude_modules=["place"])
    wanted = [model(x, task=task) for task in ("a", None)]
    y = model(x, task=["a", None, "a", None, "a"])
    torch.testing.assert_close(y, torch.stack([wanted[i % 2][i] for i in range(5)]))


@pytest.mark.parametrize("kind", OF_ROWS)
def test_indices_of_rows_are_rows(kind):
    model, x = make_model("a", net=Looks(OF_ROWS[kind])), torch.randn(5, 5, 4)
    for _ in range(2):
        y = model(x, task=["a", None, "a", None, "a"])
        torch.manual_seed(0)
    if "random" not in kind:
        wanted = [model(x, task=task) for task in ("a", None)]
        torch.testing.assert_close(y, torch.stack([wanted[i % 2][i] for i in range(5)]))


def test_rows_that_are_not_the_first_dimension_are_refused():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x.flatten(0, 1))

    model = Model(Flat()).add_task("a")
    with pytest.raises(ValueError, match=r"for 2 rows, but layer 'fc' got an input of shape \(10, 3\)"):
        model(torch.ones(2, 5, 3), task=["a", None])
    assert model(torch.ones(0, 5, 3), task=[]).shape == (0, 3)
