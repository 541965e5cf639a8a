"""An existing PEFT training script, and the one line that makes it fused: transformers' Trainer, or TRL's SFTTrainer.

    model = get_peft_model(base, LoraConfig(...))
    patch_peft(model)                                  the one line; all else is as it was
    Trainer(model=model, ...).train()

The same run is made with the line and without it, with and without gradient checkpointing, and the loss curves are
compared. By default nothing is downloaded: a small Llama with random weights reads made-up chat.

Without dropout the curves must lie on each other within the accuracy rule: over all steps and seeds (at least 200
losses) the patched run is at most twice as far from a float64 run as PEFT's own, in the max and the RMS norm. With
dropout the masks differ, so runs are judged by statistics: over the seeds, the 99 % interval of the difference of the
final losses (patched - PEFT, same weights and same data order) must hold zero.

    python examples/trainer_peft.py
    python examples/trainer_peft.py --trainer trl
    python examples/trainer_peft.py --model HuggingFaceTB/SmolLM2-135M --data lines.txt --steps 200 --seeds 2
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _offline import byte_tokenizer, general_speech
from _show import BLUE, GREY, ORANGE, figure, make_room, progress, table
from torch import Tensor

from fused_lora import patch_peft

MAKER = "fused-lora examples/trainer_peft.py"  # its signature in what it writes
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Two-sided 99 % quantile of Student's t, by degrees of freedom; 2.58 is the normal's.
_STUDENT = (63.66, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17, 3.11, 3.05, 3.01, 2.98, 2.95)
_FEWEST = 200  # losses that the accuracy rule is judged by: norms of fewer compare accidents of rounding
WAYS = {"exact": "PEFT, float64", "peft": "PEFT", "patched": "patched"}


class Run(NamedTuple):
    """One training run."""

    way: str  # of WAYS
    dropout: float
    checkpointing: bool
    seed: int


def small_llama(tokenizer: Any, dtype: torch.dtype) -> Any:
    """A Llama with random weights, the same for the same global seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=64, **sizes, **special
    )
    return LlamaForCausalLM(config).to(dtype)


def read_lines(path: Path | None, batch: int) -> list[str]:
    """The lines of a text file that are not empty, or made-up chat.

    Raises:
        ValueError: fewer lines than a batch, or no UTF-8. OSError: the file cannot be read.
    """
    if path is None:
        return [f"toxicity: {line.text} {line.label}" for line in general_speech()]
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    if len(texts) < batch:
        raise ValueError(f"{path} has {len(texts)} lines: a batch of {batch} needs as many")
    return texts


class Job:
    """What all runs share: texts, tokenizer, base model, trainer, and sizes."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.dtype = getattr(torch, options.dtype)
        texts = read_lines(options.data, options.batch)
        random.Random(0).shuffle(texts)
        self.texts = texts[: options.batch * options.steps]
        if options.model:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(options.model)
            if self.tokenizer.pad_token is None:
                self.tokenizer.pad_token = self.tokenizer.eos_token
        else:
            self.tokenizer = byte_tokenizer(texts, "$A </s>", pad_token="<pad>", eos_token="</s>")

    def model(self, run: Run) -> Any:
        """The PEFT model of a run, patched where the run says so. Weights depend on the seed alone."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(run.seed)
        if self.options.model:
            base = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=self.dtype)
        else:
            base = small_llama(self.tokenizer, self.dtype)
        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=run.dropout, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        if run.way == "exact":
            return model.double()
        if run.way == "patched":
            self.report = patch_peft(model, strict=True)
        return model

    def arguments(self, run: Run, directory: str) -> dict[str, Any]:
        """What both trainers are told; everything that PEFT's users set themselves stays theirs."""
        return {
            "output_dir": directory,
            "per_device_train_batch_size": self.options.batch,
            "max_steps": self.options.steps,
            "learning_rate": self.options.lr,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": run.checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False} if run.checkpointing else None,
            "seed": run.seed,
            "data_seed": run.seed,
            "bf16": False,  # the regime is the model's; --dtype chooses it
            "use_cpu": self.options.cpu,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }

    def train(self, run: Run, bar: Any) -> list[float]:
        """The loss of every step."""
        from transformers import PrinterCallback

        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecations inside the trainers
            make = _sft_trainer if self.options.trainer == "trl" else _trainer
            trainer = make(self, self.model(run), self.arguments(run, directory))
            trainer.remove_callback(PrinterCallback)  # the bar shows the loss
            trainer.losses, trainer.bar = [], bar
            trainer.train()
        return trainer.losses


