"""PEFT's own tests as the judge: run unpatched and patched, the two sets of failures compared.

    python tests/peft_judge.py /path/to/peft test_custom_models.py test_lora_variants.py
    python tests/peft_judge.py /path/to/peft test_initialization.py -k "lora or Lora" --dropout torch --workers 2

Runs in the environment of the Python that runs it, whose PEFT should be of the tests' version. Exits with 1 if a test
fails patched that does not fail unpatched, if fewer tests ran, or if nothing ran fused. Nothing is downloaded (but with
``--hub``): tests of models that are not in the hub's cache fail on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent


def run(options: argparse.Namespace, mode: str, directory: Path) -> dict:
    """The outcomes and counts of one run of the files, with PEFT patched (mode: dropout=) or not ("off")."""
    record = directory / f"{mode}.json"
    # Not -m pytest, which would put the working directory, PEFT's, before the installed package.
    pytest = [sys.executable, "-c", "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main())"]
    command = [*pytest, "-p", "peft_plugin", "-o", "addopts=", "-q", "--tb=line"]
    command += ["--fused-dropout", mode, "--fused-outcomes", str(record), "-k", options.k]
    # PEFT's settings make errors of the deprecations of a transformers that is newer than they are.
    command += ["-W", "default::FutureWarning", "-W", "default::DeprecationWarning"]
    command += [] if options.hub else ["--fused-offline"]
    command += ["-n", str(options.workers)] if options.workers > 1 else []
    paths = [path for name in [str(HERE), os.environ.get("PYTHONPATH", "")] if (path := name)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environment |= {} if options.hub else {"HF_HUB_OFFLINE": "1"}
    command += [str(Path("tests") / name) for name in options.files]
    subprocess.run(command, cwd=options.peft, env=environment, timeout=options.timeout, check=False)
    return json.loads(record.read_text())


def compare(plain: dict, patched: dict) -> list[str]:
    """What is wrong with the patched run, one line each."""
    before, after = plain["outcomes"], patched["outcomes"]
    complaints = [
        f"{after.get(name, 'did not run')} patched, {outcome} unpatched: {name}"
        for name, outcome in before.items()
        if after.get(name) != outcome and outcome != "failed"
    ]
    complaints += [f"failed patched, absent unpatched: {n}" for n in after if n not in before and after[n] == "failed"]
    if not patched["calls"].get("fused"):
        complaints.append("nothing ran fused: the run proves nothing")
    return complaints


def describe(plain: dict, patched: dict) -> str:
    """The counts of both runs, for people."""
    lines = []
    for title, result in (("unpatched", plain), ("patched", patched)):
        counts = Counter(result["outcomes"].values())
        lines.append(f"{title:>9}: " + ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped")))
    for title in ("layers", "calls"):
        total, counted = sum(patched[title].values()), Counter(patched[title])
        lines.append(f"{title}: {total}" + "".join(f"\n  {count:>8}  {what}" for what, count in counted.most_common()))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="PEFT's own tests, unpatched and patched, compared.")
    parser.add_argument("peft", type=Path, help="a checkout of PEFT")
    parser.add_argument("files", nargs="+", help="files under its tests/")
    parser.add_argument("-k", default="lora", help="as pytest's (default: lora)")
    parser.add_argument("--dropout", default="fused", choices=("fused", "torch"), help="dropout= of patch_peft")
    parser.add_argument("--hub", action="store_true", help="let the tests fetch models (default: offline)")
    parser.add_argument("--workers", type=int, default=1, help="processes, with pytest-xdist (default: 1)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run (default: 3600)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        plain, patched = (run(options, mode, Path(directory)) for mode in ("off", options.dropout))
    print(describe(plain, patched))
    complaints = compare(plain, patched)
    print("\n".join(complaints) or "no test fails patched that does not fail unpatched")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
