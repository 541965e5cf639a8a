"""Small PEFT models for the tests of the patch, and what is compared on them.

K in_features, N out_features; every layer of a model takes x (..., K) to (..., N).
"""

import copy
from dataclasses import dataclass

import accuracy
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from fused_lora import patch_peft

K, N, R = 61, 45, 8
BASES = {
    "linear": lambda: nn.Linear(K, N),
    "no-bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": lambda: Conv1D(N, K),
}


class Projections(nn.Module):
    """q, k and v over one input, as in attention; ``forward`` returns all three side by side."""

    def __init__(self, base="linear"):
        super().__init__()
        self.q, self.k, self.v = (BASES[base]() for _ in range(3))
        self.config = {"tie_word_embeddings": False}

    def forward(self, x):
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)


def peft_model(
    base="linear", dtype=torch.float32, adapters=1, other_rank=3, seed=0, train=True, cast_adapters=True, **config
):
    """A PEFT model over :class:`Projections` whose factors are not zero; adapters "default", "other", "third"."""
    torch.manual_seed(seed)
    config = {"r": R, "lora_alpha": 12, "target_modules": ["q", "k", "v"], "fan_in_fan_out": base == "conv1d"} | config
    model = get_peft_model(Projections(base).to(dtype), LoraConfig(**config), autocast_adapter_dtype=cast_adapters)
    for name in ("other", "third")[: adapters - 1]:
        model.add_adapter(name, LoraConfig(**config | {"r": other_rank}))
    # PEFT 0.18 casts the first adapter alone; its add_adapter has no argument for it.
    wide = torch.float32 if cast_adapters and dtype in (torch.bfloat16, torch.float16) else dtype
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(wide) if "lora_" in name else parameter.data
    if adapters > 1:
        model.base_model.set_adapter(["default", "other", "third"][:adapters])
    randomize(model)
    return model.train(train)


def layers(model):
    """The LoRA layers of a model made by :func:`peft_model`."""
    inner = model.base_model.model
    return [inner.q, inner.k, inner.v]


@torch.no_grad()
def randomize(model):
    """Factors, biases and magnitudes as after some training: B and the bias of B away from zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.normal_(std=0.2)
        elif "lora_magnitude" in name:
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))


def patched_copy(model, **settings):
    """(a deep copy of ``model`` that is patched, the report)."""
    copied = copy.deepcopy(model)
    return copied, patch_peft(copied, **settings)


@dataclass
class Run:
    """y and the gradients of one forward and backward, by name."""

    results: dict

    def equals(self, other) -> bool:
        return self.results.keys() == other.results.keys() and all(
            torch.equal(t, other.results[name]) for name, t in self.results.items()
        )


def run(model, x, dy, autocast=None, **kwargs) -> Run:
    """``model(x)`` and its gradients for dy: of x and of every parameter that gets one."""
    x = x.detach().requires_grad_(x.is_floating_point())
    for parameter in model.parameters():
        parameter.grad = None
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x, **kwargs)
    y.backward(dy.to(y.dtype))
    results = {"y": y.detach(), "dx": x.grad}
    results |= {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Run(results)


def assert_accurate(draws) -> None:
    """The accuracy rule over several draws of (ours, PEFT's, the truth), all :class:`Run`."""
    for name, first in draws[0][0].results.items():
        triples = []
        for ours, plain, truth in draws:
            assert ours.results.keys() == plain.results.keys() == truth.results.keys()
            mine, other = ours.results[name], plain.results[name]
            assert mine.dtype == other.dtype, f"{name} is {mine.dtype}, PEFT's {other.dtype}"
            assert mine.shape == other.shape, f"{name} is {mine.shape}, PEFT's {other.shape}"
            triples.append(tuple(accuracy.wide(t) for t in (mine, other, truth.results[name])))
        complaint = accuracy.compare(name, triples, first.dtype)
        assert not complaint, complaint


class Eager:
    """Counts the calls of PEFT's own forward among the layers of a model."""

    def __init__(self, monkeypatch):
        self.calls = 0
        forward = lora.Linear.forward

        def counted(layer, *args, **kwargs):
            self.calls += 1
            return forward(layer, *args, **kwargs)

        monkeypatch.setattr(lora.Linear, "forward", counted)
