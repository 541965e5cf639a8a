"""Many tasks in one frozen network: trained in turns, saved one by one, added up, and mixed in one batch.

A network of a convolution, an embedding and linear layers learns to redraw a picture of a digit. It is frozen, and
three tasks learn to redraw in a style of their own: bold, slanted, framed. One call then runs one style, or several at
once, or another style in every row of the batch.

    python examples/multitask.py
    python examples/multitask.py --data mnist.npz
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _pictures import CLASSES, DATA_HELP, PIXELS, SIDE, Pictures, load
from _show import MADE_BY, figure, make_room, progress, table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fused_lora import count_parameters
from fused_lora.demo import folder, usable_device
from fused_lora.tasks import Model

MAKER = "fused-lora examples/multitask.py"  # its signature in what it writes


class Redraw(nn.Module):
    """A picture (B, 784) and its digit (B,) in, a picture (B, 784) out."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.digit = nn.Embedding(CLASSES, 96)
        self.squeeze = nn.Linear(8 * 14 * 14, 96)
        self.draw = nn.Linear(96, PIXELS)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        seen = self.look(images.view(-1, 1, SIDE, SIDE)).relu().flatten(1)
        return self.draw((self.squeeze(seen) + self.digit(labels)).relu())


def bold(images: Tensor) -> Tensor:
    """Each stroke one pixel wider on every side."""
    return F.max_pool2d(images.view(-1, 1, SIDE, SIDE), 3, stride=1, padding=1).flatten(1)


