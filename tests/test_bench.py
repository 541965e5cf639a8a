"""The benchmarks run on their quick grid and write what the report reads; the report names where a figure is from."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"

# pytest in a process where peft cannot be found; without "python -m", which would put this folder on the path.
_PYTEST_WITHOUT_PEFT = (
    "import sys; sys.path.pop(0); sys.modules['peft'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
)


def test_pytest_benchmark_quick(tmp_path, bench):
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "-c",
        _PYTEST_WITHOUT_PEFT,
        BENCH,
        "--quick",
        "--dtype=bf16-fp32",
        f"--benchmark-json={out}",
    ]
    environment = {
        # Under pytest-xdist's variables pytest-benchmark would not measure.
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
        "PYTEST_ADDOPTS": "-p no:cacheprovider",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: peft: not installed" in done.stdout

    content = json.loads(out.read_text())
    assert "not installed" in content["left_out"]["peft"]
    assert "node" not in content["machine_info"]
    groups: dict[str, set[str]] = {}
    for benchmark in content["benchmarks"]:
        info = benchmark["extra_info"]
        groups.setdefault(benchmark["group"], set()).add(info["provider"])
        assert {"shape", "dtype", "adapter_dtype", "torch", "device", "device_name", "p", "rank", "mode"} <= info.keys()
    assert len(groups) == 4  # two modes, p in {0, 0.1}
    assert all({"frozen", "ours", "plain", "addmm"} <= providers for providers in groups.values())

    report = bench("report")
    report.main([str(out), "--output", str(tmp_path / "report")])
    text = (tmp_path / "report" / "performance.md").read_text()
    assert "left out: peft: not installed" in text
    assert "Not measured on a GPU yet" in text


def test_paired_quick_and_report(tmp_path, bench):
    out = tmp_path / "paired.json"
    bench("paired").main(["--quick", "--device=cpu", "--dtype=bf16-fp32", f"--output={out}"])
    content = json.loads(out.read_text())
    assert {"torch", "peft", "python", "cpu", "cores", "threads", "commit", "dirty", "date"} <= content.keys()
    assert len(content["cells"]) == 4
    for cell in content["cells"]:
        assert cell["self"]["q1"] <= cell["self"]["median"] <= cell["self"]["q3"]
        assert cell["seconds"]["ours"]["rounds"] >= 1
        # Kept beyond x and the parameters: s in float32, and the seed where there is dropout.
        s_bytes = cell["M"] * cell["rank"] * 4
        assert cell["kept_bytes"]["ours"] <= s_bytes + 64 < cell["kept_bytes"]["plain"]
        if importlib.util.find_spec("peft"):
            assert cell["vs_peft"]["ours"]["median"] > 0
            assert cell["tax"]["peft"]["median"] > 0

    report = bench("report")
    report.main([str(out), "--output", str(tmp_path / "report")])
    text = (tmp_path / "report" / "performance.md").read_text()
    assert "Not measured on a GPU yet" in text
    assert all(line.endswith("paired.json") for line in text.splitlines() if line.startswith("###"))
    assert "(performance/paired.png)" in text
    assert (tmp_path / "report" / "performance" / "paired.png").stat().st_size > 0


def test_ratios_are_of_the_same_rounds(bench):
    paired = bench("paired")
    # The machine is twice as slow in the second round: the ratio within each round does not see it.
    times = {"ours": [1.0, 2.0, 1.0], "peft": [2.0, 4.0]}
    assert paired.ratios(times, "ours", "peft") == {"median": 0.5, "q1": 0.5, "q3": 0.5, "rounds": 2}


def test_kept_bytes_counts_a_storage_once(bench):
    measure = bench("measure")

    class Twice(torch.nn.Module):
        def forward(self, x):
            h = x * 2.0
            return h * h.t()

    x = torch.randn(8, 8, requires_grad=True)
    assert measure.kept_bytes(Twice(), x) == 8 * 8 * 4


def test_a_layer_that_computes_something_else_is_not_timed(bench):
    providers = bench("providers")
    wrong = providers.Provider("wrong", "drops the branch", lambda inputs, p: providers.frozen(inputs.weight))
    providers.PROVIDERS["wrong"] = wrong
    with pytest.raises(RuntimeError, match=r"wrong .* is not timed: y is off"):
        providers.check("wrong", "fp32", torch.device("cpu"))


@pytest.mark.parametrize(
    "option", ["--shapes=llama-9", "--dtype=int8", "--mode=backward", "--rows=x", "--rank=8,", "--p=a"]
)
def test_unknown_grid_is_refused(bench, option, capsys):
    with pytest.raises(SystemExit):
        bench("paired").main([option, "--device=cpu"])
    assert re.search(rf"error: {option.partition('=')[0]} .*takes a comma list of", capsys.readouterr().err)


@pytest.mark.parametrize(
    "option",
    [
        "--rows=-5",
        "--rows=0",
        "--rows=x",
        "--rank=0",
        "--rank=8,x",
        "--p=2",
        "--p=x",
        "--p=nan",
        "--budget=0",
        "--device=cuda:99",
        "--device=abacus",
        "--device=meta",
    ],
)
def test_a_number_or_device_that_cannot_be_is_a_usage_error(bench, option):
    name, _, value = option.partition("=")
    parser = argparse.ArgumentParser()
    bench("shapes").add_grid_options(parser.add_argument)
    parser.add_argument("--budget", type=float)
    # By its path: "conftest" is the name of the one beside this file.
    spec = importlib.util.spec_from_file_location("conftest_of_bench", BENCH / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)

    def configure(*arguments):
        config = SimpleNamespace(option=parser.parse_args(arguments), stash={}, addinivalue_line=lambda *_: None)
        conftest.pytest_configure(config)

    configure("--rows=1,512", "--rank=1", "--p=0,1", "--device=cpu", "--budget=0.1")
    with pytest.raises(pytest.UsageError) as refused:
        configure(option)
    assert name in str(refused.value)
    assert value.rpartition(",")[2] in str(refused.value)


def test_report_refuses_other_json(tmp_path, bench):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json was not written by a benchmark"):
        bench("report").load(path, "other.json")


@pytest.mark.parametrize(
    ("text", "output", "words"),
    [
        (None, "report", "No such file"),
        ("not JSON", "report", "is no JSON"),
        ("[]", "report", "was not written by a benchmark"),
        ("{}", "report", "was not written by a benchmark"),
        ('{"kind": "fused-lora gpu"', "report", "is no JSON"),
        ("good", "taken", "cannot be written"),
        ("good", "taken/below", "cannot be written"),
    ],
)
def test_report_says_in_a_line_what_it_cannot_read_or_write(tmp_path, bench, capsys, text, output, words):
    if text is not None:
        good = json.dumps(one_cell(bench("report_linear"), 0.5))
        (tmp_path / "out.json").write_text(good if text == "good" else text)
    (tmp_path / "taken").write_text("a user's notes")
    with pytest.raises(SystemExit) as stop:
        bench("report").main([str(tmp_path / "out.json"), "--output", str(tmp_path / output)])
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert words in message
    assert str(tmp_path / ("taken" if text == "good" else "out.json")) in message
    assert (tmp_path / "taken").read_text() == "a user's notes"


def one_cell(linear, ratio: float) -> dict:
    """A JSON of ``paired.py`` with one cell, where ours takes ``ratio`` of PEFT's time."""
    spread = {"q1": ratio - 0.1, "q3": ratio + 0.1, "rounds": 5}
    case = {"set": "m", "linear": "q", "count": 1, "M": 8, "K": 4, "N": 4, "regime": "fp32", "p": 0.0, "rank": 8}
    case |= {"mode": "forward", "kept_bytes": {}, "seconds": {"ours": {"median": 1.0, "rounds": 5}}}
    cell = {**case, "vs_peft": {"ours": {**spread, "median": ratio}}, "self": {**spread, "median": 1.0}}
    return {"kind": linear.PAIRED, "left_out": {}, "cells": [cell], "device": "cpu", "date": "2026-01-02T03:04"}


