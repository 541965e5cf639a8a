"""Blocks that may be checkpointed, a model with three tasks over them, and how gradients are compared."""

import threading

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lora import tasks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Blocks, checkpointed in ``mode``: None, False or True (reentrant)."""

    def __init__(self, mode=None, wrap=lambda y: y, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.mode, self.wrap = mode, wrap

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.mode is None else checkpoint(block, x, use_reentrant=self.mode)
        self.side = x
        return self.wrap(x)


def build(mode=None, net=Net, **settings):
    """The same numbers whatever the mode."""
    torch.manual_seed(0)
    model = tasks.Model(net(mode).double(), r=2, **settings)  # so that another order of additions stays invisible
    for name in ("a", "b", "c"):
        model.add_task(name)
        for parameter in model.task_parameters(name):
            nn.init.normal_(parameter, std=0.4)
    return model


def batch(rows=4):
    return torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()


def gradients(model, loss):
    """The gradient of every parameter and of x, after ``loss(model, x)``."""
    x = batch()
    torch.manual_seed(1)
    loss(model, x).backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}
    model.zero_grad()
    return named


def assert_same(ours, plain):
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def value(y):
    return y.sin().sum()


def together(work, jobs):
    """Run ``work(job)`` for all jobs at once; their results, or the first error."""
    start, results = threading.Barrier(len(jobs)), {}

    def target(job):
        start.wait()
        try:
            results[job] = work(job)
        except BaseException as error:
            results[job] = error

    threads = [threading.Thread(target=target, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return results
