"""How the examples show what they do, and keep off files of others: a progress bar, a table, a figure, a signature.

Nothing here is about LoRA.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fused_lora.demo_report import WIDTH, drawn_by

T = TypeVar("T")
MADE_BY = "made_by"  # in the metadata of safetensors files: which script wrote them
GREY, BLUE, ORANGE = "#b0b7c3", "#2563b0", "#d9622b"


def progress(steps: Iterable[T], description: str, total: int | None = None) -> Any:
    """The same steps behind a bar on stderr; ``set_postfix`` on what comes back shows figures beside it."""
    from tqdm import tqdm

    return tqdm(steps, desc=f"{description:<28}", total=total, leave=True, dynamic_ncols=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], text_columns: int = 1) -> None:
    """Print a table; the first ``text_columns`` are words and stand left, the others are figures and stand right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i < text_columns else "right")
    for row in rows:
        shown.add_row(*map(str, row))
    console = Console(markup=False, highlight=False, width=max(Console().width, WIDTH))  # narrower, figures are cut
    console.print()
    console.print(shown)


@contextmanager
def figure(path: Path, maker: str, panels: int = 1, size: tuple[float, float] = (6, 4.2)) -> Iterator[Sequence[Any]]:
    """Axes side by side to draw into; written to ``path`` as a signed PNG at the end. ``size``: inches of one panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown, axes = plt.subplots(1, panels, figsize=(size[0] * panels, size[1]), layout="constrained", squeeze=False)
    for ax in axes[0]:
        ax.grid(axis="y", color="#e6e8ec")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    try:
        yield axes[0]
        shown.savefig(path, dpi=150, metadata={"Source": maker})
    finally:
        plt.close(shown)


def make_room(folder: Path, names: Iterable[str], maker: str) -> None:
    """Make ``folder``, where a script is about to write the files and folders ``names``. Asked before any training.

    Raises:
        ValueError: there is one already that ``maker`` did not sign: a user's own, which stays as it is.
    """
    for path in (folder / name for name in names):
        if os.path.lexists(path) and not signed(path, maker):
            raise ValueError(f"{path} is not this script's and stays as it is: move it, or write to another place")
    folder.mkdir(parents=True, exist_ok=True)


def sign(folder: Path, maker: str) -> None:
    """Write the name of the script that made them into the metadata of the safetensors files of a folder."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        new = path.with_name(f"{path.name}.new")
        save_file(load_file(path), new, {**metadata, MADE_BY: maker})
        os.replace(new, path)


def signed(path: Path, maker: str) -> bool:
    """Whether this script made a PNG, a safetensors file, or all of those in a folder; an empty folder is anyone's."""
    from safetensors import SafetensorError, safe_open

    if path.suffix == ".png":
        return drawn_by(path, maker)
    weights = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not weights:
        return not any(path.iterdir())
    try:
        for each in weights:
            with safe_open(each, framework="pt") as file:
                if (file.metadata() or {}).get(MADE_BY) != maker:
                    return False
    except (OSError, SafetensorError):
        return False
    return True
