"""The network that the tests of tasks.Model share, and a model over it."""

import torch
from torch import nn

from fused_lora.tasks import Model


class Net(nn.Module):
    """Tokens and a picture to four numbers: embedding, convolutions, linears, batch norm, a long list, an alias."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.conv = nn.Conv2d(2, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(14, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(12))
        self.alias = self.layers[0][0]
        self.fc1 = nn.Linear(8, 4)
        self.fc10 = nn.Linear(8, 4, bias=False)

    def forward(self, ids, picture):
        x = torch.cat([self.embed(ids).mean(1), self.norm(self.conv(picture)).tanh().mean((2, 3))], dim=1)
        x = self.fc(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.fc1(x) * self.fc10(self.alias(x))


def make_net(seed=0):
    torch.manual_seed(seed)
    return Net()


def inputs(rows=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return torch.randint(20, (rows, 5), generator=g), torch.randn(rows, 2, 6, 6, dtype=dtype, generator=g)


def make_model(*names, net=None, dtype=torch.float32, **settings):
    """A model whose tasks all have deltas that show, in evaluation."""
    model = Model((net or make_net()).to(dtype).eval(), **{"r": 4} | settings)
    for name in names:
        model.add_task(name)
        for parameter in model.task_parameters(name):
            nn.init.normal_(parameter, std=0.3)
    return model


def values(tensors):
    return [t.detach().clone() for t in tensors]


def same(tensors, before):
    return all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
