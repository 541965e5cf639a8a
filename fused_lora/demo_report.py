"""What the demo prints and draws: tables for a plain 80-column terminal, one figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from . import digits
from .accuracy import FACTOR, Error
from .modules import LoRALinear

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")
WIDTH = 80  # of a table at least
_GREY, _BLUE, _ORANGE = "#b0b7c3", "#2563b0", "#d9622b"


class Report:
    """Prints the demo's findings one by one."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(markup=False, highlight=False)
        # A narrow terminal breaks the lines of a table; narrower columns would cut the figures in them.
        self._wide = Console(markup=False, highlight=False, width=max(self._console.width, WIDTH))

    def line(self, text: str) -> None:
        """Print ``text`` without cutting paths apart."""
        self._console.print(text, soft_wrap=True)

    def _table(self, title: str, *columns: str, rows: Iterable[tuple[str, ...]]) -> None:
        """The first column is text, the others are figures."""
        from rich import box
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        self._wide.print()
        self._wide.print(table)

    def progress(self, description: str, steps: Iterable[T], total: int) -> Iterator[T]:
        """The same steps, with a progress bar."""
        from rich.progress import track

        return iter(track(steps, f"{description:<25}", total, console=self._console))

    def introduction(self, device: torch.device, seed: int, digit: int, data: digits.Digits) -> None:
        """What is about to happen, and which images each training sees."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"threads: {torch.get_num_threads()}"
        shown, domain, known = (part.count(digit) for part in (data.base, data.domain, data.train))
        self.line(
            f"Handwritten digits, a network 64 -> 1000 -> 2000 -> 10, LoRA on every layer.\n"
            f"Device {device} ({name}), torch {torch.__version__}, seed {seed}.\n\n"
            f"{len(data.train)} training images, {len(data.test)} test images.\n"
            f"The base network sees {shown} of the {known} training images of the digit {digit},\n"
            f"and all {len(data.base) - shown} of the others: that digit is its weak one.\n"
            f"Fine-tuning sees all {domain} of the digit {digit}, and {len(data.domain) - domain} of the others.\n"
        )

    def accuracies(self, digit: int, test: digits.Images, history: list[list[float]]) -> None:
        """Per digit, before and after; the mean of the other nine shows what fine-tuning cost them."""
        before, after = history[0], history[-1]

        def row(name: str, group: list[int]) -> tuple[str, ...]:
            old, new = _mean(before, group), _mean(after, group)
            images = sum(test.count(d) for d in group)
            return name, str(images), f"{old:.1%}", f"{new:.1%}", f"{100 * (new - old):+.1f}"

        everyone = list(range(digits.CLASSES))
        rows = [row(f"{d} (weak)" if d == digit else str(d), [d]) for d in everyone]
        rows.append(row("mean of the other nine", _others(digit)))
        rows.append(row("mean of all ten", everyone))
        self._table("Accuracy on the test images", "digit", "images", "before", "after", "change", rows=rows)

    def parameters(self, layers: dict[str, LoRALinear]) -> None:
        """Frozen and trainable, layer by layer."""
        rows = []
        sums = [0, 0]
        for name, layer in layers.items():
            counts = [sum(p.numel() for p in layer.parameters() if p.requires_grad == grad) for grad in (False, True)]
            sums = [total + count for total, count in zip(sums, counts, strict=True)]
            shape = f"{name} ({layer.in_features} -> {layer.out_features}, rank {layer.r})"
            rows.append((shape, f"{sum(counts):,}", f"{counts[1]:,}", f"{counts[1] / sum(counts):.2%}"))
        rows.append(("whole network", f"{sum(sums):,}", f"{sums[1]:,}", f"{sums[1] / sum(sums):.2%}"))
        self._table("Parameters", "layer", "total", "trainable", "share", rows=rows)

    def claims(self, claims: dict[str, bool]) -> None:
        """Bit-identity, claim by claim."""
        rows = [(claim, "yes" if holds else "NO") for claim, holds in claims.items()]
        self._table("Bit for bit", "claim", "holds", rows=rows)

    def errors(self, errors: dict[str, Error]) -> None:
        """The accuracy rule; each number is the largest of the layers."""
        rows = [
            (
                name,
                *(f"{value:.2e}" for value in (e.ours_max, e.plain_max, e.ours_rms, e.plain_rms)),
                "yes" if e.holds else "NO",
            )
            for name, e in errors.items()
        ]
        self._table(
            "Relative error against float64, on the activations of the network",
            "result",
            "fused max",
            "plain max",
            "fused RMS",
            "plain RMS",
            f"within {FACTOR:g}x",
            rows=rows,
        )

    def step_times(self, times: list[list[float]]) -> None:
        """Seconds per training step, (fused, plain) in each round."""
        fused, plain = zip(*times, strict=True)
        ratios = [f / p for f, p in times]
        rows = [
            _spread("fused LoRALinear, ms", [1e3 * t for t in fused]),
            _spread("plain PyTorch LoRA layer, ms", [1e3 * t for t in plain]),
            _spread("fused / plain, round by round", ratios),
        ]
        title = f"One training step of the network, {len(times)} interleaved rounds"
        self._table(title, "", "median", "lower quartile", "upper quartile", rows=rows)

    def figure(self, path: Path, maker: str, digit: int, history: list[list[float]]) -> None:
        """Accuracy per digit before and after, and the course of fine-tuning, as a PNG that names its ``maker``."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, (bars, course) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
        _draw_bars(bars, digit, history[0], history[-1])
        _draw_course(course, digit, history)
        for axes in (bars, course):
            # Room above 100 % for the legend, so that it hides no bar.
            axes.set_ylim(0, 1.2)
            axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
            axes.yaxis.set_major_formatter("{x:.0%}")
            axes.legend(loc="upper right", ncols=3, frameon=False, columnspacing=1.2, handlelength=1.2)
            axes.grid(axis="y", color="#e6e8ec")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines["left"].set_bounds(0, 1)
        figure.savefig(path, dpi=150, metadata={"Source": maker})
        plt.close(figure)


