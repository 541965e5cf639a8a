"""LoRA through torch's parametrizations: no layer is replaced, the weights themselves become W + scale B A.

A two-layer network, 784 -> 880 -> 784, learns to clean noisy pictures of digits. Then the light changes: every picture
has a bright background. LoRA of rank 1 on both weights adapts the network: 3,328 of 1,384,832 parameters train, 0.24 %
(these sizes are chosen to have the share of the 784 -> 1000 -> 2000 -> 10 network in digits.py).

    python examples/parametrized.py
    python examples/parametrized.py --data mnist.npz
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _pictures import DATA_HELP, PIXELS, SIDE, load
from _show import MADE_BY, figure, make_room, progress, table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fused_lora import count_parameters
from fused_lora.demo import folder, usable_device
from fused_lora.parametrize import lora_parametrize, lora_unparametrize, set_lora_enabled

MAKER = "fused-lora examples/parametrized.py"  # its signature in what it writes
HIDDEN = 880


def build() -> nn.Sequential:
    """Two layers: a picture in, the cleaned picture out."""
    return nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))


def add_lora(network: nn.Sequential, rank: int = 1) -> nn.Sequential:
    """Freeze all, and make each weight the sum of itself and a product of rank ``rank`` that trains."""
    network.requires_grad_(False)
    for layer in layers(network):
        lora_parametrize(layer, "weight", r=rank, lora_alpha=rank)
    return network


def layers(network: nn.Sequential) -> list[nn.Linear]:
    return [module for module in network if isinstance(module, nn.Linear)]


def adapter(network: nn.Module) -> dict[str, Tensor]:
    """The part of the state dict that is LoRA's."""
    return {name: tensor for name, tensor in network.state_dict().items() if name.endswith(("lora_a", "lora_b"))}


def bright(images: Tensor) -> Tensor:
    """The same pictures before a background that is lit, more so at the top."""
    light = torch.linspace(0.7, 0.3, SIDE, device=images.device)[:, None].expand(SIDE, SIDE).reshape(-1)
    return light + (1 - light) * images


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(images.shape, generator=generator)
    return images + 0.3 * noise.to(images.device)


def train(network: nn.Module, clean: Tensor, seen: Tensor, steps: int, what: str, generator: torch.Generator) -> None:
    """Train what requires a gradient to make ``clean`` out of ``seen`` and noise, 64 pictures a step."""
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for _ in (bar := progress(range(steps), what)):
        index = torch.randint(len(clean), (64,), generator=generator).to(clean.device)
        loss = F.mse_loss(network(noisy(seen[index], generator)), clean[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")


class Result(NamedTuple):
    """Errors by (network, light), pictures for the figure, the parameters, claims and whether they hold."""

    errors: dict[tuple[str, str], float]
    pictures: dict[str, Tensor]
    parameters: tuple[int, int]
    claims: dict[str, bool]


@torch.no_grad()
def run(args: argparse.Namespace) -> Result:
    """Train the base, adapt it, switch LoRA off, save it, take it out in both ways."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    (known, _), (clean, _) = load(args.data, args.seed, args.device)
    dark_input, bright_input = noisy(clean, generator), noisy(bright(clean), generator)
    network = build().to(args.device)
    with torch.enable_grad():
        train(network, known, known, args.base_steps, "base network, all weights", generator)
    base_state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    base_dark, base_bright = network(dark_input), network(bright_input)

    add_lora(network, args.rank)
    total, trainable, _ = count_parameters(network)
    started = torch.equal(network(bright_input), base_bright)
    with torch.enable_grad():
        train(network, known, bright(known), args.steps, "LoRA alone, bright pictures", generator)
    adapted = network(bright_input)
    set_lora_enabled(network, False)
    off = network(dark_input)
    set_lora_enabled(network, True)

    file = args.out / "adapter.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in adapter(network).items()}, file, {MADE_BY: MAKER})
    fresh, restored, merged = (build().to(args.device) for _ in range(3))
    for copy in (fresh, restored, merged):
        copy.load_state_dict(base_state)
        add_lora(copy, args.rank).load_state_dict(load_file(file, device=str(args.device)), strict=False)
    loaded = fresh(bright_input)
    for layer, other in zip(layers(restored), layers(merged), strict=True):
        lora_unparametrize(layer)
        lora_unparametrize(other, merge=True)
    back = all(torch.equal(restored.state_dict()[name], tensor) for name, tensor in base_state.items())
    claims = {
        "with LoRA just added the outputs are the base network's": started,
        "with LoRA switched off they are again": torch.equal(off, base_dark),
        "the saved adapter gives a fresh network the same outputs": torch.equal(loaded, adapted),
        "taken out, the weights are the base network's": back,
        "baked in, plain layers give the same outputs": torch.equal(merged(bright_input), adapted),
    }
    errors = {
        (name, light): (output - clean).square().mean().sqrt().item()
        for name, light, output in (
            ("input", "dark", dark_input),
            ("input", "bright", bright_input),
            ("base network", "dark", base_dark),
            ("base network", "bright", base_bright),
            ("with LoRA", "bright", adapted),
            ("LoRA switched off", "dark", off),
        )
    }
    pictures = {"noisy, bright": bright_input, "base network": base_bright, "with LoRA": adapted, "clean": clean}
    return Result(errors, pictures, (total, trainable), claims)


def report(result: Result, path: Path) -> None:
    """Tables on stdout, and a figure at ``path``."""
    total, trainable = result.parameters
    print(f"\n{total:,} parameters, {trainable:,} trainable: {100 * trainable / total:.2f} %")
    rows = [[name, light, f"{error:.4f}"] for (name, light), error in result.errors.items()]
    table(
        "Distance of the held-out pictures from the clean ones (root mean square)", ["", "light", "distance"], rows, 2
    )
    table("Bit for bit", ["claim", "holds"], [(c, "yes" if holds else "NO") for c, holds in result.claims.items()])
    with figure(path, MAKER, panels=len(result.pictures), size=(2.6, 3.0)) as panels:
        for axes, (name, images) in zip(panels, result.pictures.items(), strict=True):
            tiles = images[:9].cpu().view(3, 3, SIDE, SIDE).transpose(1, 2).reshape(3 * SIDE, 3 * SIDE).numpy()
            axes.imshow(tiles, cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(name)
            axes.set_axis_off()


def main(argv: list[str] | None = None) -> int:
    """0 where every claim holds, else 1; 2 where the arguments cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--rank", type=int, default=1, help="of the adapters (%(default)s)")
    parser.add_argument("--steps", type=int, help="of LoRA training, 64 pictures each (300; with --quick 60)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0; auto is a GPU if there is one")
    parser.add_argument("--out", type=folder, default=Path("demo-output/parametrized"), help="folder (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="less training")
    args = parser.parse_args(argv)
    args.steps, args.base_steps = args.steps or (60 if args.quick else 300), 60 if args.quick else 400
    try:
        args.device = usable_device(args.device)
        make_room(args.out, ("adapter.safetensors", "cleaned.png"), MAKER)
        result = run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    report(result, args.out / "cleaned.png")
    print(f"Wrote {args.out / 'adapter.safetensors'} and {args.out / 'cleaned.png'}")
    return 0 if all(result.claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
