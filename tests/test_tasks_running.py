"""Which task runs where: threads, torch.compile, transforms, code that reads weights."""

import copy

import pytest
import torch
from tasks_blocks import Net, assert_same, batch, build, gradients, together, value
from torch import nn

from fused_lora import tasks


def test_threads_see_their_own_task():
    model, x = build(), batch().detach()
    expected = {name: model(x, task=name).detach() for name in ("a", "b", None)}

    def work(name):
        return sum(not torch.equal(model(x, task=name), expected[name]) for _ in range(200))

    assert together(work, list(expected)) == {"a": 0, "b": 0, None: 0}


def test_a_network_that_starts_threads_is_told_so():
    class Threaded(Net):
        def forward(self, x):
            return together(self.blocks[0], [x])[x]

    with pytest.raises(RuntimeError, match=r"layer 'blocks.0.up' was called while no tasks.Model runs on this thread"):
        build(None, Threaded)(batch(), task="a")


CALLS = [{"task": "a"}, {}, {"task": "b"}, {"tasks": {"a": 0.25, "c": 2.0}}, {"task": ["a", None, "b", "a"]}]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def build_small(mode=None):
    return build(mode, lambda m: Net(m, depth=1))


@pytest.mark.parametrize("mode", [None, False], ids=["plain", "checkpointed"])
def test_compiled_model(mode, dynamo):
    model, x = build_small(mode), batch()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    calls = CALLS if mode is None else CALLS[:2]
    for arguments in calls:
        y, wanted = compiled(x, **arguments), model(x, **arguments)
        torch.testing.assert_close(y, wanted)
        ours, plain = (torch.autograd.grad(value(out), x)[0] for out in (y, wanted))
        torch.testing.assert_close(ours, plain)
    graphs = dynamo["unique_graphs"]
    assert graphs <= len(calls)  # one for each selection
    for arguments in calls:
        compiled(x, **arguments)
    assert dynamo["unique_graphs"] == graphs


def test_compiled_block_inside_an_eager_model(dynamo):
    model, x = build_small(), batch()
    expected = [model(x, **arguments) for arguments in CALLS]
    model.model.blocks[0].compile(fullgraph=True, backend="eager")
    for arguments, wanted in zip(CALLS, expected, strict=True):
        torch.testing.assert_close(model(x, **arguments), wanted)

    wanted = {name: model(x, task=name).detach() for name in ("a", "b", None)}
    work = lambda name: sum(not torch.equal(model(x, task=name), wanted[name]) for _ in range(50))  # noqa: E731
    assert together(work, list(wanted)) == {"a": 0, "b": 0, None: 0}


def test_compiled_block_beside_an_embedding(dynamo):
    """A batch of new shapes is watched for positions that are no rows; compiled blocks run in it all the same."""

    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, ids):
            return self.block(self.embed(ids))

    model, ids = tasks.Model(Embeds()).add_task("a"), torch.arange(6).view(3, 2)
    for p in model.task_parameters("a"):
        nn.init.normal_(p)
    rows = ["a", None, "a"]
    wanted = model(ids, task=rows)
    model.model.block.compile(fullgraph=True, backend="eager")
    for width in (2, 2, 1, 1):
        torch.testing.assert_close(model(ids[:, :width], task=rows), wanted[:, :width])
    assert dynamo["unique_graphs"] > 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, task=rows), wanted)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_compiled_block_inside_a_checkpoint(reentrant, dynamo):
    loss = lambda m, x: value(m(x, task="a")) + 2 * value(m(x, task="b"))  # noqa: E731
    plain = gradients(build_small(), loss)
    model = build_small(reentrant)
    model.model.blocks[0].compile(backend="eager")
    assert_same(gradients(model, loss), plain)


def test_functional_transforms():
    model, x = build(), batch().detach()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    doubled = {name: p * 2 if ".base." in name else p for name, p in parameters.items()}

    def loss(p, x):
        return value(torch.func.functional_call(model, p, (x,), {"task": "a"}))

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(doubled[name])
    torch.testing.assert_close(loss(doubled, x), value(twin(x, task="a")))
    ours = torch.func.grad(loss, argnums=1)(parameters, x)
    torch.testing.assert_close(ours, gradients(model, lambda m, x: value(m(x, task="a")))["x"])
    rows = torch.func.vmap(lambda row: model(row, task="b"))(x)
    torch.testing.assert_close(rows, model(x, task="b"))


def test_a_forward_that_raises_leaves_the_model_usable():
    class Fragile(Net):
        def forward(self, x):
            y = super().forward(x)
            if x.isnan().any():
                raise ValueError("not a number")
            return y

    model, x = build(None, Fragile), batch().detach()
    expected = {name: model(x, task=name) for name in ("a", None)}
    for task in ("a", "b", ["a", "b", "c", None]):
        with pytest.raises(ValueError, match="not a number"):
            model(x * torch.nan, task=task)
    with pytest.raises(ValueError, match="not a number"), model.using("b"):
        model(x * torch.nan, task="a")
    for name, wanted in expected.items():
        assert torch.equal(model(x, task=name), wanted)
    with pytest.raises(RuntimeError, match="no task is selected"):
        model.model(x)


def test_using():
    model, x = build(), batch()
    with model.using("a") as network:
        assert torch.equal(network(x), model(x, task="a"))
        assert torch.equal(model(x, task="b"), model(x, task="b"))
        assert torch.equal(network(x), model(x, task="a"))
        with model.using(tasks=["b", "c"]):
            assert torch.equal(network(x), model(x, tasks=["b", "c"]))
    with model.using():
        assert torch.equal(network(x), model(x))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_transformer_encoder_that_reads_weights_in_evaluation(compiled, dynamo):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.TransformerEncoder(layer, 1).eval()
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        before = network(x, src_key_padding_mask=padding)
    model = tasks.Model(network, r=2)
    for name in ("a", "b"):
        model.add_task(name)
        for p in model.task_parameters(name):
            nn.init.normal_(p)
    run = torch.compile(model, backend="eager") if compiled else model
    wanted = {name: model(x, src_key_padding_mask=padding, task=name).detach() for name in ("a", "b")}
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=padding), before)
        for name, y in wanted.items():
            ours = run(x, src_key_padding_mask=padding, task=name)
            torch.testing.assert_close(ours[~padding], y[~padding])
    assert not torch.allclose(wanted["a"][~padding], wanted["b"][~padding])


def test_code_that_computes_with_a_weight_is_refused_while_a_task_runs():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.embed = nn.Linear(8, 8), nn.Embedding(8, 8)
            self.read = lambda net, x: nn.functional.linear(x, net.fc.weight)

        def forward(self, x):
            return self.read(self, self.fc(x.to(self.fc.weight.dtype)) * self.fc.in_features)

    model, x = tasks.Model(Reads()), batch().detach()
    model.add_task("a")
    assert model(x).shape == x.shape
    with pytest.raises(RuntimeError, match="linear on the weight of a layer while a task runs"):
        model(x, task="a")
    model.model.read = lambda net, x: nn.functional.linear(x, net.embed.weight)  # a tied output matrix stays the base's
    assert model(x, task="a").shape == x.shape
