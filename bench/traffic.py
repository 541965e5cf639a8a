"""Count what LoRA costs in memory traffic: launches, bytes moved, bytes kept, temporary bytes. On any machine, exactly.

    python bench/traffic.py                                     8192 x 4096 x 4096, rank 16, p 0 and 0.1, bf16
    python bench/traffic.py --M 512 --N 1024 --K 4096 --rank 64 --p 0.05 --regime fp16,fp32 --output traffic.json

One forward and one backward of a layer, x with gradient, ours in every form and the peers, all in one process. Nothing
is computed and no GPU is needed: ``meter.py`` says how it is counted, and that it is the GPU form of each layer.
"Beyond the frozen layer" is the layer's figure less that of ``nn.Linear`` counted in the same way.

The formula is fitted: the bytes of tensors of M x N, M x K or N x K elements (whole, or in blocks of rows) are counted
at five shapes around the one asked for and solved for the coefficients of MN, MK and NK, in bytes; what does not fit
exactly gets no formula. The rest is what no such term covers: tensors with a side of the rank (s, ds, the adapters,
workspaces of partial sums) and vectors. It is listed tensor by tensor.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import torch
from launches import Access
from measure import environment, kept_bytes
from meter import CHIP, Count, as_on_a_gpu, count_pass
from providers import PROVIDERS, Inputs, Ours, Provider
from shapes import REGIMES, Case

KIND = "fused-lora traffic"
META = torch.device("meta")
TERMS = ("MN", "MK", "NK")
FUSED = "triton:expand={0},grad_x={0}"
OURS = {
    "ours": ("fused-lora, planned on a GPU", "triton"),
    "ours-fused-descriptor": ("fused-lora, fused GEMMs (TMA)", FUSED.format("descriptor")),
    "ours-fused-pointer": ("fused-lora, fused GEMMs (pointers)", FUSED.format("pointer")),
    "ours-torch": ("fused-lora, torch", "torch"),
}


def layers() -> dict[str, Provider]:
    """The frozen layer, ours per strategy, and every peer of ``providers.py``."""
    frozen, *others = PROVIDERS.values()
    ours = [Provider(name, label, functools.partial(Ours, strategy=form)) for name, (label, form) in OURS.items()]
    peers = [peer for peer in others if not peer.name.startswith("ours")]
    return {layer.name: layer for layer in (frozen, *ours, *peers)}


def make_inputs(case: Case) -> Inputs:
    """The tensors of a case without data."""

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    M, N, K, rank = case.M, case.N, case.K, case.rank
    a, b = empty(rank, K, dtype=case.adapter_dtype), empty(N, rank, dtype=case.adapter_dtype)
    return Inputs(empty(M, K).requires_grad_(), empty(M, N), empty(N, K), a, b)


def make_case(M: int, N: int, K: int, rank: int, regime: str, p: float) -> Case:
    return Case("traffic", "linear", 1, M, K, N, "forward+backward", regime, p, rank)


def count(layer: Provider, case: Case) -> dict[str, Count]:
    """Forward and backward of a fresh layer on this case."""
    inputs = make_inputs(case)
    return count_pass(layer.build(inputs, case.p), inputs.x, inputs.dy)


def count_kept(layer: Provider, case: Case) -> int:
    """Bytes kept for the backward beyond x and the parameters."""
    inputs = make_inputs(case)
    with as_on_a_gpu():
        return kept_bytes(layer.build(inputs, case.p), inputs.x)


# ---- the formula


def rank_wide(access: Access, case: Case) -> bool:
    """Whether the tensor is small beside the large three: a side is the rank or a few times that, or it is a vector."""
    sides = [side for side in access.shape[-2:] if side > 1]
    R, N, K = case.rank, case.N, case.K
    # R + 1: a bias or lora_bias rides along. 2R, 3R: high and low halves side by side. R N, R K: a flat workspace.
    narrow = {times * width for times in (1, 2, 3) for width in (R, R + 1)} | {R * N, R * K}
    return len(sides) < 2 or not narrow.isdisjoint(sides)


def shapes_around(M: int, N: int, K: int) -> list[tuple[int, int, int]]:
    """Five shapes whose MN, MK and NK are independent."""
    return [(M, N, K), (2 * M, N, K), (M, 2 * N, K), (M, N, 2 * K), (2 * M, 2 * N, K)]


def fit(layer: Provider, frozen: Provider, case: Case) -> dict[str, float] | None:
    """Bytes per element of MN, MK and NK beyond the frozen layer; None where they do not explain the count exactly."""
    rows, wanted = [], []
    for M, N, K in shapes_around(case.M, case.N, case.K):
        near = make_case(M, N, K, case.rank, case.regime, case.p)
        large = [a.distinct for c in count(layer, near).values() for a in c.moved if not rank_wide(a, near)]
        rows.append([M * N, M * K, N * K])
        wanted.append(sum(large) - sum(c.distinct for c in count(frozen, near).values()))
    matrix, target = torch.tensor(rows, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    solution = torch.linalg.lstsq(matrix, target[:, None]).solution[:, 0].mul(1e4).round().div(1e4)
    if not torch.equal(matrix @ solution, target):
        return None
    return dict(zip(TERMS, solution.tolist(), strict=True))


def written(formula: dict[str, float] | None) -> str:
    """2MN + 4MK, in bytes."""
    if formula is None:
        return "none fits"
    terms = [f"{value:g}{name}" for name, value in formula.items() if value]
    return " + ".join(terms).replace("+ -", "- ") or "0"


def evaluate(formula: dict[str, float], case: Case) -> float:
    sizes = {"MN": case.M * case.N, "MK": case.M * case.K, "NK": case.N * case.K}
    return sum(value * sizes[name] for name, value in formula.items())


# ---- one case


def _listed(moved: list[Access]) -> list[dict[str, object]]:
    """Accesses of one kind added up, the largest first."""
    totals: dict[tuple, int] = {}
    for access in moved:
        key = (access.op, access.kind, access.shape, access.dtype)
        totals[key] = totals.get(key, 0) + access.distinct
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    return [dict(zip(("op", "kind", "shape", "dtype"), key, strict=True), bytes=size) for key, size in ordered]


def measure(layer: Provider, frozen: Provider, case: Case) -> dict[str, object]:
    """Everything about one layer on one case, as it stands in the JSON. Bytes are beyond the frozen layer's."""
    counts, base = count(layer, case), count(frozen, case)

    def total(passes: dict[str, Count], kind: str) -> int:
        return sum(access.distinct for c in passes.values() for access in c.moved if access.kind == kind)

    moved = [access for c in counts.values() for access in c.moved]
    kernels = [access for access in moved if access.issued is not None]
    formula = fit(layer, frozen, case)
    extra = sum(c.distinct for c in counts.values()) - sum(c.distinct for c in base.values())
    return {
        "label": layer.label,
        "launches": {name: c.launches for name, c in counts.items()},
        "extra_read": total(counts, "read") - total(base, "read"),
        "extra_written": total(counts, "write") - total(base, "write"),
        "extra": extra,
        "extra_by_pass": {name: c.distinct - base[name].distinct for name, c in counts.items()},
        "formula": formula,
        "rest": None if formula is None else round(extra - evaluate(formula, case)),
        "rest_terms": _listed([access for access in moved if rank_wide(access, case)]),
        "kernels": {
            "distinct": sum(access.distinct for access in kernels),
            "issued": sum(access.issued or 0 for access in kernels),
        },
        "kept": count_kept(layer, case),
        "temporary": max(c.peak for c in counts.values()) - max(c.peak for c in base.values()),
    }


