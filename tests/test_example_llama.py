"""examples/llama_quotes.py: every linear layer, the loss after the separator alone, the doubled scale, the options."""

import csv
import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fused_lora import LoRALinear, lora_layers

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def llama(monkeypatch):
    """The script, imported as python does when it runs it: with its folder on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("llama_quotes")


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """What datasets reads from a file stays in this test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tiny(llama):
    """(quotes, model with LoRA that is no longer the base model, tokenizer)"""
    torch.manual_seed(0)
    asked = [
        llama.Quote("a page without rain", ("books", "nature")),
        llama.Quote("one clock", ("time",)),
        llama.Quote("no truth ever feared the heart", ("love", "truth")),
    ]
    model, tokenizer = llama.tiny_llama([f"{q.text} | tags: {', '.join(q.tags)}" for q in asked])
    llama.add_lora(model)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    return asked, model, tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick run by command, from another folder: (stdout, stderr, its folder)."""
    folder = tmp_path_factory.mktemp("llama")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / "llama_quotes.py"), "--quick", "--out", "some/where"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr, folder / "some" / "where"


def f1_of(out, name):
    """(micro-F1, low, high)"""
    numbers = re.search(rf"{name} +[\d.]+ +[\d.]+ +([\d.]+) \(([\d.]+) to ([\d.]+)\)", out).groups()
    return tuple(map(float, numbers))


# ---- LoRA and the loss


def test_every_linear_is_replaced(llama):
    config = transformers.LlamaConfig(  # Llama-3.2-1B, narrow
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    llama.add_lora(model)
    layers = dict(lora_layers(model))
    assert list(layers) == linear
    assert len(layers) == 16 * 7 + 1
    assert type(layers["lm_head"]) is LoRALinear
    assert not [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert {layer.scale for layer in layers.values()} == {0.125}
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}


def test_text(llama, tiny):
    asked, _, tokenizer = tiny
    ids, labels = llama.with_tags(tokenizer, asked[0])
    assert tokenizer.decode(ids) == "<s>a page without rain | tags: books, nature</s>"
    assert tokenizer.decode([i for i in labels if i != -100]) == " books, nature</s>"
    assert ids[: len(llama.prompt(tokenizer, asked[0]))] == llama.prompt(tokenizer, asked[0])
    long = llama.Quote("word " * 500, ("time",))
    assert tokenizer.decode(llama.with_tags(tokenizer, long)[0]).endswith("| tags: time</s>"), "the quote is cut"


def test_no_gradient_from_tokens_before_the_separator(llama, tiny):
    """The output at a position is about the next token: only from the separator's last token on it counts."""
    asked, model, tokenizer = tiny
    examples = [llama.with_tags(tokenizer, quote) for quote in asked]
    outputs = model(**llama.batch(examples, model.device))
    outputs.logits.retain_grad()
    outputs.loss.backward()
    for gradient, quote, (ids, _) in zip(outputs.logits.grad, asked, examples, strict=True):
        first = len(llama.prompt(tokenizer, quote)) - 1
        assert not gradient[:first].any()
        assert gradient[first : len(ids) - 1].any(dim=-1).all()
        assert not gradient[len(ids) - 1 :].any(), "nothing follows the end, and padding does not count"
    assert all(layer.lora_a.grad.any() and layer.lora_b.grad.any() for _, layer in lora_layers(model))


def test_padding_changes_nothing(llama, tiny):
    asked, model, tokenizer = tiny
    model.double()
    examples = [llama.with_tags(tokenizer, quote) for quote in asked]
    together = model(**llama.batch(examples, model.device)).loss
    counts = [sum(label != -100 for label in labels) for _, labels in examples]
    alone = [
        model(**llama.batch([example], model.device)).loss * n for example, n in zip(examples, counts, strict=True)
    ]
    torch.testing.assert_close(together, sum(alone) / sum(counts), rtol=1e-9, atol=1e-9)
    model.eval()
    one_by_one = [llama.write_tags(model, tokenizer, [quote])[0] for quote in asked]
    assert llama.write_tags(model, tokenizer, asked) == one_by_one


# ---- what is measured


def test_held_out_pairs_are_new(llama):
    known, unseen = llama.quotes(random.Random(0), 900)
    themes = importlib.import_module("_offline")._THEMES
    words = {word for theme in themes.values() for word in theme}
    known_pairs, pairs = ([frozenset(words & {*quote.text.split()}) for quote in part] for part in (known, unseen))
    assert (len(known), len(unseen)) == (700, 200)
    assert {len(pair) for pair in known_pairs + pairs} == {2}
    assert len(set(pairs)) == len(pairs)
    assert not set(pairs) & set(known_pairs)
    for pair, quote in zip(pairs, unseen, strict=True):
        assert quote.tags == tuple(sorted(theme for theme, own in themes.items() if pair & {*own}))


def test_score(llama):
    right, written = [("a", "b"), ("c",), ("d",)], [("b", "a", "x"), (), ("d",)]
    score = llama.score(right, written)
    assert score[:3] == pytest.approx((3 / 4, 3 / 4, 3 / 4))
    assert 0 <= score.low < score.f1 < score.high <= 1
    assert llama.score(right, right)[:3] == (1, 1, 1)
    assert llama.score(right, [(), (), ()]) == (0, 0, 0, 0, 0)


def test_best_constant(llama):
    assert llama.best_constant([("a", "b"), ("a", "b"), ("a", "c")]) == ("a", "b")
    assert llama.best_constant([("a",), ("a",), ("a", "c")]) == ("a",)


