"""The JSON of ``kernel_health.py`` as Markdown."""

import itertools


def named(content: dict) -> list[dict]:
    """The rows of the JSON by column, chips by their full name."""
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]
    return [row | {"arch": row["arch"] if row["arch"].startswith("gfx") else f"sm_{row['arch']}"} for row in rows]


def sections(content: dict, name: str) -> list[str]:
    """The JSON as Markdown: what compiled for each chip, and the main loops beside the plain GEMM's."""
    rows = named(content)
    lines = [f"### What the kernels compile to (`{name}`)", ""]
    lines += ["| chip | kernels | registers, most | bytes spilled | shared memory, most / limit | serialized wgmma |"
              " without tensor cores (float32) | breaches |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for arch, group in itertools.groupby(rows, lambda row: row["arch"]):
        its = list(group)
        most, spilled = (max(row["registers"] for row in its), sum(row["spilled_bytes"] for row in its))
        shared, limit = max((row["shared_bytes"], row["shared_limit"]) for row in its)
        bare = sum(not row["loop_tensor"] and row["kernel"] != "_reduce_kernel" for row in its)
        serialized, breached = sum(row["serialized"] for row in its), sum(bool(row["breaches"]) for row in its)
        cells = [arch, len(its), most, spilled, f"{shared} / {limit}", serialized, bare, breached]
        lines += [f"| {' | '.join(map(str, cells))} |"]
    compared = [row for row in rows if row["sass_loop"] is not None]
    if compared:
        lines += ["", f"### Main loop of expand and grad_x beside the plain GEMM of the same tile (`{name}`)", ""]
        lines += ["Machine instructions per step; what is more is address and register bookkeeping.",
                  "", "| piece | kernel | regime | N x K | tile | mask | fused | plain | tensor-core | copies |",
                  "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in compared:
            kernel, mask = row["kernel"].strip("_").removesuffix("_kernel"), "yes" if row["dropout"] else "no"
            sizes = f"{row['N']} x {row['K']}" + (f", rank {row['rank']}" if row["rank"] % 16 else "")
            cells = [row["piece"], kernel, row["regime"], sizes, row["tile"], mask]
            cells += [row[name] for name in ("sass_loop", "sass_plain_loop", "loop_tensor", "loop_copies")]
            lines += [f"| {' | '.join(map(str, cells))} |"]
    return [*lines, ""]


def summary(content: dict, name: str) -> tuple[str, str]:
    """(what was compiled, what came of it) for the README."""
    rows = named(content)
    chips = ", ".join(dict.fromkeys(row["arch"] for row in rows))
    spilled, serialized = (sum(row[name] for row in rows) for name in ("spilled_bytes", "serialized"))
    breached = sum(bool(row["breaches"]) for row in rows)
    what = f"what every kernel compiles to with triton {content['triton']}: {chips}"
    found = f"{spilled} bytes spilled, {serialized} with serialized wgmma, {breached} with a breach"
    return what, f"{len(rows)} kernels: {found}"
