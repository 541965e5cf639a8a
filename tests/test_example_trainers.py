"""examples/trainer_peft.py at a small size: both trainers, the loss curves judged, the figure written."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("trainer_peft")
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == EXAMPLES:
            del sys.modules[name]


def parse(example, *arguments):
    return example.parse(list(arguments), example.command())


SMALL = ["--seeds", "2", "--batch", "2", "--cpu"]


def test_it_runs_and_shows_what_it_did(example, tmp_path, capsys):
    path = tmp_path / "curves.png"
    assert example.main([*SMALL, "--steps", "2", "--output", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "fused-lora: 14 of 14 LoRA layers fused" in shown
    assert shown.count("not judged") == 2  # four losses are too few for the accuracy rule
    assert shown.count("yes") == 2
    assert path.read_bytes().startswith(b"\x89PNG")
    parse(example, "--output", str(path))  # a second run is welcome


def test_a_users_own_figure_stays(example, tmp_path, capsys):
    (tmp_path / "curves.png").write_text("a user's")
    with pytest.raises(SystemExit):
        parse(example, "--output", str(tmp_path / "curves.png"))
    assert "is not this script's" in capsys.readouterr().err
    assert (tmp_path / "curves.png").read_text() == "a user's"


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_curves_of_patched_and_unpatched_runs_lie_on_each_other(trainer, example):
    """The accuracy rule over 200 losses; with gradient checkpointing the patched curve is the same to the last bit."""
    pytest.importorskip("trl" if trainer == "trl" else "datasets")
    job = example.Job(parse(example, *SMALL, "--trainer", trainer, "--steps", "100"))
    with example.progress((), "runs") as bar:
        curves = {way: [job.train(example.Run(way, 0.0, False, s), bar) for s in (0, 1)] for way in example.WAYS}
        assert job.report.fused == 14
        assert curves["patched"] != curves["peft"]
        assert example.within_rule(curves["patched"], curves["peft"], curves["exact"])
        assert job.train(example.Run("patched", 0.0, True, 1), bar) == curves["patched"][1]


def test_the_judgement_can_fail(example):
    """A curve that is too far off breaks the rule, and a shift that the seeds cannot explain leaves the interval."""
    exact = [[3.0, 2.0, 1.0, 0.5], [3.1, 2.1, 1.1, 0.6]]
    peft = [[loss + 1e-3 for loss in curve] for curve in exact]
    assert example.within_rule(peft, peft, exact)
    assert not example.within_rule([[loss + 3e-3 for loss in curve] for curve in exact], peft, exact)
    one_step_off = [[3.0, 2.0, 1.0, 0.503], exact[1]]
    assert not example.within_rule(one_step_off, peft, exact)  # the max norm sees it
    seeds = [[1.0, 0.5 + 0.01 * i] for i in range(5)]
    jitter = [[1.0, losses[-1] + 0.002 * (-1) ** i] for i, losses in enumerate(seeds)]
    low, high = example.interval(jitter, seeds)
    assert low < 0 < high
    low, high = example.interval([[1.0, losses[-1] + 0.05] for losses in jitter], seeds)
    assert low > 0


MISUSE = {
    "--seeds 1": "--seeds must be at least 2, got 1",
    "--steps 0": "--steps must be at least 1, got 0",
    "--quick --steps 0": "--steps must be at least 1, got 0",
    "--batch 0": "--batch must be at least 1, got 0",
    "--length 1": "--length must be at least 2, got 1",
    "--dropout 0": "--dropout must be between 0 and 1, got 0",
    "--dropout nan": "--dropout must be between 0 and 1, got nan",
    "--lr nan": "--lr must be a number above 0, got nan",
    "--lr inf": "--lr must be a number above 0, got inf",
    "--lr 0": "--lr must be a number above 0, got 0",
    "--output curves.bmp": "--output must be a PNG file, its name ending in .png, got 'curves.bmp'",
    "--output curves": "--output must be a PNG file, its name ending in .png, got 'curves'",
    "--trainer axolotl": "invalid choice: 'axolotl'",
    "--data none.txt": "No such file or directory: 'none.txt'",
    "--data .": "Is a directory: '.'",
    "--data empty.txt": "empty.txt has 0 lines: a batch of 8 needs as many",
    "--data short.txt": "short.txt has 7 lines: a batch of 8 needs as many",
    "--data bytes.txt": "bytes.txt is not text in UTF-8",
    "--model ./absent": "--model ./absent: ",
    "--output short.txt/a.png": "short.txt",
}


@pytest.mark.parametrize("wrong", MISUSE)
def test_misuse(wrong, example, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "short.txt").write_text("a line\n" * 7)
    (tmp_path / "bytes.txt").write_bytes(b"\xff" * 20)
    with pytest.raises(SystemExit) as stop:
        example.main(wrong.split())
    assert stop.value.code == 2
    assert MISUSE[wrong] in capsys.readouterr().err


def test_quick_leaves_what_is_given(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def sizes(*arguments):
        options = parse(example, *arguments)
        return options.steps, options.seeds, options.batch

    assert sizes() == (60, 5, 8)
    assert sizes("--quick") == (6, 2, 4)
    assert sizes("--quick", "--steps", "9", "--seeds", "3") == (9, 3, 4)
    assert sizes("--batch", "2") == (60, 5, 2)
    parse(example, "--output", "new/folder/curves.png")
    assert (tmp_path / "new" / "folder").is_dir()
