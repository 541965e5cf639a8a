"""The pieces of Markdown that all parts of the report share."""

from __future__ import annotations

from collections.abc import Iterable


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A table with empty lines around it."""
    lines = [header, ["---"] * len(header), *rows]
    return ["", *("| " + " | ".join(line) + " |" for line in lines), ""]


def heading(environment: dict, name: str) -> list[str]:
    """What every figure of the file ``name`` has to be quoted with."""
    env = environment
    packages = ("torch", "triton", "peft", "transformers", "torchtune", "loralib", "python")
    versions = ", ".join(f"{name} {env[name]}" for name in packages if env.get(name))
    commit = f"{env.get('commit') or 'none'}{', with uncommitted changes' if env.get('dirty') else ''}"
    return [
        f"## {name}",
        "",
        f"* date: {env.get('date', 'none')}",
        f"* device: {env.get('device_name', 'unknown')}; CPU {env.get('cpu', 'unknown')}, {env.get('cores')} cores, "
        f"{env.get('threads')} threads, load average at the start {env.get('load_average')}",
        f"* versions: {versions}; commit {commit}",
    ]