def test_tags_are_learnt_clearly(finished):
    out, err, _ = finished
    constant, base, tuned = (f1_of(out, name) for name in (r"always the \d+ commonest tags", "base model", "with LoRA"))
    assert tuned[1] > constant[2], "the intervals are apart"
    assert tuned[1] > base[2]
    assert constant[0] > 0.2, "a baseline that means something"
    table = re.findall(r"^ +([1-5]) +([\d.]+) +[\d.]+ +([\d.]+) *$", out, re.M)
    assert [(epoch, scale) for epoch, scale, _ in table] == [(str(i + 1), f"{0.125 * 2**i:g}") for i in range(5)]
    assert float(table[-1][2]) == tuned[0] > float(table[0][2])
    assert "LoRA, epoch 5, scale 2" in err, "a progress bar"


def test_claims_and_files(llama, finished):
    out, _, folder = finished
    llama.make_room(folder, ["adapter", "base", "tags.png"], llama.MAKER)  # a second run is welcome
    assert re.search(r"with LoRA switched off the outputs are the base model's +yes", out)
    assert re.search(r"the saved adapter gives a fresh base model the same outputs +yes", out)
    assert (folder / "tags.png").read_bytes().startswith(b"\x89PNG")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * int(re.search(r"LoRA on (\d+) layers", out)[1]) == 2 * (2 * 7 + 1)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 2, "the scale of the last epoch"


def test_a_wrong_claim_is_reported(llama, monkeypatch, tmp_path):
    asked = [llama.Quote("a", ("b",))]
    result = llama.Result(asked, ("b",), [[("b",)], [("c",)]], [0.125], [1.0], {"something": False})
    monkeypatch.setattr(llama, "run", lambda args: result)
    assert llama.main(["--out", str(tmp_path)]) == 1


# ---- a user's model and data

ROWS = [
    {"quote": f"“{a} is not {b}.”", "author": "somebody", "tags": [a, b]}
    for a in ("love", "time", "work", "truth") for b in ("humor", "nature", "books", "courage")
]  # fmt: skip


def write_json(path, rows=ROWS):
    path.write_text("\n".join(map(json.dumps, rows)))  # one object a line, as the hub has this data set
    return str(path)


def write_csv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["quote", "tags"], *((row["quote"], ", ".join(row["tags"])) for row in ROWS)])
    return str(path)


@pytest.mark.parametrize("write", [write_json, write_csv])
def test_reads_quotes(llama, own_cache, tmp_path, write):
    known, unseen = llama.read_quotes(
        write(tmp_path / ("q.csv" if write is write_csv else "q.jsonl")), random.Random(0)
    )
    assert (len(known), len(unseen)) == (15, 1)
    assert {quote.text: list(quote.tags) for quote in known + unseen} == {row["quote"]: row["tags"] for row in ROWS}


def test_quotes_without_tags_and_repetitions_are_left_out(llama, own_cache, tmp_path):
    rows = [*ROWS, ROWS[0], {"quote": "untagged", "author": "a", "tags": []}]
    rows.append({"quote": "twice", "author": "a", "tags": ["x", " x", "y"]})
    known, unseen = llama.read_quotes(write_json(tmp_path / "q.json", rows), random.Random(0))
    found = {quote.text: quote.tags for quote in known + unseen}
    assert len(known + unseen) == len(found) == 17
    assert found["twice"] == ("x", "y")


def test_a_users_model_in_bfloat16_with_a_tied_head(llama, own_cache, finished, tmp_path, monkeypatch, capsys):
    """What distinguishes Llama-3.2-1B from the tiny one; from folders and files, as the hub's come."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished[2] / "base")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    seen = []
    train_epoch = llama.train_epoch

    def spy(model, *args):
        layers = dict(lora_layers(model))
        seen.append({layer.scale for layer in layers.values()})
        assert {p.dtype for p in (layers["lm_head"].weight, layers["lm_head"].lora_a)} == {
            torch.bfloat16,
            torch.float32,
        }
        assert model.lm_head.weight is model.model.embed_tokens.weight
        return train_epoch(model, *args)

    monkeypatch.setattr(llama, "train_epoch", spy)
    out = tmp_path / "out"
    options = ["--model", str(tmp_path / "model"), "--data", write_json(tmp_path / "q.jsonl"), "--epochs", "3"]
    assert llama.main([*options, "--rank", "4", "--out", str(out)]) == 0
    assert seen == [{0.125}, {0.25}, {0.5}]
    assert "LoRA on 8 layers" in capsys.readouterr().out
    assert not (out / "base").exists()
    saved = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (4, 2)
    assert saved["base_model_name_or_path"] == str(tmp_path / "model")


def test_mistakes(llama, own_cache, tmp_path, capsys):
    def refused(*options):
        with pytest.raises(SystemExit) as stop:
            llama.main(["--out", str(tmp_path / "out"), *options])
        assert stop.value.code == 2
        return capsys.readouterr().err

    other = write_json(tmp_path / "other.json", [{"text": "a", "label": "b"}])
    assert "has the columns text, label: quote and tags are needed" in refused("--data", other)
    few = write_json(tmp_path / "few.json", ROWS[:3])
    assert "has 3 quotes with tags" in refused("--data", few)
    (tmp_path / "cut.json").write_text('{"quote": "a", "tags": ["b')
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "empty.csv").write_text("")
    for name in ("cut.json", "empty.json", "empty.csv"):
        assert f"{name} cannot be read" in refused("--data", str(tmp_path / name))
    assert "absent" in refused("--model", str(tmp_path / "absent"))
