"""How the examples show what they do: a progress bar, a table, a figure. Nothing here is about LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
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
    console = Console(markup=False, highlight=False)
    console.print()
    console.print(shown)


@contextmanager
def figure(path: Path, panels: int = 1, size: tuple[float, float] = (6, 4.2)) -> Iterator[Sequence[Any]]:
    """Axes side by side to draw into; written to ``path`` as a PNG at the end. ``size``: inches of one panel."""
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
        shown.savefig(path, dpi=150)
    finally:
        plt.close(shown)
