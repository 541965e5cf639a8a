"""The report: tables and plots from the benchmarks' JSON files alone; nothing is measured here.

    python bench/report.py                              bench/results/*.json -> docs/performance.md, plots, README.md
    python bench/report.py out.json --output report     any files -> report/performance.md and its plots

Every table and plot names its file, with as many of its folders as tell it from the others. A kind of JSON is reported
by the module that writes it: ``sections`` gives its Markdown, ``figures`` (if there) draws, ``summary`` (if there)
gives the two cells of its row in the README.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

from markdown import heading, table

ROOT = Path(__file__).resolve().parents[1]
# In the order of the report.
_MODULES = {
    "fused-lora gpu": "gpu",
    "fused-lora traffic": "traffic",
    "fused-lora paired benchmark": "report_linear",
    "pytest-benchmark": "report_linear",
    "fused-lora model step": "model_step",
    "fused-lora peft step": "peft_step",
    "fused-lora apply step": "apply_step",
    "fused-lora host cost": "host_cost",
    "fused-lora kernel health": "kernel_health",
}
_TABLE = "fused-lora tuned"  # the tuner's record: what is in it becomes fused_lora/tuned.json, which plans name
_START, _END = "<!-- measured: written by bench/report.py -->", "<!-- end of measured -->"
NO_GPU = "Not measured on a GPU yet: none of these files comes from one."


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _kind(content: object) -> str:
    if not isinstance(content, dict):
        return ""
    return "pytest-benchmark" if "machine_info" in content else str(content.get("kind"))


def _environment(content: dict) -> dict:
    return content.get("machine_info", content)


def load(path: Path, name: str) -> tuple[str, dict, ModuleType]:
    """(name, content, the module that reports it).

    Raises:
        OSError: the file cannot be read. ValueError: no benchmark of this folder writes such a file.
    """
    content = _read(path)
    kind = _kind(content)
    if kind not in _MODULES:
        raise ValueError(f"{path} was not written by a benchmark that can be reported ({', '.join(_MODULES)})")
    return name, content, importlib.import_module(_MODULES[kind])


def named(paths: list[Path]) -> dict[str, Path]:
    """Each file once, under the shortest end of its path that no other has: out.json, or old/out.json."""
    files = {Path(os.path.abspath(path)).parts[1:]: path for path in paths}
    names = {}
    for parts, path in files.items():
        lengths = itertools.count(1)
        length = next(n for n in lengths if sum(other[-n:] == parts[-n:] for other in files) == 1)
        names["/".join(parts[-length:])] = path
    return names


def _in_order(files: list[tuple[str, dict, ModuleType]]) -> list[tuple[str, dict, ModuleType]]:
    order = list(_MODULES)
    return sorted(files, key=lambda file: (order.index(_kind(file[1])), file[0]))


def _on_gpu(files: list[tuple[str, dict, ModuleType]]) -> bool:
    return any(_environment(content).get("device") == "cuda" for _, content, _ in files)


def report(files: list[tuple[str, dict, ModuleType]], page: Path, pictures: Path) -> str:
    """The whole page as Markdown; the plots are written into ``pictures``."""
    lines = [
        "# Performance",
        "",
        "Written by `python bench/report.py` from the JSON files named below; `bench/README.md` says how each is made.",
        "",
    ]
    if not _on_gpu(files):
        lines += [NO_GPU, ""]
    pictures.mkdir(parents=True, exist_ok=True)
    drawn: set[Path] = set()
    for name, content, module in files:
        lines += [*heading(_environment(content), name), ""]
        for picture in _draw(module, content, name, pictures, drawn):
            lines += [f"![{name}]({quote(picture.relative_to(page.parent).as_posix())})", ""]
        lines += module.sections(content, name)
    return "\n".join(lines).rstrip() + "\n"


def _draw(module: ModuleType, content: dict, name: str, pictures: Path, drawn: set[Path]) -> list[Path]:
    """The plots of one file, in the folders of its name; none takes the place of one in ``drawn``, which grows."""
    if not hasattr(module, "figures"):
        return []
    placed = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            fresh = module.figures(content, name, Path(folder))
        except ImportError:
            print(f"no plot of {name}: matplotlib is not installed")
            return []
        for picture in fresh:
            place = pictures / Path(name).with_name(picture.name)
            if place in drawn:  # x.json and x.txt, or a plot of x.json and x-tax.json, have one name
                place = pictures / name / picture.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(picture, place)
            drawn.add(place)
            placed.append(place)
    return placed


def readme_block(files: list[tuple[str, dict, ModuleType]]) -> list[str]:
    """The README's table: a row per file."""
    rows = []
    for name, content, module in files:
        if hasattr(module, "summary"):
            what, result = module.summary(content, name)
            env = _environment(content)
            where = f"{env.get('device_name')}, torch {env.get('torch')}, {str(env.get('date'))[:10]}"
            rows.append([f"`{name}`", what, result, where])
    lines = [] if _on_gpu(files) else ["", NO_GPU]
    return [*lines, *table(["file in `bench/results/`", "what", "result", "on"], rows)]


def write_readme(path: Path, block: list[str]) -> None:
    """Replace what stands between the two marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    text = path.read_text()
    if text.count(_START) != 1 or text.count(_END) != 1 or text.index(_START) > text.index(_END):
        raise ValueError(f"{path} must hold {_START!r} and, after it, {_END!r}, once each")
    before, _, rest = text.partition(_START)
    path.write_text("\n".join([before + _START, *block, _END + rest.partition(_END)[2]]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tables and plots from the benchmarks' JSON files.")
    parser.add_argument("files", nargs="*", type=Path, help="JSON files (default: bench/results/*.json)")
    parser.add_argument("--output", type=Path, help="folder for performance.md and plots, not docs and README")
    options = parser.parse_args(arguments)
    if options.files and not options.output:
        parser.error("docs and README show bench/results alone: give --output FOLDER for other files")
    paths = options.files or sorted((ROOT / "bench" / "results").glob("*.json"))
    try:
        if not options.files:
            paths = [path for path in paths if _kind(_read(path)) != _TABLE]
        files = _in_order([load(path, name) for name, path in named(paths).items()])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    page = (options.output or ROOT / "docs") / "performance.md"
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(report(files, page, page.parent / "performance"))
    except OSError as error:
        parser.error(f"the report cannot be written: {error}")
    if not options.output:
        write_readme(ROOT / "README.md", readme_block(files))
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
