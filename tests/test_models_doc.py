"""docs/models.md: its recipes run, with small models in the place of the hub's, and its counts are right."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from test_models import LABELS, MODELS

from fused_lora import LoRAConfig, apply_lora, count_parameters, lora_layers, remove_lora

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "models.md").read_text()
SECTIONS = {section.splitlines()[0]: section for section in re.split(r"\A# |^##+ ", TEXT, flags=re.M)[1:]}
RECIPES = [title for title, section in SECTIONS.items() if "```python" in section]
# What the recipes call, and which of the small models it gives.
LOADERS = {
    "AutoModelForCausalLM": lambda name: "gpt2" if "gpt2" in name else "llama",
    "AutoModelForSeq2SeqLM": lambda name: "t5",
    "AutoModelForSequenceClassification": lambda name: "bert",
    "AutoModelForImageClassification": lambda name: "vit",
    "AutoModelForSpeechSeq2Seq": lambda name: "whisper",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*share one weight:UserWarning"),
]


@pytest.fixture
def hub(monkeypatch):
    """from_pretrained gives a small model, the same for the same name."""

    def loader(kind):
        def from_pretrained(name, dtype=torch.float32, **settings):
            torch.manual_seed(0)
            return MODELS[kind(name)]()[0].to(dtype)

        return from_pretrained

    for name, kind in LOADERS.items():
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", loader(kind))


@pytest.fixture
def names():
    """What stands for the reader's own: a model, a batch, a dataset."""
    ids = torch.arange(2, 20).reshape(2, 9)

    class Batch(dict):
        """Language models get their two entries with ``**batch``; the others take theirs by name."""

        def keys(self):
            return ["input_ids", "labels"]

    batch = Batch(
        input_ids=ids,
        labels=ids,
        classes=torch.tensor([0, 1]),
        pixel_values=torch.rand(2, 3, 16, 16),
        input_features=torch.rand(2, 8, 20),
        sequences=torch.rand(2, 5, 16),
    )
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    return {"torch": torch, "re": re, "lora_layers": lora_layers, "batch": batch, "dataset": dataset, "model": model}


@pytest.mark.parametrize("title", RECIPES)
def test_recipe(title, hub, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "Whisper" in title or "T5" in title:
        names["batch"]["labels"] = LABELS
    imports = "\n".join(re.findall(r"^from (?:fused_lora|transformers).* import .*$", TEXT, re.M))
    exec(imports, names)
    for block in re.findall(r"```python\n(.*?)```", SECTIONS[title], re.S):
        block = block.replace("bf16=True", "bf16=True, use_cpu=True")  # which nobody wants who has a GPU
        exec(compile(block, f"docs/models.md, {title}", "exec"), names)


CONFIGS = {
    "Llama-3.2-1B": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            tie_word_embeddings=True,
        )
    ),
    "T5-small": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=512, d_ff=2048, num_layers=6)
    ),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
    "BERT-base": lambda: transformers.BertForSequenceClassification(transformers.BertConfig()),
    "ViT-B/16": lambda: transformers.ViTForImageClassification(transformers.ViTConfig()),
    "Whisper-tiny": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            d_model=384,
            encoder_layers=4,
            decoder_layers=4,
            encoder_attention_heads=6,
            decoder_attention_heads=6,
            encoder_ffn_dim=1536,
            decoder_ffn_dim=1536,
        )
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_counts(name):
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| {name} |"))
    _, total, targets, *cells = [cell.strip() for cell in row.strip("|").split("|")]
    with torch.device("meta"):
        model = CONFIGS[name]()
    found = [f"{count_parameters(model).total:,}"]
    for chosen in (re.findall(r"`(\w+)`", targets), "all-linear"):
        apply_lora(model, LoRAConfig(r=8, target_modules=chosen))
        count = count_parameters(model)
        found += [str(len(list(lora_layers(model)))), f"{count.lora:,}", f"{100 * count.lora / count.total:.2f} %"]
        remove_lora(model)
    assert found == [total, *cells]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([\w./]+)\)", TEXT):
        assert (Path(__file__).resolve().parent.parent / "docs" / target).is_file(), target
    for name in re.findall(r"`((?:tests|examples)/[\w./]*)`", TEXT):
        assert (Path(__file__).resolve().parent.parent / name).exists(), name
