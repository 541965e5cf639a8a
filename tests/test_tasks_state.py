"""State dicts of tasks.Model: what they hold, and what is refused."""

import copy

import pytest
import torch
from tasks_net import inputs, make_model, make_net, same, values
from torch import nn

from fused_lora.tasks import Model


def test_state_dicts_name_what_they_hold():
    net = make_net()
    keys = list(net.state_dict())
    model = make_model("a", "aa", net=net)
    assert list(model.state_dict()) == keys
    assert list(model.state_dict(prefix="net.", keep_vars=True)) == [f"net.{key}" for key in keys]
    assert model.state_dict(keep_vars=True)["fc1.weight"] is net.fc1.base.weight
    task_keys = list(model.state_dict(task="aa"))
    assert task_keys[:2] == ["embed.aa.lora_a", "embed.aa.lora_b"]
    assert len(task_keys) == 2 * sum(1 for _ in model.lora_layers()) == 2 * 17
    assert "layers.11.0.aa.lora_b" in task_keys
    twin = make_net(seed=1)
    assert twin.load_state_dict(model.state_dict()) == ([], [])
    assert same(twin.eval()(*inputs()), model(*inputs()))
    assert list(Model(nn.Linear(2, 2)).add_task("x").state_dict(task="x")) == ["x.lora_a", "x.lora_b"]
    assert list(Model(nn.Linear(2, 2)).state_dict()) == ["weight", "bias"]


def test_versions_of_modules_travel_with_the_state_dict():
    net = make_net()
    versions = net.state_dict()._metadata
    model = make_model("a", net=net)
    assert dict(model.state_dict()._metadata) == dict(versions)
    old = model.state_dict()
    del old["norm.num_batches_tracked"]
    old._metadata["norm"] = {"version": 1}
    assert model.load_state_dict(old, strict=False).missing_keys == ["norm.num_batches_tracked"]


def break_state(state):
    first, second, third, fourth, *_ = (key for key, t in state.items() if t.is_floating_point())
    state[first] = state[first][..., :1]
    state[second] = torch.full_like(state[second], torch.nan)
    state[third] = state[third].long()
    state[fourth] = state[fourth].numpy()
    *_, last = state
    state["unknown"] = state.pop(last)
    return first, second, third, fourth, last


@pytest.mark.parametrize("task", [None, "a"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_bad_state_dict_is_refused_whole(task, strict):
    model = make_model("a", "b")
    state = {key: t.detach() + 1 for key, t in model.state_dict(task).items()}
    shape, nan, integer, array, missing = break_state(state)
    before = values(model.model.state_dict().values())
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        model.load_state_dict(state, task=task, strict=strict)
    message = str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    assert (
        f"{shape} has shape {tuple(state[shape].shape)} instead of {tuple(model.state_dict(task)[shape].shape)}"
        in message
    )
    assert f"{nan} holds NaN" in message
    assert f"{integer} holds torch.int64, not floating numbers" in message
    assert f"{array} is a ndarray, not a tensor" in message
    assert (f"1 missing: {missing}" in message) is ("1 extra: unknown" in message) is strict
    assert same(model.model.state_dict().values(), before)


def test_a_state_dict_of_something_else_is_refused():
    model = make_model("a", "b")
    with pytest.raises(
        ValueError, match=r"not a state dict of task 'a'; its keys are those of 'b'; nothing was loaded"
    ):
        model.load_state_dict(model.state_dict(task="b"), task="a")
    with pytest.raises(ValueError, match=r"not a state dict of the base network.*missing: embed.weight"):
        model.load_state_dict(model.state_dict(task="b"))
    with pytest.raises(ValueError, match=r"not a state dict of task 'a'; nothing was loaded;.* extra"):
        model.load_state_dict(model.state_dict(), task="a")
    damaged = model.state_dict(task="a") | {"more": torch.ones(1)}
    del damaged["fc1.a.lora_a"]
    with pytest.raises(ValueError, match=r"task 'a'; nothing was loaded; 1 missing: fc1.a.lora_a; 1 extra: more"):
        model.load_state_dict(damaged, task="a")
    with pytest.raises(ValueError, match=r"embed.a.lora_a has shape \(2, 20\) instead of \(4, 20\)"):
        model.load_state_dict(Model(make_net(), r=2).add_task("a").state_dict(task="a"), task="a")
    with pytest.raises(TypeError, match="must be a mapping"):
        model.load_state_dict([1])
    state = {key.replace(".b.", ".a."): t for key, t in model.state_dict(task="b").items()}
    model.load_state_dict(state, task="a")
    assert same(model.task_parameters("a"), model.task_parameters("b"))
    part = {key: t * 0 for key, t in state.items() if key.startswith("fc1.")} | {"more": torch.ones(1)}
    missing, extra = model.load_state_dict(part, task="a", strict=False)
    assert (len(missing), extra) == (2 * 17 - 2, ["more"])
    assert not model.model.fc1.tasks["a"].lora_b.any()
    assert model.model.fc10.tasks["a"].lora_b.all()


def test_a_module_around_the_model_saves_and_loads_everything():
    first, second = (nn.ModuleDict({"inner": make_model("a", "b", net=make_net(seed))}) for seed in (0, 1))
    state = copy.deepcopy(first.state_dict())
    assert set(state) >= {"inner.model.fc.base.weight", "inner.model.fc.tasks.a.lora_a"}
    second.load_state_dict(state)
    for task in (None, "a", "b"):
        assert torch.equal(second["inner"](*inputs(), task=task), first["inner"](*inputs(), task=task))
