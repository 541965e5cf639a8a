"""A network with every layer LoRA goes on, PEFT models over it, and how two models are compared."""

import copy
import warnings

import accuracy
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

EVERYTHING = ["embed", "up", "down", "turned", "conv1", "conv2", "conv3"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Net(nn.Module):
    """Tokens (B, T) to (B, T, 5); a norm and a head that nobody targets, and a name that is the end of others."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.up = nn.Linear(12, 12)
        self.turned = Conv1D(12, 12)
        self.conv1 = nn.Conv1d(12, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 2, 3, padding=1)
        self.conv3 = nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1))
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        x = self.turned(self.up(x))
        x = x + self.conv1(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.conv2(x[:, None]).mean(1) + self.conv3(x[:, None, None]).mean((1, 2))
        return self.head(self.norm(x))


IDS = torch.arange(42).reshape(6, 7) % 30


def make_net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype).eval()


@torch.no_grad()
def train(model, seed=1):
    """Everything that trains gets a value that shows."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def peft_model(dtype=torch.float32, net=None, **settings):
    """A trained PEFT model over the network."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": EVERYTHING} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Conv1D among layers that are not transposed
        model = get_peft_model(net or make_net(dtype), LoraConfig(**settings))
    return train(model).eval()


def save_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def load_peft(folder, dtype=torch.float32, net=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(net or make_net(dtype), folder).eval()


@torch.no_grad()
def assert_same_outputs(ours, peft, run_ours=None, run_peft=None):
    """The accuracy rule over a few draws: at most twice PEFT's own error against float64."""
    run_peft = run_peft or (lambda model, ids: model(ids))
    run_ours, exact = run_ours or run_peft, copy.deepcopy(peft).double()
    draws = []
    for seed in range(8):
        ids = torch.randint(30, (6, 7), generator=torch.Generator().manual_seed(seed))
        results = (run_ours(ours, ids), run_peft(peft, ids), run_peft(exact, ids))
        draws.append(tuple(map(accuracy.wide, results)))
    complaint = accuracy.compare("y", draws, results[1].dtype)
    assert not complaint, complaint