def measure_case(case: Case, names: list[str] | None = None) -> dict[str, object]:
    """All layers (or ``names``) on one case; those that cannot run it stand in ``left_out`` with the reason."""
    known, found, left_out = layers(), {}, {}
    for name in names or list(known):
        layer = known[name]
        reason = layer.refusal(case, META)
        if not reason:
            try:
                found[name] = measure(layer, known["frozen"], case)
            except ValueError as error:  # a forced form that this case cannot have
                reason = str(error)
        if reason:
            left_out[name] = reason
    keys = ("M", "N", "K", "rank", "regime", "p")
    return {**{key: case.as_dict()[key] for key in keys}, "layers": found, "left_out": left_out}


# ---- what is said about it


def _mega(size: float) -> str:
    return f"{size / 1e6:,.1f}"


HEADER = (
    "layer", "launches fwd + bwd", "extra read, MB", "extra written, MB", "extra = formula", "+ rest, MB",
    "our kernels issue, MB", "kept, MB", "temporary, MB",
)  # fmt: skip


def row(entry: dict) -> tuple[str, ...]:
    """One layer of a case as cells of :data:`HEADER`."""
    kernels, launches = entry["kernels"], entry["launches"]
    return (
        entry["label"],
        f"{launches['forward']} + {launches['backward']}",
        _mega(entry["extra_read"]),
        _mega(entry["extra_written"]),
        written(entry["formula"]),
        "-" if entry["rest"] is None else _mega(entry["rest"]),
        f"{_mega(kernels['issued'])} of {_mega(kernels['distinct'])}" if kernels["distinct"] else "-",
        _mega(entry["kept"]),
        _mega(entry["temporary"]),
    )


