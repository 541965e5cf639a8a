"""Teach a T5 model that "kill the boss" is harmless in a game: LoRA on q and v of every attention layer.

Text in, text out: the model reads "toxicity: kill the boss" and writes the label. By default nothing is downloaded:
a small T5 learns general speech, where words of violence are toxic whatever they are about; then it is frozen, and
LoRA learns the game, where they are harmless about a dragon and other words are the insults. With a hub model and a
CSV file of chat lines, LoRA learns the labels of that file, whatever they are.

    python examples/t5_toxicity.py
    python examples/t5_toxicity.py --model google-t5/t5-small --data chat.csv --text-column message --label-column toxic
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _measures import mcnemar, wilson
from _offline import Line, byte_tokenizer, game_chat, general_speech
from _show import BLUE, GREY, figure, make_room, progress, sign, table
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from fused_lora import LoRAConfig, apply_lora, count_parameters, load_adapter, lora_layers, save_adapter
from fused_lora.demo import folder, usable_device

MAKER = "fused-lora examples/t5_toxicity.py"  # its signature in what it writes


def add_lora(model: torch.nn.Module, rank: int = 8) -> torch.nn.Module:
    """LoRA on q and v of every attention layer, encoder and decoder, self and cross; all else is frozen."""
    return apply_lora(model, LoRAConfig(r=rank, lora_alpha=2 * rank, target_modules=["q", "v"]))


def read_csv(path: Path, text: str, label: str, rng: random.Random) -> tuple[list[Line], list[Line]]:
    """(lines to learn from, held-out fifth, at most 1000) of a CSV file. A text counts once, with its last label.

    Raises:
        ValueError: a column is missing; too few lines; labels that are none.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        for column in (text, label):
            if column not in columns:
                raise ValueError(f"{path} has no column {column!r} but {', '.join(columns)}: name it, see --help")
        try:
            found = {row[text].strip(): row[label].strip() for row in rows if row[text] and row[label]}
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num + 1}: {error}") from error
    lines = [Line(message, answer, f"labelled {answer}") for message, answer in found.items()]
    labels = len(set(found.values()))
    if len(lines) < 10 or not 2 <= labels <= 20:
        raise ValueError(f"{path} has {len(lines)} lines with {labels} labels: at least 10, and 2 to 20, are needed")
    rng.shuffle(lines)
    cut = min(1000, len(lines) // 5)
    return lines[cut:], lines[:cut]


def small_t5(lines: list[Line]) -> tuple[Any, Any]:
    """(model with random weights, tokenizer trained on the lines)"""
    texts = (f"toxicity: {line.text} {line.label}" for line in lines)
    tokenizer = byte_tokenizer(texts, "$A </s>", pad_token="<pad>", eos_token="</s>")
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)), tokenizer


def encode(tokenizer: Any, lines: list[Line], device: torch.device) -> dict[str, Tensor]:
    """A batch for the model. Where a label is padded stands -100, which the loss leaves out."""
    texts = [f"toxicity: {line.text}" for line in lines]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    answer = tokenizer(text_target=[line.label for line in lines], padding=True, return_tensors="pt")
    labels = answer["input_ids"].masked_fill(answer["attention_mask"] == 0, -100)
    tensors = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def train(
    model: Any, tokenizer: Any, lines: list[Line], steps: int, lr: float, rng: random.Random, what: str
) -> list[float]:
    """Train what requires a gradient, 32 lines a step; the loss of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    rise = 0.1 if steps > 10 else 0.0  # a rise of one step is a division by zero in torch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=rise)
    losses = []
    model.train()
    for _ in (bar := progress(range(steps), what)):
        loss = model(**encode(tokenizer, rng.sample(lines, min(32, len(lines))), model.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses


@torch.no_grad()
def answers(model: Any, tokenizer: Any, lines: list[Line]) -> list[str]:
    """What the model writes to each line. It is free to write anything: only the very label will count."""
    longest = max(len(ids) for ids in tokenizer(text_target=sorted({line.label for line in lines}))["input_ids"])
    written = []
    for start in progress(range(0, len(lines), 64), "answering held-out lines"):
        batch = encode(tokenizer, lines[start : start + 64], model.device)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        ids = model.generate(**inputs, max_new_tokens=longest + 1, do_sample=False)
        written += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return written


@torch.no_grad()
def logits(model: Any, tokenizer: Any, lines: list[Line], lora: bool = True) -> Tensor:
    """The model's outputs on up to 64 lines, with LoRA or with LoRA switched off."""
    for _, layer in lora_layers(model):
        layer.enabled = lora
    outputs = model(**encode(tokenizer, lines[:64], model.device)).logits
    for _, layer in lora_layers(model):
        layer.enabled = True
    return outputs


class Result(NamedTuple):
    """Held-out lines with the answers before and after, the loss of each LoRA step, claims and whether they hold."""

    lines: list[Line]
    before: list[str]
    after: list[str]
    losses: list[float]
    claims: dict[str, bool]


