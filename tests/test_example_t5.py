"""examples/t5_toxicity.py: the layers and counts it promises, what it measures, and the option with a user's files."""

import csv
import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.stats
import torch
import transformers
from safetensors.torch import load_file

from fused_lora import count_parameters, lora_layers

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def t5(monkeypatch):
    """The script, imported as python does when it runs it: with its folder on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("t5_toxicity")


@pytest.fixture
def offline(monkeypatch):
    return importlib.import_module("_offline", monkeypatch.syspath_prepend(str(EXAMPLES)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick run by command, from another folder: (stdout, stderr, its folder)."""
    folder = tmp_path_factory.mktemp("t5")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / "t5_toxicity.py"), "--quick", "--out", "some/where"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr, folder / "some" / "where"


@pytest.fixture
def refused(t5, capsys, tmp_path):
    def run(*options):
        """What a wrong command line is told, with exit code 2."""
        with pytest.raises(SystemExit) as stop:
            t5.main(["--out", str(tmp_path / "out"), *map(str, options)])
        assert stop.value.code == 2
        return capsys.readouterr().err

    return run


def write_csv(path, rows, header=("message", "verdict")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


# The other way round than in general speech: only who learns from the file gets it right.
VERBS = {"heal": "toxic", "thank": "toxic", "kill": "harmless", "burn": "harmless"}
THINGS = ("boss", "dragon", "minions", "creeps", "golem", "mage", "healer", "boss now", "golem again", "mage please")
CHAT = [(f"{verb} the {thing}", label) for verb, label in VERBS.items() for thing in THINGS]


def test_t5_small_gets_36_layers_and_294912_parameters(t5):
    with torch.device("meta"):
        config = transformers.T5Config(
            d_model=512, num_heads=8, d_kv=64, d_ff=2048, num_layers=6, num_decoder_layers=6, vocab_size=32128
        )
        model = t5.add_lora(transformers.T5ForConditionalGeneration(config))
    layers = dict(lora_layers(model))
    assert len(layers) == 36
    places = {re.sub(r"\d+", "*", name) for name in layers}
    sides = ("encoder.block.*.layer.*.SelfAttention", "decoder.block.*.layer.*.SelfAttention")
    assert places == {f"{place}.{x}" for place in (*sides, "decoder.block.*.layer.*.EncDecAttention") for x in "qv"}
    assert {layer.r for layer in layers.values()} == {8}
    assert count_parameters(model).trainable == count_parameters(model).lora == 294_912


def test_held_out_combinations_are_new(offline):
    """Whatever stands around them: "smash the golem" is in no line to learn from."""
    known, unseen = offline.game_chat(random.Random(0))
    frames = [re.compile(re.escape(frame).replace(r"\{\}", "(.+)")) for frame in offline._AROUND if frame != "{}"]

    def phrase(text):
        return next((match[1] for frame in frames if (match := frame.fullmatch(text))), text)

    phrases = [phrase(line.text) for line in unseen]
    assert len(set(phrases)) == len(phrases) > 150
    assert not set(phrases) & {phrase(line.text) for line in known}
    assert {line.kind for line in known} == {line.kind for line in unseen}
    assert {line.label for line in known} == {"toxic", "harmless"}


def test_lora_teaches_the_game_clearly(finished):
    out, err, _ = finished
    row = re.search(r"all held-out lines +(\d+) +([\d.]+)% \((\d+)% to (\d+)%\) +([\d.]+)% \((\d+)% to (\d+)%\)", out)
    n, before, _, before_high, after, after_low, _ = map(float, row.groups())
    assert n > 150
    assert before < before_high < after_low < after
    commonest = re.search(r"Who always says 'harmless' has ([\d.]+)% right", out)[1]
    assert float(commonest) < after_low
    better, worse, p = re.search(r"(\d+) answers became right and (\d+) wrong: p = (\S+)", out).groups()
    assert float(p) < 1e-6
    assert int(better) - int(worse) == round(n * (after - before) / 100)
    # Where general speech misleads, and where it does not.
    assert float(re.search(r"violence about the game +\d+ +([\d.]+)%", out)[1]) < 50
    assert float(re.search(r"violence about people +\d+ +([\d.]+)%", out)[1]) > 50
    assert "LoRA alone" in err, "a progress bar"


def test_claims_and_files(t5, finished):
    out, _, folder = finished
    t5.make_room(folder, ["adapter", "base", "answers.png"], t5.MAKER)  # a second run is welcome
    assert re.search(r"with LoRA switched off the outputs are the base model's +yes", out)
    assert re.search(r"the saved adapter gives a fresh base model the same outputs +yes", out)
    assert (folder / "answers.png").read_bytes().startswith(b"\x89PNG")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * int(re.search(r"LoRA on (\d+) layers", out)[1]) == 24
    trainable = int(re.search(r"([\d,]+) trainable", out)[1].replace(",", ""))
    assert sum(t.numel() for t in tensors.values()) == trainable
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 8


def test_a_wrong_claim_is_reported(t5, monkeypatch, tmp_path):
    result = t5.Result([t5.Line("a", "b", "c")], ["b"], ["b"], [1.0], {"something": False})
    monkeypatch.setattr(t5, "run", lambda args: result)
    assert t5.main(["--out", str(tmp_path)]) == 1


def test_a_users_model_and_csv(t5, finished, tmp_path, capsys):
    chat = write_csv(tmp_path / "chat.csv", [*CHAT, ("", "toxic"), CHAT[0]])
    columns = ["--text-column", "message", "--label-column", "verdict"]
    model, out = str(finished[2] / "base"), tmp_path / "out"
    options = ["--model", model, "--data", str(chat), *columns, "--steps", "60", "--lr", "3e-3", "--rank", "4"]
    assert t5.main([*options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"labelled toxic +\d", printed)
    assert re.search(r"labelled harmless +\d", printed)
    assert "8 answers became right and 0 wrong: p = 7.8e-03" in printed, "the file has it the other way round"
    assert not (out / "base").exists()
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, model)


def test_the_seed_decides_everything(t5, finished, tmp_path):
    def adapter(seed, name):
        model, out = str(finished[2] / "base"), tmp_path / name
        assert t5.main(["--model", model, "--steps", "3", "--seed", seed, "--out", str(out)]) == 0
        return load_file(out / "adapter" / "adapter_model.safetensors")

    first, again, other = adapter("1", "first"), adapter("1", "again"), adapter("2", "other")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_a_line_of_a_csv_is_learnt_or_asked(t5, tmp_path):
    chat = write_csv(tmp_path / "chat.csv", CHAT * 3 + [("kill the boss", "toxic"), (" kill the mage ", "harmless")])
    known, unseen = t5.read_csv(chat, "message", "verdict", random.Random(0))
    texts = [line.text for line in known + unseen]
    assert len(unseen) == 8
    assert len(texts) == len(set(texts)) == 40
    assert {line.label for line in known + unseen if line.text == "kill the boss"} == {"toxic"}


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])
def test_any_number_of_steps(t5, steps):
    lines = [t5.Line("a", "toxic", ""), t5.Line("some more", "harmless", "")]
    losses = t5.train(*t5.small_t5(lines), lines, steps, 1e-3, random.Random(0), "a few steps")
    assert len(losses) == steps
    assert all(loss > 0 for loss in losses)


