"""tasks.Model under activation checkpointing: layers that run again in backward find the task their forward ran."""

import threading
from types import SimpleNamespace

import pytest
import torch
import transformers
from tasks_blocks import Net, assert_same, batch, build, gradients, together, value
from torch.utils.checkpoint import checkpoint

from fused_lora import tasks

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),  # under no_grad
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]
MODES = pytest.mark.parametrize("mode", [False, True], ids=["non-reentrant", "reentrant"])
LOSSES = {
    "one": lambda m, x: value(m(x, task="a")),
    "base": lambda m, x: value(m(x)),
    "several": lambda m, x: value(m(x, tasks={"a": 0.5, "c": -2.0})),
    "rows": lambda m, x: value(m(x, task=["b", None, "a", "b"])),
    "in turns": lambda m, x: value(m(x, task="a")) + 2 * value(m(x, task="b")) - value(m(x)),
    "one into the other": lambda m, x: value(m(m(x, task="a"), task=["c", "b", None, "c"])),
    "with others in between": lambda m, x: between(m, x),
}


def between(model, x):
    """The graph of one call, with calls that leave no graph, and one that raises, before its backward."""
    loss = value(model(x, task="a"))
    with torch.no_grad():
        model(x, task="b")
    with pytest.raises(ValueError, match="unknown task"):
        model(x, task="z")
    model(x, task="c")
    return loss


@MODES
@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_are_those_of_the_plain_network(kind, mode):
    assert_same(gradients(build(mode), LOSSES[kind]), gradients(build(), LOSSES[kind]))


@MODES
def test_dropout_draws_the_same_masks(mode):
    settings = {"lora_dropout": 0.4}
    for loss in (LOSSES["one"], LOSSES["several"], LOSSES["rows"]):
        assert_same(gradients(build(mode, **settings), loss), gradients(build(**settings), loss))


WRAPS = {
    "tuple": (lambda y: (y, 3), lambda out: out[0]),
    "nested": (lambda y: {"a": [None, (y,)]}, lambda out: out["a"][1][0]),
    "model output": (
        lambda y: transformers.modeling_outputs.BaseModelOutput(last_hidden_state=y),
        lambda out: out.last_hidden_state,
    ),
}


@MODES
@pytest.mark.parametrize("kind", WRAPS)
def test_outputs_of_any_structure(kind, mode):
    wrap, take = WRAPS[kind]
    model = build(mode, lambda m: Net(m, wrap))
    loss = lambda m, x: value(take(m(x, task="a"))) + value(take(m(x, task="b")))  # noqa: E731
    plain = lambda m, x: value(m(x, task="a")) + value(m(x, task="b"))  # noqa: E731
    assert_same(gradients(model, loss), gradients(build(), plain))


@MODES
def test_a_checkpoint_around_the_call(mode):
    def loss(model, x):
        return value(checkpoint(lambda x: model(x, task="a") + model(x, task="b"), x, use_reentrant=mode))

    plain = gradients(build(), lambda m, x: value(m(x, task="a") + m(x, task="b")))
    assert_same(gradients(build(), loss), plain)
    assert_same(gradients(build(False), loss), plain)


@MODES
def test_backward_twice_and_in_the_other_order(mode):
    def both(model):
        x = batch()
        first, second = value(model(x, task="a")), value(model(x, task="b"))
        second.backward(retain_graph=True)
        first.backward()
        second.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}

    assert_same(both(build(mode)), both(build()))


@MODES
def test_threads_train_their_own_task(mode):
    plain, model = build(), build(mode)

    def work(model, name):
        x, found = batch(), []
        leaves = [*model.task_parameters(name), x]
        for _ in range(10):
            value(model(x, task=name)).backward()
            found.append([leaf.grad for leaf in leaves])
            for leaf in leaves:
                leaf.grad = None
        return found

    ours = together(lambda name: work(model, name), ["a", "b", "c"])
    for name, found in ours.items():
        wanted = work(plain, name)[0]
        for step in found:
            torch.testing.assert_close(step, wanted, rtol=1e-9, atol=1e-9)