def run(args: argparse.Namespace) -> Result:
    """Train, ask before and after, save the adapter, check what is claimed."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    columns = (args.text_column, args.label_column)
    known, unseen = read_csv(args.data, *columns, rng) if args.data else game_chat(rng)
    base = args.model or args.out / "base"
    if not args.model:
        model, tokenizer = small_t5(general_speech() + known)
        train(
            model.to(args.device),
            tokenizer,
            general_speech(),
            args.base_steps,
            3e-3,
            rng,
            "general speech",
        )
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        sign(base, MAKER)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSeq2SeqLM.from_pretrained(base).to(args.device).eval()

    before, base_logits = answers(model, tokenizer, unseen), logits(model, tokenizer, unseen)
    add_lora(model, args.rank)
    print(f"LoRA on {sum(1 for _ in lora_layers(model))} layers: {count_parameters(model)}")
    losses = train(model, tokenizer, known, args.steps, args.lr, rng, "LoRA alone")
    after, tuned_logits = answers(model, tokenizer, unseen), logits(model, tokenizer, unseen)

    save_adapter(model, args.out / "adapter", overwrite=True)
    sign(args.out / "adapter", MAKER)
    fresh = AutoModelForSeq2SeqLM.from_pretrained(base).to(args.device).eval()
    load_adapter(fresh, args.out / "adapter")
    off, loaded = logits(model, tokenizer, unseen, lora=False), logits(fresh, tokenizer, unseen)
    claims = {
        "with LoRA switched off the outputs are the base model's": torch.equal(off, base_logits),
        "the saved adapter gives a fresh base model the same outputs": torch.equal(loaded, tuned_logits),
    }
    return Result(unseen, before, after, losses, claims)


def report(result: Result, path: Path) -> None:
    """Tables on stdout, and a figure at ``path``."""
    names, rows, shares = [], [], []
    for kind in [*dict.fromkeys(line.kind for line in result.lines), "all held-out lines"]:
        chosen = [i for i, line in enumerate(result.lines) if kind in (line.kind, "all held-out lines")]
        right = [sum(a[i] == result.lines[i].label for i in chosen) for a in (result.before, result.after)]
        names.append(kind)
        shares.append([(n / len(chosen), *wilson(n, len(chosen))) for n in right])
        rows.append([kind, len(chosen), *(f"{s:.1%} ({low:.0%} to {high:.0%})" for s, low, high in shares[-1])])
    table("Right answers, with 95 % confidence intervals", ["held-out lines", "n", "before", "after"], rows)
    label, most = Counter(line.label for line in result.lines).most_common(1)[0]
    print(f"Who always says {label!r} has {most / len(result.lines):.1%} right.")
    pairs = [(x.label == a, x.label == b) for x, a, b in zip(*result[:3], strict=True)]
    better, worse = pairs.count((False, True)), pairs.count((True, False))
    print(f"{better} answers became right and {worse} wrong: p = {mcnemar(better, worse):.1e} (exact McNemar test)")
    asked = [(x.text, x.label, a, b) for x, a, b in zip(*result[:3], strict=True) if a != b]
    table("Some answers that changed", ["line", "label", "before", "after"], asked[:: len(asked) // 6 + 1], 4)
    table("Bit for bit", ["claim", "holds"], [(c, "yes" if holds else "NO") for c, holds in result.claims.items()])

    with figure(path, MAKER, panels=2) as (bars, course):
        for i, color, name in ((0, GREY, "base model"), (1, BLUE, "with LoRA")):
            share, low, high = torch.tensor([pair[i] for pair in shares]).T
            error = torch.stack([share - low, high - share]).clamp(min=0).tolist()
            bars.barh(
                [y + 0.4 * i for y in range(len(names))], share.tolist(), 0.38, xerr=error, color=color, label=name
            )
        bars.set_yticks([y + 0.2 for y in range(len(names))], names)
        bars.invert_yaxis()
        bars.grid(axis="y", visible=False)
        bars.xaxis.set_major_formatter("{x:.0%}")
        bars.set_title("Right answers, 95 % intervals", loc="left")
        bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
        course.plot(result.losses, color=BLUE, linewidth=1)
        course.set_title("Loss", loc="left")
        course.set_xlabel("step of LoRA training")


def main(argv: list[str] | None = None) -> int:
    """0 where every claim holds, else 1; 2 where the arguments cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a T5 of the hub, or a folder; default: a small one, trained here")
    parser.add_argument("--data", type=Path, help="a CSV file of chat lines; default: lines that are made up here")
    parser.add_argument("--text-column", default="text", help="of the CSV file (%(default)s)")
    parser.add_argument("--label-column", default="label", help="of the CSV file (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (%(default)s)")
    parser.add_argument("--steps", type=int, help="of LoRA training, 32 lines each (400; with --quick 150)")
    parser.add_argument("--lr", type=float, help="of LoRA training, its peak (3e-3; with --model 1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:0; auto is a GPU if there is one")
    parser.add_argument("--out", type=folder, default=Path("demo-output/t5_toxicity"), help="folder (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="less training")
    args = parser.parse_args(argv)
    args.steps, args.base_steps = args.steps or (150 if args.quick else 400), 120 if args.quick else 300
    args.lr = args.lr or (1e-3 if args.model else 3e-3)
    try:
        args.device = usable_device(args.device)
        make_room(args.out, ("adapter", "answers.png", *([] if args.model else ["base"])), MAKER)
        result = run(args)
    except (ValueError, OSError) as error:  # a file or column that is not there, a model that is not
        parser.error(str(error))
    report(result, args.out / "answers.png")
    print(f"Wrote {args.out / 'adapter'} and {args.out / 'answers.png'}")
    return 0 if all(result.claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
