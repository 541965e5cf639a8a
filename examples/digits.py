"""Fine-tune a 784 -> 1000 -> 2000 -> 10 network on one digit with LoRA of rank 1: 6,794 parameters of 2,813,804.

A network learns handwritten digits but sees next to nothing of one of them. LoRA on all three layers then learns from
pictures of that digit alone. The frozen weights stay as they are, bit for bit; with LoRA off, the network is as before.

    python examples/digits.py
    python examples/digits.py --data mnist.npz --digit 9
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _pictures import CLASSES, DATA_HELP, PIXELS, Pictures, load
from _show import BLUE, GREY, ORANGE, figure, make_room, progress, sign, table
from torch import Tensor, nn

from fused_lora import LoRAConfig, apply_lora, count_parameters, load_adapter, lora_layers, lora_report, save_adapter
from fused_lora.demo import folder, usable_device

MAKER = "fused-lora examples/digits.py"  # its signature in what it writes


def build() -> nn.Sequential:
    """784 -> 1000 -> 2000 -> 10 with ReLU: 2,807,010 parameters."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        fc1=nn.Linear(PIXELS, 1000),
        relu1=nn.ReLU(),
        fc2=nn.Linear(1000, 2000),
        relu2=nn.ReLU(),
        fc3=nn.Linear(2000, CLASSES),
    )
    return nn.Sequential(layers)


def add_lora(network: nn.Module, rank: int = 1) -> nn.Module:
    """LoRA on all three layers; all else is frozen. At rank 1 these are 6,794 parameters more."""
    return apply_lora(network, LoRAConfig(r=rank, lora_alpha=rank, target_modules=["fc1", "fc2", "fc3"]))


def switch(network: nn.Module, on: bool) -> None:
    """LoRA on or off."""
    for _, layer in lora_layers(network):
        layer.enabled = on


def train(network: nn.Module, data: Pictures, steps: int, what: str) -> list[float]:
    """Train what requires a gradient, 64 pictures a step; the loss of each step."""
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in (bar := progress(range(steps), what)):
        batch = data.batch(torch.randint(len(data.labels), (64,)).to(data.labels.device))
        loss = F.cross_entropy(network(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def wrong(network: nn.Module, data: Pictures) -> list[int]:
    """How many pictures of each digit are taken for another one."""
    errors = data.labels[network(data.images).argmax(1) != data.labels]
    return torch.bincount(errors, minlength=CLASSES).tolist()


def mostly_without(data: Pictures, digit: int, shown: int) -> Pictures:
    """All pictures of the other digits, and the first ``shown`` of this one."""
    others = (data.labels != digit).nonzero()[:, 0]
    return data.batch(torch.cat([others, (data.labels == digit).nonzero()[:shown, 0]]))


class Result(NamedTuple):
    """Errors per digit of the base network, with LoRA, and with LoRA switched off; claims and whether they hold."""

    sizes: list[int]
    base: list[int]
    tuned: list[int]
    off: list[int]
    claims: dict[str, bool]


def run(args: argparse.Namespace) -> Result:
    """Train the base, fine-tune on one digit, save the adapter, check what is claimed."""
    torch.manual_seed(args.seed)
    known, unseen = load(args.data, args.seed, args.device)
    if not len(known.of(args.digit).labels):
        raise ValueError(f"{args.data} holds no picture of {args.digit} to train on: choose another --digit")
    network = build().to(args.device)
    before = count_parameters(network)
    few = mostly_without(known, args.digit, shown=args.shown)
    train(network, few, args.base_steps, "base network, all weights")
    base, base_outputs = wrong(network, unseen), outputs(network, unseen)
    frozen = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    add_lora(network, args.rank)
    print(f"\nBefore: {before.total:,} parameters. With LoRA:\n{lora_report(network)}")
    train(network, known.of(args.digit), args.steps, f"LoRA, pictures of {args.digit} alone")
    tuned, tuned_outputs = wrong(network, unseen), outputs(network, unseen)
    state = network.state_dict()
    same = all(torch.equal(state[name], tensor) for name, tensor in frozen.items())
    switch(network, on=False)
    off, off_outputs = wrong(network, unseen), outputs(network, unseen)
    switch(network, on=True)

    save_adapter(network, args.out / "adapter", overwrite=True)
    sign(args.out / "adapter", MAKER)
    fresh = build().to(args.device)
    fresh.load_state_dict(frozen)
    load_adapter(fresh, args.out / "adapter")
    claims = {
        f"the {len(frozen)} frozen tensors are as before fine-tuning": same,
        "with LoRA switched off the outputs are the base network's": torch.equal(off_outputs, base_outputs),
        "the saved adapter gives a fresh base network the same outputs": torch.equal(
            outputs(fresh, unseen), tuned_outputs
        ),
    }
    sizes = torch.bincount(unseen.labels, minlength=CLASSES).tolist()
    return Result(sizes, base, tuned, off, claims)


@torch.no_grad()
def outputs(network: nn.Module, data: Pictures) -> Tensor:
    """(B, 10)"""
    return network(data.images)


def report(result: Result, digit: int, path: Path) -> None:
    """Tables on stdout, and a figure at ``path``."""
    rows: list[list[object]] = [
        [f"{d}, fine-tuned on" if d == digit else d, n, base, tuned, off]
        for d, (n, base, tuned, off) in enumerate(zip(*result[:4], strict=True))
    ]
    rows.append(["all", *map(sum, result[:4])])
    columns = ["digit", "test pictures", "base", "with LoRA", "LoRA switched off"]
    table("Test pictures taken for another digit", columns, rows)
    table("Bit for bit", ["claim", "holds"], [(c, "yes" if holds else "NO") for c, holds in result.claims.items()])
    with figure(path, MAKER, size=(8, 4.2)) as (axes,):
        for shift, name, errors in ((-0.2, "base network", result.base), (0.2, "with LoRA", result.tuned)):
            right = [1 - e / max(n, 1) for e, n in zip(errors, result.sizes, strict=True)]
            color = GREY if shift < 0 else BLUE
            axes.bar([d + shift for d in range(CLASSES)], right, 0.38, color=color, label=name)
        axes.bar([digit + shift], [right[digit]], 0.38, color=ORANGE, label=f"with LoRA, {digit}")
        axes.set_xticks(range(CLASSES))
        axes.set_xlabel(f"digit; LoRA learned from pictures of {digit} alone")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_title("Test pictures recognised", loc="left")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)


def main(argv: list[str] | None = None) -> int:
    """0 where every claim holds, else 1; 2 where the arguments cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--digit", type=int, default=9, choices=range(CLASSES), help="to fine-tune on (%(default)s)")
    parser.add_argument("--shown", type=int, default=10, help="pictures of it that the base sees (%(default)s)")
    parser.add_argument("--rank", type=int, default=1, help="of the adapters (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of fine-tuning, 64 pictures each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0; auto is a GPU if there is one")
    parser.add_argument("--out", type=folder, default=Path("demo-output/digits"), help="folder (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="less training of the base network")
    args = parser.parse_args(argv)
    if args.shown < 0:
        parser.error(f"--shown must be at least 0, got {args.shown}")
    args.base_steps = 40 if args.quick else 300
    try:
        args.device = usable_device(args.device)
        make_room(args.out, ("adapter", "digits.png"), MAKER)
        result = run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    report(result, args.digit, args.out / "digits.png")
    print(f"Wrote {args.out / 'adapter'} and {args.out / 'digits.png'}")
    return 0 if all(result.claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
