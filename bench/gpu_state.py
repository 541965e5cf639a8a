"""The JSON of ``gpu.py`` on disk: one line per cell or entry, and never half a file, whenever a process is stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path

_LONG = ("cells", "entries", "chips", "correctness")


def write(path: Path, state: dict) -> None:
    """Replace the file in one step."""
    lines = []
    for name, value in state.items():
        text = json.dumps(value)
        if name in _LONG and value:
            rows = value if isinstance(value, list) else [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
            rows = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            text = text[0] + "\n  " + ",\n  ".join(rows) + "\n " + text[-1]
        lines.append(f" {json.dumps(name)}: {text}")
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    temporary.replace(path)