def drawn_by(path: Path, maker: str) -> bool:
    """Whether a file is a PNG that matplotlib saved with ``metadata={"Source": maker}``; ``maker`` in Latin-1."""
    text = b"Source\0" + maker.encode("latin-1")
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(4096)  # texts stand before the pixels
    return start.startswith(b"\x89PNG\r\n\x1a\n") and len(text).to_bytes(4, "big") + b"tEXt" + text in start


def _spread(name: str, values: list[float]) -> tuple[str, ...]:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return name, f"{median:.3f}", f"{lower:.3f}", f"{upper:.3f}"


def _others(digit: int) -> list[int]:
    return [d for d in range(digits.CLASSES) if d != digit]


def _mean(accuracies: list[float], group: list[int]) -> float:
    return statistics.fmean(accuracies[d] for d in group)


def _draw_bars(axes: Axes, digit: int, before: list[float], after: list[float]) -> None:
    others = _others(digit)
    axes.bar([d - 0.2 for d in range(digits.CLASSES)], before, 0.38, color=_GREY, label="base network")
    axes.bar([d + 0.2 for d in others], [after[d] for d in others], 0.38, color=_BLUE, label="with LoRA")
    axes.bar([digit + 0.2], [after[digit]], 0.38, color=_ORANGE, label="with LoRA, the weak digit")
    axes.set_xticks(range(digits.CLASSES))
    axes.set_xlabel("digit")
    axes.set_title("Accuracy per digit, before and after", loc="left")


def _draw_course(axes: Axes, digit: int, history: list[list[float]]) -> None:
    nine = [_mean(accuracies, _others(digit)) for accuracies in history]
    axes.plot(nine, color=_BLUE, marker="o", markersize=4, label="mean of the other nine")
    axes.plot([h[digit] for h in history], color=_ORANGE, marker="o", markersize=4, label=f"digit {digit}")
    axes.set_xlabel("epochs of fine-tuning")
    axes.locator_params(axis="x", integer=True)
    axes.set_title("In the course of fine-tuning", loc="left")
