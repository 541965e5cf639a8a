"""The plots of a JSON of ``gpu.py``: LoRA tax by shape with its floor, rates under the card's ceilings, memory."""

from __future__ import annotations

from pathlib import Path

from gpu_sections import floor_seconds, layers, way_of

_MOST = 64  # cells that a plot names
_SHOWN = ("ours", "ours-torch", "beta1", "addmm", "peft", "peft-compile")
_COLOURS = dict(zip(_SHOWN, ("#d62728", "#ff9896", "#9467bd", "#2ca02c", "#1f77b4", "#17becf"), strict=True))


def _pyplot():
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _dots(axis, labels: list[str], values: list[dict[str, float]], floors: list[float]) -> None:
    for name in _SHOWN:
        at = [(value[name], -row) for row, value in enumerate(values) if name in value]
        axis.plot([v for v, _ in at], [y for _, y in at], "o", color=_COLOURS[name], label=name, markersize=5)
    for row, floor in enumerate(floors):
        axis.plot([floor, floor], [-row - 0.4, -row + 0.4], color="black", label="floor" if row == 0 else None)
    axis.axvline(1.0, color="0.6", linewidth=0.8)
    axis.set_yticks([-row for row in range(len(labels))], labels, fontsize=7)
    axis.set_ylim(-len(labels) + 0.3, 0.7)
    low, high = axis.get_xlim()
    if low > 0 and high / low >= 3:  # below a factor of 3 a linear axis has the better ticks
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(axis="x", color="0.92")


def _rates(axis, cells: list[dict], ceilings: dict) -> None:
    """Flops per second of the frozen layer and ours over flops per byte, under the two ceilings of the same run."""
    copy, product = ceilings["copy_bytes_per_second"], ceilings["matmul_flops_per_second"]
    for name in ("frozen", "ours"):
        points = []
        for cell in cells:
            seconds = cell[way_of(cell)].get(name)
            if seconds is None:
                continue
            M, N, K, R = (cell[k] for k in ("M", "N", "K", "rank"))
            passes = 1 if cell["mode"] == "forward" else 2
            flops = passes * 2 * M * N * K
            moved = passes * 2 * (M * N + M * K + N * K)
            if name == "ours":
                flops += (2 if passes == 1 else 6) * M * R * (N + K)
                moved += 2 * M * K if passes == 1 else 2 * M * N + 4 * M * K
            points.append((flops / moved, flops / seconds["median"] / 1e12))
        axis.plot([x for x, _ in points], [y for _, y in points], "o", label=name, color=_COLOURS.get(name, "0.4"))
    intensity = sorted([*(2.0**e for e in range(3, 14)), product / copy])
    axis.plot(intensity, [min(x * copy, product) / 1e12 for x in intensity], color="black", label="ceilings")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("flops per byte")
    axis.set_ylabel("TFLOP/s")
    axis.legend(fontsize=7)


def figures(content: dict, name: str, folder: Path) -> list[Path]:
    """Draw into ``folder``; returns the files. Nothing of a --quick run, whose times mean nothing.

    Raises:
        ImportError: matplotlib is not installed.
    """
    cells = [cell for cell in content["cells"] if "frozen" in cell.get(way_of(cell), {})]
    if content.get("quick") or not cells:
        return []
    pyplot = _pyplot()
    summed = layers(content)
    rows = max(min(len(cells), _MOST), len(summed))
    figure, axes = pyplot.subplots(1, 2, figsize=(15, 0.22 * rows + 2.5), layout="constrained")
    cells = cells[:_MOST]  # most important first
    taxes = [{n: r["median"] for n, r in cell[f"{way_of(cell)}_tax"].items()} for cell in cells]
    floors = [1 + floor_seconds(c, content["ceilings"]) / c[way_of(c)]["frozen"]["median"] for c in cells]
    _dots(axes[0], [cell["id"] for cell in cells], taxes, floors)
    axes[0].set_title("LoRA tax (time / frozen nn.Linear) by cell")
    _dots(axes[1], [row["label"] for row in summed], [row["tax"] for row in summed], [row["floor"] for row in summed])
    axes[1].set_title("the 7 linears of a decoder layer together")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{name}: {content['device_name']}, torch {content['torch']}, {content['date']}")
    tax = folder / f"{Path(name).stem}-tax.png"
    figure.savefig(tax, dpi=110)
    pyplot.close(figure)

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    _rates(left, cells, content["ceilings"])
    left.set_title("rates under the ceilings of the same run")
    _memory(right, [cell for cell in cells if cell["mode"] != "forward"])
    figure.suptitle(f"{name}: {content['device_name']}")
    rates = folder / f"{Path(name).stem}-rates.png"
    figure.savefig(rates, dpi=110)
    pyplot.close(figure)
    return [tax, rates]


def _memory(axis, cells: list[dict]) -> None:
    for name in _SHOWN:
        ratios = [
            (row, cell["peak_bytes"][name] / cell["peak_bytes"]["frozen"])
            for row, cell in enumerate(cells)
            if cell["peak_bytes"].get(name) and cell["peak_bytes"].get("frozen")
        ]
        axis.plot([x for x, _ in ratios], [y for _, y in ratios], "o", color=_COLOURS[name], label=name, markersize=4)
    axis.set_title("peak memory of a pass / the frozen layer's")
    axis.set_xlabel("cells of forward + backward in the order of the table")
    axis.axhline(1.0, color="0.6", linewidth=0.8)
    axis.legend(fontsize=7)