@MODES
def test_backward_on_another_thread(mode):
    model, plain = build(mode), build()
    losses = [value(m(batch(), task="a")) for m in (model, plain)]
    with torch.no_grad():
        model(batch(), task="b")
    threads = [threading.Thread(target=loss.backward) for loss in losses]
    for thread in threads:
        thread.start()
        thread.join()
    for ours, wanted in zip(model.task_parameters("a"), plain.task_parameters("a"), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-9, atol=1e-9)
    assert all(p.grad is None for p in model.task_parameters("b"))


@MODES
def test_backward_inside_another_selection(mode):
    def loss(model, x):
        y = model(x, task="a")
        with model.using("b") as network, torch.no_grad():
            network(x)
        return value(y)

    plain = gradients(build(), loss)
    model, x = build(mode), batch()
    found = loss(model, x)
    with model.using(tasks=["b", "c"]):
        found.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}
    assert_same(named, plain)


class Calls(Net):
    """Calls another model, with another task, in the middle of its own forward."""

    def forward(self, x):
        y = super().forward(x)
        z = self.others[0](y, task="b")
        return checkpoint(self.blocks[0], z, use_reentrant=self.mode) if self.mode is not None else self.blocks[0](z)


@MODES
def test_calls_within_calls(mode):
    def run(mode):
        inner, outer = build(mode), build(mode, Calls)
        outer.model.others = [inner]  # in a list: a part of the network it must not be
        x = batch()
        value(outer(x, task="a")).backward()
        named = [(f"{i}.{n}", p.grad) for i, m in enumerate((inner, outer)) for n, p in m.named_parameters()]
        return {name: grad for name, grad in named if grad is not None} | {"x": x.grad}

    assert_same(run(mode), run(None))


def test_two_models_in_one_graph():
    def run(mode):
        first, second = build(mode), build(mode)
        x = batch()
        value(second(first(x, task="a"), task="b") + first(x, task="c")).backward()
        named = [(f"{i}.{n}", p.grad) for i, m in enumerate((first, second)) for n, p in m.named_parameters()]
        return {name: grad for name, grad in named if grad is not None} | {"x": x.grad}

    assert_same(run(False), run(None))


HIDDEN = {
    "a part that was not returned": (lambda y: 2 * y, lambda model, out: model.model.side),
    "an output torch cannot look into": (lambda y: SimpleNamespace(y=y), lambda model, out: out.y),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_what_cannot_be_told_raises_instead_of_guessing(kind):
    wrap, hidden = HIDDEN[kind]
    model = build(False, lambda m: Net(m, wrap))
    out = model(batch(), task="a")
    model(batch(), task="b")
    with pytest.raises(RuntimeError, match="it cannot be told which task its forward ran"):
        value(hidden(model, out)).backward()
    with torch.no_grad():
        assert hidden(model, model(batch(), task="b")).shape == batch().shape, "the model goes on working"


def test_nothing_is_kept_once_the_graph_is_gone():
    from fused_lora.task_selection import _records

    model, before = build(False), len(_records)
    loss = value(model(batch(), task="a"))
    assert len(_records) == before + 1
    loss.backward()
    del loss, model  # the network keeps what it did not return
    assert len(_records) == before


def test_a_language_model_with_its_own_checkpointing():
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    ids = torch.arange(12).reshape(2, 6)

    def run(checkpointing):
        torch.manual_seed(0)
        network = transformers.LlamaForCausalLM(config).double().train()
        if checkpointing:
            network.gradient_checkpointing_enable()
        model = tasks.Model(network, r=2, target_modules="all-linear").add_task("a").add_task("b")
        for name in model.tasks:
            for p in model.task_parameters(name):
                torch.nn.init.normal_(p, std=0.4)
        out = [model(input_ids=ids, labels=ids, use_cache=False, task=task) for task in ("a", ["b", "a"])]
        (out[0].loss + out[1].loss).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    assert_same(run(True), run(False))