class Recording:
    """Keeps the loss of every step as it is: the trainers' own logs are rounded."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.losses.append(loss.item())
        self.bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
        self.bar.update()
        return loss


def _trainer(job: Job, model: Any, arguments: dict[str, Any]) -> Any:
    """transformers' Trainer over tokenized lines."""
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    class RecordingTrainer(Recording, Trainer):
        pass

    encoded = job.tokenizer(job.texts, truncation=True, max_length=job.options.length)
    lines = Dataset.from_dict({"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]})
    collator = DataCollatorForLanguageModeling(job.tokenizer, mlm=False)
    return RecordingTrainer(
        model=model, args=TrainingArguments(**arguments), train_dataset=lines, data_collator=collator
    )


def _sft_trainer(job: Job, model: Any, arguments: dict[str, Any]) -> Any:
    """TRL's SFTTrainer over the lines themselves; it takes the patched PEFT model as it is."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from trl import SFTConfig, SFTTrainer

    class RecordingTrainer(Recording, SFTTrainer):
        pass

    disable_progress_bar()
    lines, config = Dataset.from_dict({"text": job.texts}), SFTConfig(max_length=job.options.length, **arguments)
    return RecordingTrainer(model=model, args=config, train_dataset=lines, processing_class=job.tokenizer)


# ---- judging


def distance(curves: list[list[float]], exact: list[list[float]]) -> tuple[float, float]:
    """(max norm, RMS norm) of curves - exact, over all steps of all seeds."""
    difference = torch.tensor(curves, dtype=torch.float64) - torch.tensor(exact, dtype=torch.float64)
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def within_rule(patched: list[list[float]], peft: list[list[float]], exact: list[list[float]]) -> bool:
    """The accuracy rule on loss curves: at most twice as far from float64 as PEFT's own, in both norms."""
    return all(ours <= 2 * theirs for ours, theirs in zip(distance(patched, exact), distance(peft, exact), strict=True))


def final(losses: list[float]) -> float:
    """Mean loss of the last quarter of a run."""
    last = losses[-max(len(losses) // 4, 1) :]
    return sum(last) / len(last)


def interval(patched: list[list[float]], peft: list[list[float]]) -> tuple[float, float]:
    """99 % interval of the mean of final(patched) - final(PEFT), paired by seed."""
    differences = [final(ours) - final(theirs) for ours, theirs in zip(patched, peft, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    half = (_STUDENT[n - 2] if n - 2 < len(_STUDENT) else 2.58) * deviation / math.sqrt(n)
    return mean - half, mean + half


def runs(options: argparse.Namespace) -> list[Run]:
    """Every run; float64 only where it is the truth of a comparison and the model is small."""
    chosen = []
    for dropout, checkpointing in itertools.product((0.0, options.dropout), (False, True)):
        ways = ["exact", *WAYS][-3:] if not dropout and not options.model else ["peft", "patched"]
        chosen += [Run(way, dropout, checkpointing, seed) for way in ways for seed in range(options.seeds)]
    return chosen


def judge(curves: dict[Run, list[float]], options: argparse.Namespace) -> list[list[str]]:
    """A row of the table per dropout and checkpointing; the last cell says whether the curves agree."""
    rows = []
    for dropout, checkpointing in itertools.product((0.0, options.dropout), (False, True)):
        of = {w: [curves.get(Run(w, dropout, checkpointing, seed), []) for seed in range(options.seeds)] for w in WAYS}
        losses = [f"{sum(map(final, of[way])) / options.seeds:.4f}" for way in ("peft", "patched")]
        if dropout:
            low, high = interval(of["patched"], of["peft"])
            found, agree = f"difference, 99 %: {low:+.4f} to {high:+.4f}", low <= 0 <= high
        elif options.model:
            (largest, _), agree = distance(of["patched"], of["peft"]), None
            found = f"largest difference {largest:.1e}"
        else:
            ours, theirs = distance(of["patched"], of["exact"]), distance(of["peft"], of["exact"])
            found = f"from float64, max: {ours[0]:.1e}, PEFT {theirs[0]:.1e}; RMS: {ours[1]:.1e}, PEFT {theirs[1]:.1e}"
            agree = (
                within_rule(of["patched"], of["peft"], of["exact"])
                if options.steps * options.seeds >= _FEWEST
                else None
            )
        verdict = {True: "yes", False: "NO", None: "not judged"}[agree]
        rows.append([f"{dropout:g}", "on" if checkpointing else "off", *losses, found, verdict])
    return rows


def draw(curves: dict[Run, list[float]], options: argparse.Namespace, path: Path) -> None:
    """The curves without checkpointing: one panel per dropout."""
    with figure(path, MAKER, panels=2) as axes:
        for ax, dropout in zip(axes, (0.0, options.dropout), strict=True):
            for way, color, style in (("exact", GREY, "-"), ("peft", ORANGE, "-"), ("patched", BLUE, "--")):
                shown = [losses for run, losses in curves.items() if run[:3] == (way, dropout, False)]
                for i, losses in enumerate(shown):
                    label = WAYS[way] if i == 0 else None
                    ax.plot(
                        range(1, len(losses) + 1), losses, style, color=color, alpha=0.8, linewidth=1.2, label=label
                    )
            ax.set(title=f"dropout {dropout:g}, {options.seeds} seeds", xlabel="step", ylabel="loss")
            ax.legend(frameon=False)


def check(options: argparse.Namespace) -> None:
    """Find what would stop the runs, before any; makes the folder of the figure.

    Raises:
        ValueError, OSError: a value out of range, lines that cannot be had, a figure that would replace a user's own.
    """
    least = {"seeds": 2, "steps": 1, "batch": 1, "length": 2}  # of one token nothing follows that could be learnt
    for name, fewest in least.items():
        if (value := getattr(options, name)) < fewest:
            raise ValueError(f"--{name} must be at least {fewest}, got {value}")
    if not 0 < options.dropout < 1:
        raise ValueError(f"--dropout must be between 0 and 1, got {options.dropout:g}")
    if not 0 < options.lr < math.inf:
        raise ValueError(f"--lr must be a number above 0, got {options.lr:g}")
    if options.output.suffix != ".png":
        raise ValueError(f"--output must be a PNG file, its name ending in .png, got {str(options.output)!r}")
    read_lines(options.data, options.batch)
    make_room(options.output.parent, [options.output.name], MAKER)


def command() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=("transformers", "trl"), default="transformers")
    parser.add_argument("--model", help="a causal language model of the hub, or a folder (default: a small Llama)")
    parser.add_argument("--data", type=Path, help="a text file, one example per line (default: made-up chat)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base model")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the runs with dropout (default: 0.1)")
    parser.add_argument("--steps", type=int, help="of every run (default: 60; with --quick 6)")
    parser.add_argument("--seeds", type=int, help="runs of every kind (default: 5; with --quick 2)")
    parser.add_argument("--batch", type=int, help="lines of a step (default: 8; with --quick 4)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a line at most (default: 64)")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate (default: 3e-3)")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs")
    parser.add_argument("--output", type=Path, default=Path("trainer_peft.png"), help="the figure (PNG)")
    return parser


def parse(arguments: list[str] | None, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; those that are not given as --quick or a whole run has them."""
    options = parser.parse_args(arguments)
    usual = {"steps": 6, "seeds": 2, "batch": 4} if options.quick else {"steps": 60, "seeds": 5, "batch": 8}
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    try:
        check(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    parser = command()
    options = parse(arguments, parser)
    try:
        job = Job(options)
    except (ValueError, OSError) as error:  # a tokenizer that is not there
        parser.error(f"--model {options.model}: {error}")
    chosen = runs(options)
    curves = {}
    with progress((), f"{len(chosen)} runs", total=len(chosen) * options.steps) as bar:
        for run in chosen:
            curves[run] = job.train(run, bar)
    print(job.report)
    rows = judge(curves, options)
    title = f"Final loss, {options.trainer}, {options.dtype} base, mean of {options.seeds} seeds"
    columns = ["dropout", "checkpointing", "PEFT", "patched", "the curves", "agree"]
    table(title, columns, rows, text_columns=2)
    draw(curves, options, options.output)
    print(f"loss curves: {options.output}")
    return int(any(row[-1] == "NO" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
