"""What a JSON of ``gpu.py`` says, as Markdown and as the few lines on the terminal; nothing is measured here.

M rows   N out_features   K in_features   R rank

LoRA tax = time of a provider / time of the frozen layer, formed within a round. Its floor, per layer: the bytes and
flops that LoRA cannot do without, at the rates measured in the same run (forward + backward: 2MN + 4MK bytes of 16-bit
elements and 6MR(N + K) flops; forward: 2MK and 2MR(N + K)).
"""

from __future__ import annotations

from collections.abc import Iterable

from markdown import table

_ORDER = (
    "ours", "ours-torch", "ours-beta1", "ours-pointer", "ours-descriptor",
    "beta1", "addmm", "peft", "peft-default", "peft-compile", "plain",
)  # fmt: skip


def floor_seconds(cell: dict, ceilings: dict) -> float:
    """What LoRA must add to the frozen layer's time on this card."""
    M, N, K, R = (cell[name] for name in ("M", "N", "K", "rank"))
    whole = cell["mode"] != "forward"
    moved = (2 * M * N + 4 * M * K) if whole else 2 * M * K
    flops = (6 if whole else 2) * M * R * (N + K)
    return moved / ceilings["copy_bytes_per_second"] + flops / ceilings["matmul_flops_per_second"]


def way_of(cell: dict) -> str:
    """Which of a cell's times is shown: of CUDA graphs, where there are any."""
    return "graph" if "graph" in cell else "eager"


def _tax(cell: dict, way: str, name: str) -> str:
    ratio = cell.get(f"{way}_tax", {}).get(name)
    return f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})" if ratio else "-"


def _floor(cell: dict, content: dict) -> str:
    frozen = cell.get(way_of(cell), {}).get("frozen")
    if frozen is None:
        return "-"
    return f"{1 + floor_seconds(cell, content['ceilings']) / frozen['median']:.3f}"


def layers(content: dict) -> list[dict]:
    """The linears of one decoder layer summed, each as often as the layer holds it, where all of them were measured."""
    groups: dict[tuple, list[dict]] = {}
    for cell in content["cells"]:
        if "frozen" in cell.get(way_of(cell), {}):
            key = tuple(cell[k] for k in ("set", "M", "regime", "p", "rank", "mode"))
            groups.setdefault(key, []).append(cell)
    found = []
    for (name, M, regime, p, rank, mode), cells in groups.items():
        if sum(cell["count"] for cell in cells) < 7:
            continue
        way = way_of(cells[0])
        common = set.intersection(*(set(cell[way]) for cell in cells))
        total = {n: sum(cell["count"] * cell[way][n]["median"] for cell in cells) for n in common}
        extra = sum(cell["count"] * floor_seconds(cell, content["ceilings"]) for cell in cells)
        label = f"{name}, M {M}, {regime}, p {p:g}, r {rank}, {mode}"
        tax = {n: seconds / total["frozen"] for n, seconds in total.items()}
        found.append({"label": label, "way": way, "seconds": total, "tax": tax, "floor": 1 + extra / total["frozen"]})
    return found


def _columns(names: Iterable[str]) -> list[str]:
    known = list(_ORDER)
    return sorted(set(names) - {"frozen"}, key=lambda name: (known.index(name) if name in known else len(known), name))


def _layer_lines(content: dict, name: str) -> list[str]:
    rows = layers(content)
    if not rows:
        return []
    columns = _columns(n for row in rows for n in row["tax"])
    body = [
        [row["label"], row["way"], f"{row['seconds']['frozen'] * 1e3:.3f}", f"{row['floor']:.3f}"]
        + [f"{row['tax'][n]:.3f}" if n in row["tax"] else "-" for n in columns]
        for row in rows
    ]
    header = ["the 7 linears of a layer", "timed", "frozen, ms", "floor", *columns]
    return [f"### LoRA tax of a decoder layer, from {name}", *table(header, body)]


def _cell_lines(content: dict, name: str) -> list[str]:
    lines = []
    for way in ("graph", "eager"):
        cells = [cell for cell in content["cells"] if way in cell]
        if not cells:
            continue
        columns = _columns(n for cell in cells for n in cell.get(f"{way}_tax", {}))
        rows = [
            [cell["id"], f"{cell[way]['frozen']['median'] * 1e3:.4f}" if "frozen" in cell[way] else "-"]
            + [_floor(cell, content), cell["forms"]["expand"] + "/" + cell["forms"]["grad_x"]]
            + [_tax(cell, way, n) for n in columns]
            for cell in cells
        ]
        header = ["cell", "frozen, ms", "floor", "expand/grad_x", *columns]
        what = "CUDA graphs" if way == "graph" else "eager, launches included"
        lines += [f"### LoRA tax by cell, {what}, median (quartiles), from {name}", *table(header, rows)]
    return lines


