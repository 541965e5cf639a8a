"""Teach a Llama model to tag quotes: LoRA on every linear layer, the scale doubled from epoch to epoch.

The model reads "quote | tags: a, b" and learns what stands after the separator alone. The LoRA scale is 0.125 in the
first epoch and twice as large in each that follows. By default nothing is downloaded: a tiny Llama learns to read and
write made-up text first, then it is frozen, and LoRA learns to tag quotes.

    python examples/llama_quotes.py
    python examples/llama_quotes.py --model meta-llama/Llama-3.2-1B-Instruct --data Abirate/english_quotes
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _measures import Tags, best_constant, score
from _offline import Quote, byte_tokenizer, general_text, quotes
from _show import BLUE, GREY, figure, make_room, progress, sign, table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fused_lora import LoRAConfig, apply_lora, count_parameters, load_adapter, lora_layers, save_adapter
from fused_lora.demo import folder, usable_device

MAKER = "fused-lora examples/llama_quotes.py"  # its signature in what it writes
SEPARATOR = " | tags:"
FIRST_SCALE = 0.125
IGNORED = -100  # the label of tokens that the loss leaves out


def add_lora(model: torch.nn.Module, rank: int = 8) -> torch.nn.Module:
    """LoRA on every nn.Linear, the output head included ("all-linear" would leave it out); all else is frozen."""
    linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    return apply_lora(model, LoRAConfig(r=rank, lora_alpha=FIRST_SCALE * rank, target_modules=linear))


def read_quotes(source: str, rng: random.Random) -> tuple[list[Quote], list[Quote]]:
    """(quotes to learn from, held-out tenth, at most 200) of a data set of the hub, a folder, or a JSON or CSV file.

    Raises:
        ValueError: a file is empty or broken; no columns "quote" and "tags"; fewer than 10 quotes with tags.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    kind = "csv" if Path(source).suffix.lower() == ".csv" else "json"
    options = {"path": kind, "data_files": source} if Path(source).is_file() else {"path": source}
    try:
        rows = load_dataset(**options, split="train")
    except DatasetsError as error:
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error
    except StopIteration as error:  # an empty JSON file
        raise ValueError(f"{source} cannot be read: nothing is in it") from error
    if not {"quote", "tags"} <= set(rows.column_names):
        raise ValueError(f"{source} has the columns {', '.join(rows.column_names)}: quote and tags are needed")
    found = {}  # by text, so that no held-out quote was learnt
    for row in rows:
        tags = row["tags"].split(",") if isinstance(row["tags"], str) else row["tags"] or []
        tags = tuple(dict.fromkeys(tag for t in tags if (tag := t.strip(" []'\""))))
        if row["quote"] and tags:
            found[row["quote"].strip()] = Quote(row["quote"].strip(), tags)
    if len(found) < 10:
        raise ValueError(f"{source} has {len(found)} quotes with tags: at least 10 are needed")
    made = list(found.values())
    rng.shuffle(made)
    cut = min(200, len(made) // 10)
    return made[cut:], made[:cut]


def tiny_llama(texts: list[str]) -> tuple[Any, Any]:
    """(model with random weights, tokenizer trained on the texts)"""
    tokenizer = byte_tokenizer(texts, "<s> $A", pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def prompt(tokenizer: Any, quote: Quote) -> list[int]:
    """The tokens up to the separator. A long quote is cut, not the separator."""
    start = tokenizer(quote.text, truncation=True, max_length=128)["input_ids"]
    return start + tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]


def with_tags(tokenizer: Any, quote: Quote) -> tuple[list[int], list[int]]:
    """(tokens, labels): the labels of everything up to the separator are IGNORED."""
    start = prompt(tokenizer, quote)
    tags = tokenizer(" " + ", ".join(quote.tags), add_special_tokens=False, truncation=True, max_length=64)["input_ids"]
    end = [*tags, tokenizer.eos_token_id]
    return start + end, [IGNORED] * len(start) + end


def pad(rows: Sequence[list[int]], value: int, left: bool = False) -> Tensor:
    """(rows, longest), filled up with ``value``."""
    longest = max(map(len, rows))
    filled = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for row, f in zip(rows, filled, strict=True)])


