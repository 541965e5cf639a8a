"""The part of the report on single linear layers: the JSON of ``pytest bench/`` and of ``bench/paired.py``.

LoRA tax = seconds of a provider / seconds of the frozen nn.Linear, same shape and mode.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from markdown import table

MODES = ("forward", "forward+backward")
PAIRED = "fused-lora paired benchmark"
_COLOURS = {
    "ours": "#d62728",
    "ours-torch": "#ff9896",
    "ours-triton": "#9467bd",
    "plain": "#7f7f7f",
    "peft": "#1f77b4",
    "addmm": "#2ca02c",
    "beta1": "#8c564b",
    "torchtune": "#17becf",
    "loralib": "#bcbd22",
}


@dataclass(frozen=True)
class Ratio:
    """A ratio of times, with quartiles where the rounds were paired."""

    median: float
    q1: float | None = None
    q3: float | None = None
    rounds: int = 0

    def __str__(self) -> str:
        if self.rounds == 1:
            return f"{self.median:.3f} (one round)"
        return f"{self.median:.3f}" if self.q1 is None else f"{self.median:.3f} ({self.q1:.3f} to {self.q3:.3f})"


@dataclass
class Cell:
    """The providers of one shape, mode, dtype, dropout and rank."""

    case: dict
    seconds: dict[str, float] = field(default_factory=dict)
    tax: dict[str, Ratio] = field(default_factory=dict)
    vs_peft: dict[str, Ratio] = field(default_factory=dict)
    self_ratio: Ratio | None = None
    rounds: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        case = self.case
        shape = f"{case['set']} {case['linear']} {case['K']}→{case['N']}"
        return f"{shape}, M {case['M']}, {case['regime']}, p {case['p']:g}, r {case['rank']}"

    @property
    def noise(self) -> float:
        """How far from 1 the quartiles of ours / ours lie; 0 where that was not measured."""
        own = self.self_ratio
        return 0.0 if own is None or own.q1 is None else max(abs(own.q1 - 1), abs(own.q3 - 1))


@dataclass
class File:
    """One JSON file."""

    name: str
    how: str
    environment: dict
    left_out: dict[str, str]
    cells: list[Cell]


def reads(content: dict) -> bool:
    """Whether the JSON is of one of the two kinds that this module reports."""
    return content.get("kind") == PAIRED or ("benchmarks" in content and "machine_info" in content)


def _file(content: dict, name: str) -> File:
    if content.get("kind") == PAIRED:
        cells = [_paired(cell) for cell in content["cells"]]
        return File(name, "paired, interleaved rounds", content, content["left_out"], cells)
    how, left_out = "pytest-benchmark, providers one after another", content.get("left_out", {})
    return File(name, how, content["machine_info"], left_out, _pytest_cells(content["benchmarks"]))


def _paired(cell: dict) -> Cell:
    def read(ratios: dict) -> dict[str, Ratio]:
        return {name: _ratio(ratio) for name, ratio in ratios.items()}

    seconds = {name: value["median"] for name, value in cell["seconds"].items()}
    rounds = {name: value["rounds"] for name, value in cell["seconds"].items()}
    vs_peft = read(cell.get("vs_peft", {}))
    return Cell(cell, seconds, read(cell.get("tax", {})), vs_peft, _ratio(cell["self"]), rounds, cell["kept_bytes"])


def _ratio(value: dict) -> Ratio:
    return Ratio(value["median"], value["q1"], value["q3"], value["rounds"])


def _pytest_cells(benchmarks: list[dict]) -> list[Cell]:
    cells: dict[str, Cell] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        cell = cells.setdefault(info["group"], Cell(info))
        name = info["provider"]
        cell.seconds[name] = benchmark["stats"]["median"]
        cell.rounds[name] = benchmark["stats"]["rounds"]
        if name != "frozen":
            cell.kept[name] = info["kept_bytes"]
    for cell in cells.values():
        others = [name for name in cell.seconds if name != "frozen"]
        if "frozen" in cell.seconds:
            cell.tax = {name: Ratio(cell.seconds[name] / cell.seconds["frozen"]) for name in others}
        if "peft" in cell.seconds:
            cell.vs_peft = {name: Ratio(cell.seconds[name] / cell.seconds["peft"]) for name in others if name != "peft"}
    return list(cells.values())


def _columns(cells: list[Cell], values: str) -> list[str]:
    found = {name for cell in cells for name in getattr(cell, values)}
    return [name for name in _COLOURS if name in found]


def _against_peft(file: File) -> list[str]:
    """Ours against PEFT over all cells of the file."""
    lines = [""]
    for name in _columns(file.cells, "vs_peft"):
        if not name.startswith("ours"):
            continue
        cells = [cell for cell in file.cells if name in cell.vs_peft]
        worst = max(cells, key=lambda cell: cell.vs_peft[name].median)
        slower = [cell for cell in cells if cell.vs_peft[name].median > 1]
        median = statistics.median(cell.vs_peft[name].median for cell in cells)
        text = (
            f"{name} / PEFT, {len(cells)} cells of {file.name}: median {median:.3f}; slower than PEFT in {len(slower)}"
        )
        if worst.self_ratio is not None:
            beyond = [cell for cell in slower if cell.vs_peft[name].median > 1 + cell.noise]
            text += f", in {len(beyond)} of them by more than the quartiles of ours / ours"
        text += f". Worst: {worst.vs_peft[name]} at {worst.case['mode']}, {worst.label}"
        if worst.self_ratio is not None:
            text += f"; there ours / ours is {worst.self_ratio}"
        lines += [text + ".", ""]
    return lines


def cell_tables(file: File) -> list[str]:
    """Per mode: the LoRA tax of every provider, ours / PEFT, and the spread of ours against itself."""
    lines = []
    for mode in MODES:
        cells = [cell for cell in file.cells if cell.case["mode"] == mode]
        if not cells:
            continue
        taxes = _columns(cells, "tax")
        ours = [name for name in _columns(cells, "vs_peft") if name.startswith("ours")]
        header = [
            mode,
            "frozen, ms",
            *(f"tax {name}" for name in taxes),
            *(f"{name} / PEFT" for name in ours),
            "ours / ours",
            "rounds",
        ]
        rows = []
        for cell in cells:
            floor = f"{cell.seconds['frozen'] * 1e3:.3f}" if "frozen" in cell.seconds else "-"
            rounds = sorted(set(cell.rounds.values()))
            rows.append(
                [cell.label, floor]
                + [f"{cell.tax[name].median:.3f}" if name in cell.tax else "-" for name in taxes]
                + [str(cell.vs_peft.get(name, "-")) for name in ours]
                + [str(cell.self_ratio or "-"), "-".join(str(r) for r in dict.fromkeys((rounds[0], rounds[-1])))]
            )
        lines += [f"### {mode}: LoRA tax and ours / PEFT, from {file.name}", *table(header, rows)]
    return lines


def layer_tables(file: File) -> list[str]:
    """The linears of one decoder layer summed, each as often as the layer holds it."""
    totals: dict[tuple, dict[str, float]] = {}
    linears: dict[tuple, set[str]] = {}
    for cell in file.cells:
        case = cell.case
        key = (case["set"], case["mode"], case["M"], case["regime"], case["p"], case["rank"])
        sums = totals.setdefault(key, dict.fromkeys(cell.seconds, 0.0))
        linears.setdefault(key, set()).add(case["linear"])
        totals[key] = {name: sums[name] + case["count"] * cell.seconds[name] for name in sums if name in cell.seconds}
    kept = {key: sums for key, sums in totals.items() if len(linears[key]) > 1 and "frozen" in sums}
    if not kept:
        return []
    names = [name for name in _COLOURS if any(name in sums for sums in kept.values())]
    rows = [
        [f"{s}, M {M}, {regime}, p {p:g}, r {r}", mode, ", ".join(sorted(linears[key])), f"{sums['frozen'] * 1e3:.3f}"]
        + [f"{sums[name] / sums['frozen']:.3f}" if name in sums else "-" for name in names]
        for key, sums in kept.items()
        for s, mode, M, regime, p, r in [key]
    ]
    header = ["layer", "mode", "linears", "frozen, ms", *(f"tax {name}" for name in names)]
    return [f"### The linears of a decoder layer together, from {file.name}", *table(header, rows)]


def kept_table(file: File) -> list[str]:
    """Bytes kept for the backward beyond x and the parameters; they do not depend on the mode."""
    names = _columns(file.cells, "kept")
    rows = {
        cell.label: [cell.label, *(f"{cell.kept[n]:,}" if n in cell.kept else "-" for n in names)]
        for cell in file.cells
    }
    return [f"### Bytes kept for the backward, from {file.name}", *table(["cell", *names], list(rows.values()))]


def plot(file: File, path: Path) -> None:
    """Per mode the LoRA tax and the time against PEFT, one line per cell, logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    modes = [mode for mode in MODES if any(cell.case["mode"] == mode for cell in file.cells)]
    by_mode = {mode: [cell for cell in file.cells if cell.case["mode"] == mode] for mode in modes}
    heights = [len(cells) + 3 for cells in by_mode.values()]
    figure, axes = pyplot.subplots(
        len(modes),
        2,
        figsize=(15, 0.24 * sum(heights) + 1.5),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for (left, right), (mode, cells) in zip(axes, by_mode.items(), strict=True):
        _dots(left, cells, "tax")
        left.set_title(f"{mode}: LoRA tax (time / frozen nn.Linear)")
        _dots(right, cells, "vs_peft")
        right.set_title(f"{mode}: time / PEFT; grey: ours / ours")
        right.set_yticklabels([])
    entries = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
    entries |= dict(zip(*reversed(axes[0][1].get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(_COLOURS), fontsize=8)
    env = file.environment
    figure.suptitle(f"{file.name}: {env.get('device_name')}, torch {env.get('torch')}, {env.get('date')}, {file.how}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _dots(axis, cells: list[Cell], values: str) -> None:
    for name in _columns(cells, values):
        found = [(-row, getattr(cell, values)[name]) for row, cell in enumerate(cells) if name in getattr(cell, values)]
        at, ratios = [y for y, _ in found], [ratio for _, ratio in found]
        colour = _COLOURS[name]
        axis.plot([r.median for r in ratios], at, "o", color=colour, label=name, markersize=5 if name == "ours" else 4)
        axis.hlines(at, [r.q1 or r.median for r in ratios], [r.q3 or r.median for r in ratios], color=colour)
    if values == "vs_peft":
        for row, cell in enumerate(cells):
            if cell.self_ratio is not None:
                axis.fill_betweenx(
                    [-row - 0.4, -row + 0.4], cell.self_ratio.q1, cell.self_ratio.q3, color="0.85", zorder=0
                )
    axis.axvline(1.0, color="black", linewidth=0.8)
    _scale(axis)
    axis.set_yticks([-row for row in range(len(cells))], [cell.label for cell in cells], fontsize=7)
    axis.set_ylim(-len(cells) + 0.3, 0.7)
    axis.grid(axis="x", color="0.92")


def _scale(axis) -> None:
    """Logarithmic where the ratios span more than a factor of 3: below that, a linear axis has the better ticks."""
    from matplotlib import ticker

    low, high = axis.get_xlim()
    if low > 0 and high / low < 3:
        return
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())


def sections(content: dict, name: str) -> list[str]:
    """What the file says, as Markdown."""
    file = _file(content, name)
    left_out = [f"* left out: {provider}: {reason}" for provider, reason in file.left_out.items()]
    how = f"Measured: {file.how}. Dtypes: the first name is that of the layer, a second one that of the adapters."
    lines = [how, "", *left_out, *_against_peft(file)]
    return [*lines, *cell_tables(file), *layer_tables(file), *kept_table(file)]


def figures(content: dict, name: str, folder: Path) -> list[Path]:
    """The LoRA tax and the time against PEFT of every cell."""
    path = folder / (Path(name).stem + ".png")
    plot(_file(content, name), path)
    return [path]


def summary(content: dict, name: str) -> tuple[str, str]:
    """(what, result) for the README."""
    file = _file(content, name)
    cells = [cell for cell in file.cells if "ours" in cell.vs_peft]
    if not cells:
        return "one linear layer", f"{len(file.cells)} cells, PEFT not among them"
    ratios = [cell.vs_peft["ours"].median for cell in cells]
    beyond = sum(cell.vs_peft["ours"].median > 1 + cell.noise for cell in cells)
    slower = sum(ratio > 1 for ratio in ratios)
    regimes = ", ".join(dict.fromkeys(str(cell.case["regime"]) for cell in cells))
    rows = ", ".join(dict.fromkeys(str(cell.case["M"]) for cell in cells))
    return (
        f"one linear layer, time / PEFT's time: {regimes}; {rows} rows; p 0 and 0.1",
        f"{len(cells)} cells: median {statistics.median(ratios):.3f}, worst {max(ratios):.3f}; slower than PEFT in "
        f"{slower}, by more than ours / ours in {beyond}",
    )