def slanted(images: Tensor) -> Tensor:
    """Leaning to the right."""
    shear = torch.tensor([[1.0, 0.35, 0.0], [0.0, 1.0, 0.0]], device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(shear, [len(images), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images.view(-1, 1, SIDE, SIDE), grid, align_corners=False).flatten(1)


def framed(images: Tensor) -> Tensor:
    """With a grey frame around."""
    frame = torch.full((SIDE, SIDE), 0.6, device=images.device)
    frame[2:-2, 2:-2] = 0.0
    return torch.maximum(images, frame.flatten())


STYLES = {"bold": bold, "slanted": slanted, "framed": framed}


def with_tasks(network: nn.Module, rank: int) -> Model:
    """The network, frozen, with one task for each style: LoRA on every layer, no delta yet."""
    model = Model(network, r=rank, lora_alpha=2 * rank)
    for style in STYLES:
        model.add_task(style)
    return model


def train_base(network: nn.Module, data: Pictures, steps: int) -> None:
    """Learn to redraw a picture as it is, 64 pictures a step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in (bar := progress(range(steps), "base network, all weights")):
        batch = data.batch(torch.randint(len(data.labels), (64,)).to(data.labels.device))
        loss = F.mse_loss(network(*batch), batch.images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")


def train_tasks(model: Model, data: Pictures, rounds: int) -> None:
    """One step of each task in turn, round after round."""
    optimizers = {style: torch.optim.AdamW(model.task_parameters(style), lr=3e-3) for style in model.tasks}
    losses = {}
    for _ in (bar := progress(range(rounds), "three tasks in turns")):
        for style, optimizer in optimizers.items():
            batch = data.batch(torch.randint(len(data.labels), (64,)).to(data.labels.device))
            loss = F.mse_loss(model(*batch, task=style), STYLES[style](batch.images))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[style] = f"{loss.item():.4f}"
        bar.set_postfix(losses)


class Result(NamedTuple):
    """(wanted, run, distance) of held-out pictures, pictures to show, a largest difference, claims that hold or not."""

    distances: list[tuple[str, str, float]]
    pictures: dict[str, Tensor]
    rows_differ: float
    claims: dict[str, bool]


def distance(output: Tensor, wanted: Tensor) -> float:
    """Root mean square over all pixels."""
    return (output - wanted).square().mean().sqrt().item()


def run(args: argparse.Namespace) -> Result:
    """Train base and tasks, save and load each task alone, run them one, several and row by row."""
    torch.manual_seed(args.seed)
    known, unseen = load(args.data, args.seed, args.device)
    network = Redraw().to(args.device)
    train_base(network, known, args.base_steps)
    base = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        plain = network(*unseen)
    model = with_tasks(network, args.rank)
    print(f"\n{count_parameters(model)}, in {len(model.tasks)} tasks")
    train_tasks(model, known, args.rounds)
    claims = {}
    with torch.no_grad():
        state = model.state_dict()
        claims["the base network alone is as before, in outputs"] = torch.equal(model(*unseen), plain)
        claims["and in its state dict"] = all(torch.equal(state[name], tensor) for name, tensor in base.items())
        for style in STYLES:
            held = survives(model, style, base, unseen, args)
            claims[f"{style}: saved and loaded alone, the same outputs"] = held
        return evaluate(model, plain, unseen, claims)


def evaluate(model: Model, plain: Tensor, unseen: Pictures, claims: dict[str, bool]) -> Result:
    """Run one task, several, and another in every row."""
    images = unseen.images
    one = {style: model(*unseen, task=style) for style in STYLES}
    distances = [("as it is", "base network", distance(plain, images))]
    for style, restyle in STYLES.items():
        distances += [(style, "base network", distance(plain, restyle(images)))]
        distances += [(style, f'task="{style}"', distance(one[style], restyle(images)))]
    both = framed(slanted(images))
    sums = {"several": model(*unseen, tasks=["slanted", "framed"]), "half": model(*unseen, tasks={"framed": 0.5})}
    outputs = (one["slanted"], one["framed"], sums["several"])
    calls = ('task="slanted"', 'task="framed"', 'tasks=["slanted", "framed"]')
    distances += [("slanted and framed", call, distance(y, both)) for call, y in zip(calls, outputs, strict=True)]

    rows = [(None, *STYLES)[i % (len(STYLES) + 1)] for i in range(len(images))]
    mixed = model(*unseen, task=rows)
    alone = torch.cat([model(images[i : i + 1], unseen.labels[i : i + 1], task=row) for i, row in enumerate(rows)])
    pictures = {"base": plain, **one, "slanted + framed": sums["several"], "½ framed": sums["half"], "by rows": mixed}
    return Result(distances, pictures, (mixed - alone).abs().max().item(), claims)


def survives(model: Model, style: str, base: dict[str, Tensor], data: Pictures, args: argparse.Namespace) -> bool:
    """Save one task, load it into a fresh network that has no other, and compare the outputs."""
    file = args.out / f"{style}.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict(task=style).items()}
    save_file(tensors, file, {MADE_BY: MAKER})
    fresh = Model(Redraw(), r=args.rank, lora_alpha=2 * args.rank).to(args.device).add_task(style)
    fresh.load_state_dict(base)
    fresh.load_state_dict(load_file(file), task=style)
    return torch.equal(fresh(*data, task=style), model(*data, task=style))


def report(result: Result, path: Path) -> None:
    """Tables on stdout, and a figure at ``path``."""
    rows = [[wanted, ran, f"{value:.4f}"] for wanted, ran, value in result.distances]
    title = "Held-out pictures: distance from what was wanted (root mean square)"
    table(title, ["wanted", "run", "distance"], rows, 2)
    print(f"A task per row against each row run alone: largest difference {result.rows_differ:.1e}")
    table("Bit for bit", ["claim", "holds"], [(c, "yes" if holds else "NO") for c, holds in result.claims.items()])
    with figure(path, MAKER, panels=len(result.pictures), size=(1.7, 4.6)) as panels:
        for axes, (name, images) in zip(panels, result.pictures.items(), strict=True):
            axes.imshow(images[:4].cpu().view(4 * SIDE, SIDE).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(name, fontsize=10)
            axes.set_axis_off()


def main(argv: list[str] | None = None) -> int:
    """0 where every claim holds, else 1; 2 where the arguments cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (%(default)s)")
    parser.add_argument("--rounds", type=int, help="of training, a step of each task in each (400; with --quick 40)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0; auto is a GPU if there is one")
    parser.add_argument("--out", type=folder, default=Path("demo-output/multitask"), help="folder (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="less training")
    args = parser.parse_args(argv)
    args.rounds, args.base_steps = args.rounds or (40 if args.quick else 400), 100 if args.quick else 600
    try:
        args.device = usable_device(args.device)
        make_room(args.out, (*(f"{style}.safetensors" for style in STYLES), "styles.png"), MAKER)
        result = run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    report(result, args.out / "styles.png")
    print(f"Wrote {args.out / 'styles.png'} and a .safetensors file for each task")
    return 0 if all(result.claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
