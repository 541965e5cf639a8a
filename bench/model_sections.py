"""What a JSON of ``model_step.py`` says, as Markdown; nothing is measured here."""

from __future__ import annotations

from markdown import table


def sections(content: dict, name: str) -> list[str]:
    """Markdown of one JSON; ``name`` is its file's."""
    if content["quick"]:
        return [f"{name} is of a --quick run: it shows that the benchmark runs, its times mean nothing."]
    lines = [
        f"{content['model']}, {content['dtype']}, {content['batch']} x {content['length']} tokens, LoRA rank "
        f"{content['rank']} on all seven linears, float32 adapters.",
        "",
    ]
    for cell in content["cells"]:
        how = f"dropout {cell['dropout']:g}, gradient checkpointing {'on' if cell['checkpointing'] else 'off'}"
        rows = [
            [
                way,
                f"{value['median'] * 1e3:.2f} ({value['q1'] * 1e3:.2f} to {value['q3'] * 1e3:.2f})",
                f"{cell['tokens_per_second'][way]:,.0f}",
                _ratio(cell, "vs_frozen", way),
                _ratio(cell, "vs_peft", way),
                _mib(cell["peak_bytes"].get(way)),
                _mib(cell["static_bytes"].get(way)),
            ]
            for way, value in cell["seconds"].items()
        ]
        header = ["way", "ms per step", "tokens / s", "/ frozen", "/ PEFT", "peak MiB", "weights + moments MiB"]
        lines += [f"### A training step, {how}, from {name}", *table(header, rows)]
        lines += [f"* left out: {way}: {why}" for way, why in cell["left_out"].items()]
    lines += _checked(content.get("checked", {}), name)
    return [*lines, *(f"* left out: {way}: {why}" for way, why in content["left_out"].items())]


def _checked(checked: dict, name: str) -> list[str]:
    """What was compared before anything was timed."""
    rows = [
        [way, f"{found['loss']:.5f}", f"{found['logits']:.1e}", f"{found['gradients']:.1e}"]
        for way, found in checked.items()
    ]
    header = ["way", "loss", "error of the logits", "error of the adapters' gradients"]
    title = f"### One step against PEFT in a wider dtype: RMS errors, ours at most twice PEFT's, from {name}"
    return [title, *table(header, rows)] if rows else []


def summary(content: dict, name: str) -> tuple[str, str]:
    """(what was measured, the result) in a line each: ours against PEFT, over all cells."""
    ratios = [cell["vs_peft"][way]["median"] for cell in content["cells"] for way in ("patched", "apply_lora")
              if way in cell.get("vs_peft", {})]  # fmt: skip
    result = f"time / PEFT {min(ratios):.3f} to {max(ratios):.3f}" if ratios else "ours or PEFT was left out"
    return f"a training step, {content['model']}", result


def _ratio(cell: dict, kind: str, way: str) -> str:
    ratio = cell.get(kind, {}).get(way)
    return f"{ratio['median']:.3f}" if ratio else "-"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f}"
