"""A small network with everything apply_lora has to keep, and what the tests of injection share."""

import torch
from torch import nn

from fused_lora import LoRAConfig, lora_parameters


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    """A tied head, an alias, a shared block, a convolution, and norms that nobody targets."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks.append(self.blocks[0])
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.alias = self.blocks[1].up
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.conv(x[:, None]).mean(1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


EVERYTHING = ["embed", "up", "down", "conv", "head"]
IDS = torch.arange(12).reshape(2, 6)


def make_net():
    torch.manual_seed(0)
    return Net()


def config(targets=EVERYTHING, **settings):
    return LoRAConfig(target_modules=targets, **{"r": 2, "lora_alpha": 3} | settings)


def train(model):
    """Give every factor a value that shows."""
    for p in lora_parameters(model):
        nn.init.normal_(p, std=0.5)
    return model


def snapshot(model):
    """Everything an error or a removal must leave as it was: objects, values, flags, attributes."""
    objects = dict(model.named_modules(remove_duplicate=False)) | dict(model.named_parameters(remove_duplicate=False))
    values = {name: t.clone() for name, t in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    attributes = {
        name: {
            key: value if isinstance(value, (bool, int, float, str)) else None for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }
    return objects, values, flags, attributes


def assert_unchanged(model, before):
    after = snapshot(model)
    assert list(after[0]) == list(before[0])
    assert all(after[0][name] is before[0][name] for name in before[0])
    assert all(torch.equal(after[1][name], t) for name, t in before[1].items())
    assert after[2:] == before[2:]