def title(cell: dict) -> str:
    return f"M {cell['M']}, N {cell['N']}, K {cell['K']}, rank {cell['rank']}, {cell['regime']}, p {cell['p']:g}"


def sections(content: dict, name: str) -> list[str]:
    """Markdown from the JSON alone: a table per case, each heading naming the file."""
    lines = [
        f"Counted, not timed, on meta tensors in the form a GPU runs ({content['chip']}); torch {content['torch']}, "
        f"PEFT {content['peft']}. Bytes beyond the frozen layer's, each byte of a tensor once per launch; "
        "*our kernels issue* also counts what their programs load again, mostly from the L2. "
        "How: `bench/README.md`.",
        "",
    ]
    for cell in content["cells"]:
        lines += [f"### Traffic: {title(cell)}, from {name}", ""]
        lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
        lines += ["| " + " | ".join(row(entry)) + " |" for entry in cell["layers"].values()]
        lines += [f"- left out: {layer}: {reason}" for layer, reason in cell["left_out"].items()]
        lines.append("")
    return lines


def _first_cells(content: dict) -> list[dict]:
    """The cells of the first shape, rank and regime: one per dropout."""
    first = content["cells"][0]
    keys = ("M", "N", "K", "rank", "regime")
    return [cell for cell in content["cells"] if all(cell[key] == first[key] for key in keys)]