def _memory_lines(content: dict, name: str) -> list[str]:
    cells = [c for c in content["cells"] if any(c.get("peak_bytes", {}).values()) and c["mode"] != "forward"]
    if not cells:
        return []
    columns = _columns(n for cell in cells for n in cell["peak_bytes"])
    rows = [
        [cell["id"], *(f"{(cell['peak_bytes'].get(n) or 0) / 2**20:.1f}" for n in ("frozen", *columns))]
        for cell in cells
    ]
    return [
        f"### Peak memory of one pass beyond inputs and parameters, MiB, from {name}",
        *table(["cell", "frozen", *columns], rows),
    ]


def correctness_lines(content: dict, name: str) -> list[str]:
    """The check against float64 as a table, red first."""
    rows = []
    for key, verdict in content["correctness"].items():
        state = "RED" if verdict.get("red") else "refused" if "refused" in verdict else "green"
        about = verdict.get("red") or verdict.get("refused") or f"{verdict['cases']} cases"
        worst = "-" if "worst" not in verdict else f"{verdict['worst']:.2f}"
        rows.append([*key.split(" | "), state, worst, about])
    rows.sort(key=lambda row: ("RED", "green", "refused").index(row[2]))
    header = ["strategy or kernel", "regime", "", "worst error / plain's", ""]
    return [f"### Against float64, bound 2, from {name}", *table(header, rows)]


def sections(content: dict, name: str) -> list[str]:
    """Markdown of one JSON of ``gpu.py``; ``name`` is its file's."""
    if content.get("quick"):
        return [f"{name} is of a --quick run: it shows that the benchmark runs, its times mean nothing."]
    lines = [
        f"* driver {content.get('driver')}, CUDA {content.get('cuda')}, {content.get('memory')} of memory, power limit "
        f"{content.get('power_limit')}",
        "",
    ]
    if content["ceilings"]:
        copy, product = (content["ceilings"][f"{n}_per_second"] / 1e12 for n in ("copy_bytes", "matmul_flops"))
        lines += [
            f"Ceilings in the same run: copy {copy:.2f} TB/s (read + written), bf16 product {product:.0f} TFLOP/s."
        ]
        lines += [""]
        if not content.get("events_inside_graphs", True):
            lines += [
                "Graphs were timed by events around their replay: what draws dropout pays for two more kernels.",
                "",
            ]
        lines += _layer_lines(content, name) + _cell_lines(content, name) + _memory_lines(content, name)
    lines += correctness_lines(content, name)
    lines += [f"* crashed: {crash['at']}: {crash['error']}" for crash in content["crashes"]]
    lines += [f"* no figures for {cell['id']}: {cell['failed']}" for cell in content["cells"] if "failed" in cell]
    if skipped := content.get("skipped_for_time"):
        lines += [f"* {skipped['count']} cells of the grid were not measured for want of time; {name} names them"]
    return lines


def summary(content: dict, name: str) -> tuple[str, str]:
    """(what was measured, the result) in a line each: the layer of the claim, its floor, ours and PEFT."""
    rows = [row for row in layers(content) if "ours" in row["tax"]] if content["ceilings"] else []
    if content.get("quick") or not rows:
        return f"{len(content['correctness'])} checks against float64", "no layer was measured whole"
    results = []
    for row in rows[:2]:  # most important first: dropout off and on
        others = ", ".join(f"{n} {row['tax'][n]:.3f}" for n in ("peft", "beta1") if n in row["tax"])
        results.append(f"{row['label']}: {row['tax']['ours']:.3f}, floor {row['floor']:.3f}, {others}")
    return "LoRA tax of the linears of a decoder layer", "; ".join(results)


def terminal(content: dict, name: str) -> list[str]:
    """The end of the run on a terminal: what is red, the layers' taxes, what is missing."""
    red = [f"RED {key}: {v['red']}" for key, v in content["correctness"].items() if v.get("red")]
    checked = len(content["correctness"])
    lines = [f"{name}: {checked} checks against float64, {len(red)} red, {content['correctness_seconds']} s", *red]
    if content["ceilings"]:
        copy, product = (content["ceilings"][f"{n}_per_second"] / 1e12 for n in ("copy_bytes", "matmul_flops"))
        lines.append(f"copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s")
        for row in layers(content):
            taxes = "  ".join(f"{n} {row['tax'][n]:.3f}" for n in _columns(row["tax"]))
            lines.append(f"{row['label']} ({row['way']}): floor {row['floor']:.3f}  {taxes}")
    lines += [f"crashed: {crash['at']}: {crash['error']}" for crash in content["crashes"]]
    skipped = (content.get("skipped_for_time") or {}).get("count", 0)
    done = len(content["cells"]) + len(content.get("tuned_sizes", ()))
    return [*lines, f"{done} cells, {skipped} left for want of time, {content.get('elapsed_seconds')} s"]