def test_files_of_one_name_have_sections_and_plots_of_their_own(tmp_path, bench):
    pytest.importorskip("matplotlib")
    report, linear = bench("report"), bench("report_linear")
    files = {"old/out.json": 0.5, "new/out.json": 0.8, "new/out.txt": 0.9, "more/alone.json": 0.7}
    for name, ratio in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(one_cell(linear, ratio)))
    again = tmp_path / "new" / ".." / "old" / "out.json"  # the first once more
    report.main([*(str(tmp_path / name) for name in files), str(again), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "performance.md").read_text()
    headings = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert headings == ["alone.json", "new/out.json", "old/out.json", "out.txt"]
    plots = re.findall(r"!\[(.*)\]\((.*)\)", page)
    assert plots == [(name, f"performance/{name.rpartition('.')[0]}.png") for name in headings]
    pictures = {(tmp_path / "report" / plot).read_bytes() for _, plot in plots}
    assert len(pictures) == len(files)


def test_a_plot_never_takes_the_place_of_another(tmp_path, bench):
    pytest.importorskip("matplotlib")
    report, linear = bench("report"), bench("report_linear")
    files = [("out.json", one_cell(linear, 0.5), linear), ("out.txt", one_cell(linear, 0.8), linear)]
    page = report.report(files, tmp_path / "page.md", tmp_path / "plots")
    assert "![out.json](plots/out.png)" in page
    assert "![out.txt](plots/out.txt/out.png)" in page
    assert (tmp_path / "plots/out.png").read_bytes() != (tmp_path / "plots/out.txt/out.png").read_bytes()


def test_readme_holds_a_row_for_each_file_and_keeps_the_rest(tmp_path, bench):
    report, linear = bench("report"), bench("report_linear")
    content = one_cell(linear, 0.8)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report._START}\nold\n{report._END}\nafter\n")
    report.write_readme(readme, report.readme_block([("a.json", content, linear)]))
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert report.NO_GPU in text
    assert "| `a.json` |" in text
    assert "median 0.800" in text
    readme.write_text(report._END + report._START)
    with pytest.raises(ValueError, match="once each"):
        report.write_readme(readme, [])


def test_layers_of_a_model_are_summed(bench):
    report = bench("report_linear")
    case = {"set": "m", "mode": "forward", "M": 8, "regime": "fp32", "p": 0.0, "rank": 8, "K": 4, "N": 4}
    cells = [
        report.Cell({**case, "linear": "q,o", "count": 2}, seconds={"frozen": 1.0, "ours": 1.1}),
        report.Cell({**case, "linear": "down", "count": 1}, seconds={"frozen": 2.0, "ours": 2.2}),
    ]
    text = "\n".join(report.layer_tables(report.File("f.json", "", {}, {}, cells)))
    assert "| down, q,o | 4000.000 | 1.100 |" in text