def batch(examples: Sequence[tuple[list[int], list[int]]], device: torch.device) -> dict[str, Tensor]:
    """A batch for the model, padded on the right."""
    ids, labels = zip(*examples, strict=True)
    mask = pad([[1] * len(row) for row in ids], 0)
    tensors = {"input_ids": pad(ids, 0), "attention_mask": mask, "labels": pad(labels, IGNORED)}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def optimizer_for(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def train_epoch(model: Any, optimizer: Any, examples: list[Any], rng: random.Random, what: str) -> float:
    """Train on every example once, 16 in a step; the mean loss."""
    order = rng.sample(examples, len(examples))
    losses = []
    model.train()
    for start in (bar := progress(range(0, len(order), 16), what)):
        loss = model(**batch(order[start : start + 16], model.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return sum(losses) / len(losses)


@torch.no_grad()
def write_tags(model: Any, tokenizer: Any, asked: list[Quote]) -> list[Tags]:
    """What the model writes after the separator, split at the commas."""
    written = []
    for start in progress(range(0, len(asked), 50), "tagging held-out quotes"):
        ids = [prompt(tokenizer, quote) for quote in asked[start : start + 50]]
        inputs, mask = (pad(rows, 0, left=True).to(model.device) for rows in (ids, [[1] * len(row) for row in ids]))
        settings = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
        out = model.generate(input_ids=inputs, attention_mask=mask, **settings)[:, inputs.shape[1] :]
        for text in tokenizer.batch_decode(out, skip_special_tokens=True):
            written.append(tuple(dict.fromkeys(tag for part in text.split(",") if (tag := part.strip()))))
    return written


@torch.no_grad()
def logits(model: Any, tokenizer: Any, asked: list[Quote], lora: bool = True) -> Tensor:
    """The model's outputs on up to 50 quotes, with LoRA or with LoRA switched off."""
    for _, layer in lora_layers(model):
        layer.enabled = lora
    outputs = model(**batch([with_tags(tokenizer, quote) for quote in asked[:50]], model.device)).logits
    for _, layer in lora_layers(model):
        layer.enabled = True
    return outputs


class Result(NamedTuple):
    """Held-out quotes; their tags by the base model and after each epoch; scales and losses; claims."""

    asked: list[Quote]
    constant: Tags
    written: list[list[Tags]]
    scales: list[float]
    losses: list[float]
    claims: dict[str, bool]


def run(args: argparse.Namespace) -> Result:
    """Train, tag held-out quotes after each epoch, save the adapter, check what is claimed."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    known, asked = read_quotes(args.data, rng) if args.data else quotes(rng, 900 if args.quick else 1400)
    base = args.model or args.out / "base"
    if not args.model:
        text = general_text(rng, 1000)
        model, tokenizer = tiny_llama([*text, *(f"{q.text}{SEPARATOR} {', '.join(q.tags)}" for q in known)])
        optimizer = optimizer_for(model.to(args.device), 3e-3)
        rows = [tokenizer(line)["input_ids"] + [tokenizer.eos_token_id] for line in text]
        for epoch in range(2 if args.quick else 3):
            train_epoch(model, optimizer, [(row, row) for row in rows], rng, f"base model, epoch {epoch + 1}")
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        sign(base, MAKER)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).to(args.device).eval()

    written, base_logits = [write_tags(model, tokenizer, asked)], logits(model, tokenizer, asked)
    add_lora(model, args.rank)
    print(f"LoRA on {sum(1 for _ in lora_layers(model))} layers: {count_parameters(model)}")
    examples = [with_tags(tokenizer, quote) for quote in known]
    optimizer = optimizer_for(model, args.lr)
    scales, losses = [FIRST_SCALE * 2**epoch for epoch in range(args.epochs)], []
    for epoch, scale in enumerate(scales):
        for _, layer in lora_layers(model):
            layer.set_scale(scale)
        losses.append(train_epoch(model, optimizer, examples, rng, f"LoRA, epoch {epoch + 1}, scale {scale:g}"))
        written.append(write_tags(model, tokenizer, asked))

    save_adapter(model, args.out / "adapter", overwrite=True)
    sign(args.out / "adapter", MAKER)
    fresh = AutoModelForCausalLM.from_pretrained(base).to(args.device).eval()
    load_adapter(fresh, args.out / "adapter")
    off, on, loaded = (logits(m, tokenizer, asked, lora) for m, lora in ((model, False), (model, True), (fresh, True)))
    claims = {
        "with LoRA switched off the outputs are the base model's": torch.equal(off, base_logits),
        "the saved adapter gives a fresh base model the same outputs": torch.equal(loaded, on),
    }
    return Result(asked, best_constant([quote.tags for quote in known]), written, scales, losses, claims)


def report(result: Result, path: Path) -> None:
    """Tables on stdout, and a figure at ``path``."""
    right = [quote.tags for quote in result.asked]
    constant, course = score(right, [result.constant] * len(right)), [score(right, tags) for tags in result.written]
    steps = zip(result.scales, result.losses, course[1:], strict=True)
    epochs = [(i, f"{scale:g}", f"{loss:.3f}", f"{c.f1:.3f}") for i, (scale, loss, c) in enumerate(steps, 1)]
    table("Training, the scale doubling", ["epoch", "LoRA scale", "mean loss", "micro-F1, held out"], epochs)
    names = (f"always the {len(result.constant)} commonest tags", "base model", "with LoRA")
    rows = [
        (name, f"{s.precision:.3f}", f"{s.recall:.3f}", f"{s.f1:.3f} ({s.low:.3f} to {s.high:.3f})")
        for name, s in zip(names, (constant, course[0], course[-1]), strict=True)
    ]
    table(f"Tags of {len(right)} held-out quotes", ["", "precision", "recall", "micro-F1 (95 %)"], rows)
    shown = [
        (q.text, ", ".join(q.tags), ", ".join(tags)) for q, tags in zip(result.asked, result.written[-1], strict=True)
    ]
    table("Some of them", ["quote", "tags", "written"], shown[:6], 3)
    table("Bit for bit", ["claim", "holds"], [(c, "yes" if holds else "NO") for c, holds in result.claims.items()])

    with figure(path, MAKER) as (axes,):
        f1, low, high = torch.tensor([step[2:] for step in course]).T
        error = torch.stack([f1 - low, high - f1]).clamp(min=0).tolist()
        axes.errorbar(range(len(f1)), f1.tolist(), error, color=BLUE, marker="o", capsize=3, label="micro-F1, 95 %")
        axes.axhline(constant.f1, color=GREY, label="without reading the quote")
        axes.set_xticks(range(len(f1)), ["base", *(f"{scale:g}" for scale in result.scales)])
        axes.set_xlabel("LoRA scale, epoch by epoch")
        axes.set_ylim(0, 1)
        axes.set_title(f"Tags of {len(right)} held-out quotes", loc="left")
        axes.legend(frameon=False)


def main(argv: list[str] | None = None) -> int:
    """0 where every claim holds, else 1; 2 where the arguments cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Llama of the hub, or a folder; default: a tiny one, trained here")
    parser.add_argument("--data", help="of the hub, or a JSON or CSV file with quote and tags; default: made up here")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (%(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="the scale doubles with each (%(default)s)")
    parser.add_argument("--lr", type=float, help="of LoRA training (3e-3; with --model 2e-4)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0; auto is a GPU if there is one")
    parser.add_argument("--out", type=folder, default=Path("demo-output/llama_quotes"), help="folder (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer quotes and less training of the base model")
    args = parser.parse_args(argv)
    args.lr = args.lr or (2e-4 if args.model else 3e-3)
    try:
        args.device = usable_device(args.device)
        make_room(args.out, ("adapter", "tags.png", *([] if args.model else ["base"])), MAKER)
        result = run(args)
    except (ValueError, OSError) as error:  # a file or column that is not there, a model that is not
        parser.error(str(error))
    report(result, args.out / "tags.png")
    print(f"Wrote {args.out / 'adapter'} and {args.out / 'tags.png'}")
    return 0 if all(result.claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
