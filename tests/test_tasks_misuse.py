"""tasks.Model: wrong arguments are refused by name and change nothing."""

import pytest
import torch
from tasks_net import make_net
from torch import nn

from fused_lora import LoRAConfig, apply_lora, merge_lora, remove_lora
from fused_lora.tasks import Model

X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.add_task(""), ValueError, "got ''"),
        (lambda m: m.add_task("a.b"), ValueError, r"without '\.' and '/', got 'a\.b'"),
        (lambda m: m.add_task("a/b"), ValueError, "got 'a/b'"),
        (lambda m: m.add_task(3), ValueError, "got 3"),
        (lambda m: m.add_task("a"), ValueError, "there is a task 'a' already; tasks: a, b"),
        (lambda m: m.add_task("c", rank=3), TypeError, "unknown setting 'rank'; settings: r, lora_alpha"),
        (lambda m: m.add_task("c", target_modules="0"), TypeError, "unknown setting 'target_modules'"),
        (lambda m: m.add_task("c", r=0), ValueError, "r must be at least 1"),
        (lambda m: m.remove_task("z"), ValueError, "unknown task 'z'; tasks: a, b"),
        (lambda m: m.requires_grad_(True, task="z"), ValueError, "unknown task 'z'"),
        (lambda m: m.state_dict(task="z"), ValueError, "unknown task 'z'"),
        (lambda m: m.load_state_dict({}, task="z"), ValueError, "unknown task 'z'"),
        (lambda m: m.task_parameters("z"), ValueError, "unknown task 'z'"),
        (lambda m: m(X, task="z"), ValueError, "unknown task 'z'"),
        (lambda m: m(X, task=["a", "z", None, "a"]), ValueError, "unknown task 'z'"),
        (lambda m: m(X, tasks=["a", "z"]), ValueError, "unknown task 'z'"),
        (lambda m: m(X, tasks=["a", None]), ValueError, "unknown task None"),
        (lambda m: m(X, task={"a"}), TypeError, "task must be a name, None, or a list"),
        (lambda m: m(X, tasks="a"), TypeError, "tasks must be a list of names or a dict"),
        (lambda m: m(X, task="a", tasks=["b"]), ValueError, "give task or tasks, not both"),
        (lambda m: m(X, tasks=[]), ValueError, "at least one task"),
        (lambda m: m(X, tasks=["a", "a"]), ValueError, "none twice"),
        (lambda m: m(X, tasks={"a": torch.ones(2)}), ValueError, r"0-d floating tensor, got shape \(2,\)"),
        (lambda m: m(X, tasks={"a": "1"}), TypeError, "must be a number or a 0-d tensor, got str"),
        (lambda m: m(X, tasks={"a": float("nan")}), ValueError, "must be finite, got nan"),
        (lambda m: m(X, task=["a", "b", None]), ValueError, r"lists 3 rows, but no input has so many: shapes \(4, 3\)"),
        (lambda m: m(X, task=[]), ValueError, "lists 0 rows"),
        (
            lambda m: m(X[0], task=["a", "b", None]),
            ValueError,
            r"for 3 rows, but layer '0' got an input of shape \(3,\)",
        ),
        (lambda m: Model(m), ValueError, "model.0 is a TaskLayer of a tasks.Model: add tasks to that with add_task"),
        (lambda m: Model(m.model), ValueError, "0 is a TaskLayer of a tasks.Model"),
        (lambda m: Model(nn.Tanh()), ValueError, "no layer here can get LoRA"),
        (lambda m: Model("net"), TypeError, "model must be an nn.Module, got str"),
        (lambda m: Model(nn.Linear(2, 2), rank=2), TypeError, "unknown setting 'rank'"),
        (lambda m: Model(nn.Linear(2, 2), bias="all"), TypeError, "unknown setting 'bias'"),
        (
            lambda m: Model(nn.Conv2d(4, 4, 1, groups=4), r=6).add_task("a"),
            ValueError,
            "layer 'Conv2d': r=6 is not a mul",
        ),
    ],
)
def test_misuse(call, error, message):
    model = Model(nn.Sequential(nn.Linear(3, 3))).add_task("a").add_task("b")
    with pytest.raises(error, match=message):
        call(model)
    assert model.tasks == ["a", "b"]
    assert list(model.model[0].tasks) == ["a", "b"]
    assert model(X, task="a").shape == X.shape


def test_the_layers_of_tasks_are_not_apply_loras():
    for model in (Model(nn.Sequential(nn.Linear(3, 3))), Model(nn.Sequential(nn.Linear(3, 3))).add_task("a")):
        with pytest.raises(ValueError, match=r"model\.0 is a TaskLayer of a tasks\.Model: add tasks to that"):
            apply_lora(model, LoRAConfig(target_modules="all-linear"))
        for undo in (remove_lora, merge_lora):
            with pytest.raises(ValueError, match=r"model\.0 is a TaskLayer: the LoRA layers in it are tasks of a"):
                undo(model)
        assert model(X, task=model.tasks[0] if model.tasks else None).shape == X.shape


def test_misuse_without_tasks_and_over_lora():
    with pytest.raises(ValueError, match="unknown task 'a'; there are none yet, add_task makes one"):
        Model(nn.Linear(3, 3))(X, task="a")
    with pytest.raises(ValueError, match="fc is a LoRALinear already"):
        Model(apply_lora(make_net(), LoRAConfig(target_modules=["fc"])))
