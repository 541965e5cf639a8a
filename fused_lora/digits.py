"""The demo's experiment: scikit-learn's handwritten digits and a network that is weak on one of them.

images (B, 64) in [0, 1]   labels (B,)   logits (B, 10)
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .accuracy import Case, Error, compare, worst
from .modules import LoRALinear

CLASSES = 10
SHOWN = 3  # images of the weak digit that the base network is trained on
REHEARSAL = 0.25  # share of the other digits' training images that fine-tuning sees again
_TEST_SHARE = 0.25
_BATCH = 128
_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Images:
    """images (B, 64) and their labels (B,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Images:
        return Images(self.images[index], self.labels[index])

    def count(self, digit: int) -> int:
        """How many of them show ``digit``."""
        return int((self.labels == digit).sum())


@dataclass(frozen=True)
class Digits:
    """The training images, what each of the two trainings sees of them, and the test images."""

    train: Images
    base: Images  # all but the weak digit, of which SHOWN
    domain: Images  # all of the weak digit and REHEARSAL of the others
    test: Images


def load(weak: int, seed: int, device: torch.device) -> Digits:
    """The 1,797 images, split by ``seed`` so that every digit has the same share in both parts.

    Their order in ``domain`` comes from torch's default generator.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=_TEST_SHARE, stratify=labels, random_state=seed)
    images, test_images = (torch.tensor(part, dtype=torch.float32, device=device) for part in parts[:2])
    labels, test_labels = (torch.tensor(part, dtype=torch.int64, device=device) for part in parts[2:])
    train = Images(images, labels)
    # train_test_split has shuffled: the first ones are a random choice.
    of_weak = (labels == weak).nonzero()[:, 0]
    others = (labels != weak).nonzero()[:, 0]
    domain = torch.cat([of_weak, others[: round(REHEARSAL * len(others))]])
    return Digits(
        train=train,
        base=train[torch.cat([of_weak[:SHOWN], others])],
        domain=train[domain[torch.randperm(len(domain)).to(device)]],
        test=Images(test_images, test_labels),
    )


def build_network(device: torch.device) -> nn.Sequential:
    """64 -> 1000 -> 2000 -> 10 with ReLU. Drawn on the CPU, so a seed gives the same start on every device."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        fc1=nn.Linear(64, 1000),
        relu1=nn.ReLU(),
        fc2=nn.Linear(1000, 2000),
        relu2=nn.ReLU(),
        fc3=nn.Linear(2000, CLASSES),
    )
    return nn.Sequential(layers).to(device)


def with_lora(network: nn.Sequential, make: Callable[[nn.Linear], nn.Module]) -> nn.Sequential:
    """A second network over the same frozen weights, ``make(linear)`` in the place of every linear layer."""
    layers = ((name, make(m) if isinstance(m, nn.Linear) else m) for name, m in network.named_children())
    return nn.Sequential(OrderedDict(layers))


class PlainLoRALinear(nn.Module):
    """The ordinary eager LoRA layer, operation by operation as PEFT runs it: what the fused one is timed against."""

    def __init__(self, base: nn.Linear, *, r: int, lora_alpha: float, lora_dropout: float):
        super().__init__()
        factory = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(lora_dropout)
        self.lora_a = nn.Linear(base.in_features, r, bias=False, **factory)
        self.lora_b = nn.Linear(r, base.out_features, bias=False, **factory)
        self.scale = lora_alpha / r
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(self.dropout(x))) * self.scale


def lora_layers(network: nn.Module) -> dict[str, LoRALinear]:
    """The fused layers of a network by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoRALinear)}


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [p for p in network.parameters() if p.requires_grad]


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Images) -> None:
    optimizer.zero_grad()
    F.cross_entropy(network(batch.images), batch.labels).backward()
    optimizer.step()


def train(network: nn.Module, data: Images, epochs: int) -> Iterator[int]:
    """Train what is not frozen with AdamW; yields the number of each finished epoch."""
    optimizer = torch.optim.AdamW(trainable(network), lr=_LEARNING_RATE)
    for epoch in range(epochs):
        network.train()
        for index in torch.randperm(len(data)).split(_BATCH):
            _step(network, optimizer, data[index.to(data.labels.device)])
        yield epoch


@torch.no_grad()
def logits(network: nn.Module, data: Images) -> Tensor:
    """(B, 10), dropout off."""
    return network.eval()(data.images)


def accuracies(network: nn.Module, data: Images) -> list[float]:
    """The share of right answers for each digit."""
    right = logits(network, data).argmax(1) == data.labels
    return [right[data.labels == digit].double().mean().item() for digit in range(CLASSES)]


def errors(network: nn.Module, data: Images, dropout_p: float, seed: int) -> dict[str, Error]:
    """The largest errors of the fused layers against float64, on the activations and gradients of a real batch."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = inputs[0].detach(), output

        return hook

    layers = lora_layers(network)
    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    batch = Images(data.images[:_BATCH], data.labels[:_BATCH])
    F.cross_entropy(network.eval()(batch.images), batch.labels).backward()
    for handle in handles:
        handle.remove()
    found = []
    for name, layer in layers.items():
        x, y = seen[name]
        assert y.grad is not None
        found.append(
            compare(Case(x, layer.weight, layer.lora_a, layer.lora_b, layer.scale, layer.bias, y.grad, dropout_p, seed))
        )
    return {result: worst(each[result] for each in found) for result in found[0]}


def step_times(networks: list[nn.Module], data: Images, rounds: int) -> Iterator[list[float]]:
    """Seconds of one training step of each network on the same batch, round after round.

    The order turns from round to round, so that whatever slows the machine falls on all alike. The first two rounds
    warm up and are not yielded.
    """
    device = data.labels.device
    batch = Images(data.images[:_BATCH], data.labels[:_BATCH])
    optimizers = [torch.optim.AdamW(trainable(network.train()), lr=_LEARNING_RATE) for network in networks]

    def timed(i: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        _step(networks[i], optimizers[i], batch)
        _synchronize(device)
        return time.perf_counter() - start

    order = list(range(len(networks)))
    for turn in range(-2, rounds):
        times = {i: timed(i) for i in order}
        order.append(order.pop(0))
        if turn >= 0:
            yield [times[i] for i in range(len(networks))]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