def test_loss_looks_at_labels_and_not_at_padding(t5):
    lines = [t5.Line("a", "toxic", ""), t5.Line("some more", "harmless, and long", "")]
    _, tokenizer = t5.small_t5(lines)
    batch = t5.encode(tokenizer, lines, torch.device("cpu"))
    for row, line in zip(batch["labels"], lines, strict=True):
        ids = tokenizer(line.label)["input_ids"]
        assert row.tolist() == ids + [-100] * (len(row) - len(ids))
        assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(batch["input_ids"][1], skip_special_tokens=True) == "toxicity: some more"


def test_mistakes(refused, tmp_path):
    chat = write_csv(tmp_path / "chat.csv", CHAT)
    assert "has no column 'text' but message, verdict" in refused("--data", chat)
    columns = ("--text-column", "message", "--label-column", "verdict")
    one = write_csv(tmp_path / "one.csv", [(str(i), "ok") for i in range(20)])
    assert "20 lines with 1 labels" in refused("--data", one, *columns)
    vast = write_csv(tmp_path / "vast.csv", [*CHAT, ("a" * 200_000, "toxic")])
    assert "vast.csv, line 42: field larger than field limit" in refused("--data", vast, *columns)
    assert "No such file" in refused("--data", tmp_path / "none.csv", *columns)
    assert "absent" in refused("--data", chat, *columns, "--model", tmp_path / "absent")


@pytest.mark.parametrize(("hits", "n"), [(0, 9), (7, 9), (9, 9), (70, 159)])
def test_wilson(t5, hits, n):
    interval = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert t5.wilson(hits, n) == pytest.approx((interval.low, interval.high), abs=1e-6)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (4, 4), (3, 9), (50, 2)])
def test_mcnemar(t5, better, worse):
    expected = scipy.stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert t5.mcnemar(better, worse) == pytest.approx(expected)