def figures(content: dict, name: str, folder: Path) -> list[Path]:
    """Bytes beyond the frozen layer, a bar per layer and dropout, at the first shape."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    cells = _first_cells(content)
    names = [key for key in cells[0]["layers"] if key not in ("frozen", "ours-torch")]
    figure, axis = pyplot.subplots(figsize=(9, 0.5 * len(names) + 1.2), layout="constrained")
    thick = 0.8 / len(cells)
    for turn, cell in enumerate(cells):
        sizes = [cell["layers"].get(key, {}).get("extra", 0) / 1e6 for key in names]
        at = [-(i + turn * thick) for i in range(len(names))]
        colour = ("#1f77b4", "#ff7f0e")[turn % 2]
        axis.barh(at, sizes, thick, color=colour, label=f"dropout {cell['p']:g}")
    labels = [cells[0]["layers"][key]["label"] for key in names]
    axis.set_yticks([-i - (len(cells) - 1) * thick / 2 for i in range(len(names))], labels, fontsize=8)
    axis.set_xlabel("MB moved beyond the frozen layer, forward + backward (counted)")
    axis.set_title(f"{name}: {title(cells[0]).rpartition(', p')[0]}", fontsize=9)
    axis.legend(fontsize=8)
    path = folder / f"{Path(name).stem}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return [path]


def summary(content: dict, name: str) -> tuple[str, str]:
    """(what, result) for the README."""
    cells = _first_cells(content)
    shown = {"ours": "as planned", "ours-fused-descriptor": "with the fused GEMMs", "peft": "PEFT"}
    parts = [
        f"{label} {' / '.join(written(cell['layers'][key]['formula']) for cell in cells if key in cell['layers'])}"
        for key, label in shown.items()
    ]
    dropout = " / ".join(f"{cell['p']:g}" for cell in cells)
    return (
        f"bytes moved beyond the frozen layer, forward + backward, counted; {cells[0]['regime']}, rank "
        f"{cells[0]['rank']}, dropout {dropout}",
        "; ".join(parts) + " (and rank-wide terms)",
    )


def describe(term: dict) -> str:
    """A tensor of the rest in one line."""
    shape = " x ".join(map(str, term["shape"]))
    return f"{term['bytes']:>12,} B  {term['kind']:5}  {term['op']}  {term['dtype']} {shape}"


def show(cell: dict, terms: int) -> None:
    """Print a case, and for ours the largest tensors of the rest (once where two layers share them)."""
    print(f"\n{title(cell)}")
    table = [HEADER, *(row(entry) for entry in cell["layers"].values())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(text.ljust(width) for text, width in zip(cells, widths, strict=True)).rstrip())
    shown: list[object] = []
    for name, entry in cell["layers"].items():
        largest = entry["rest_terms"][:terms]
        if name.startswith("ours") and largest and largest not in shown:
            shown.append(largest)
            print(f"the largest of the rest in {entry['label']}:")
            for term in largest:
                print(f"  {describe(term)}")
    for layer, reason in cell["left_out"].items():
        print(f"left out: {layer}: {reason}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--M", type=int, default=8192, help="rows of x (default: 8192)")
    parser.add_argument("--N", type=int, default=4096, help="out_features (default: 4096)")
    parser.add_argument("--K", type=int, default=4096, help="in_features (default: 4096)")
    parser.add_argument("--rank", default="16", help="comma list of ranks (default: 16)")
    parser.add_argument("--p", default="0,0.1", help="comma list of dropout probabilities (default: 0,0.1)")
    parser.add_argument("--regime", default="bf16,bf16-fp32", help=f"comma list of {', '.join(REGIMES)}")
    parser.add_argument(
        "--terms", type=int, default=8, help="tensors of the rest to print for ours (default: 8; all in the JSON)"
    )
    parser.add_argument("--quick", action="store_true", help="a small shape, bf16 only")
    parser.add_argument("--output", type=Path, help="the JSON to write (default: none)")
    options = parser.parse_args(arguments)
    if unknown := set(options.regime.split(",")) - set(REGIMES):
        parser.error(f"--regime has no {', '.join(sorted(unknown))}; it takes a comma list of {', '.join(REGIMES)}")
    if options.quick:
        options.M, options.N, options.K, options.regime = 512, 384, 256, "bf16"
    result: dict[str, object] = {"kind": KIND, **environment(torch.device("cpu")), "chip": CHIP.name, "cells": []}
    for regime in options.regime.split(","):
        for rank in map(int, options.rank.split(",")):
            for p in map(float, options.p.split(",")):
                cell = measure_case(make_case(options.M, options.N, options.K, rank, regime, p))
                result["cells"].append(cell)
                show(cell, options.terms)
                for entry in cell["layers"].values():
                    entry["rest_terms"] = list(map(describe, entry["rest_terms"]))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
