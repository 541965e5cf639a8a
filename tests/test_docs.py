"""The Python blocks of README.md and of docs/ run, with small models in the place of the hub's; what stands beside them
as output is what they print; the counts of docs/models.md and the links are right.

A block sees what a reader of its page has: the imports of the blocks above it, the names of its own section, and what
``GIVEN`` puts in the place of the reader's own (a model, a batch, a file). Nothing of a block is replaced but
``bf16=True`` of Trainer, which would look for a GPU.
"""

import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from test_models import LABELS, MODELS

from fused_lora import (
    LoRAConfig,
    apply_lora,
    cli,
    count_parameters,
    lora_layers,
    patch_peft,
    remove_lora,
    save_adapter,
)
from fused_lora.compat import torchtitan

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for folder in (".", "docs", "bench", "examples") for path in (ROOT / folder).glob("*.md"))
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
# Heading: its section, without the smaller ones below it.
SECTIONS = {
    page: {section.splitlines()[0]: section for section in re.split(r"\A# |^##+ ", text, flags=re.M) if section.strip()}
    for page, text in PAGES.items()
}
RECIPES = [(page, title) for page, titles in SECTIONS.items() for title, text in titles.items() if "```python" in text]
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


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def network(kind="llama"):
    """A small model with random weights, the same ones every time."""
    torch.manual_seed(0)
    return MODELS[kind]()[0]


@pytest.fixture
def hub(monkeypatch):
    """from_pretrained gives a small model, the same for the same name."""

    def loader(kind):
        return lambda name, dtype=torch.float32, **settings: network(kind(name)).to(dtype)

    for name, kind in LOADERS.items():
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", loader(kind))


def recipe_names():
    """docs/models.md: a model, a batch, a dataset."""
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
    return {"torch": torch, "re": re, "lora_layers": lora_layers, "batch": batch, "dataset": dataset, "model": plain()}


def plain():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))


def operands():
    """x (5, 8), W (6, 8), A (3, 8), B (6, 3), what else ``lora_linear`` takes."""
    shapes = {"x": (5, 8), "weight": (6, 8), "lora_a": (3, 8), "lora_b": (6, 3), "bias": (6,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {"scale": 2.0}


def state_dicts():
    """Files and state dicts as loralib and torchtune write them, for the small Llama and the small GPT-2."""
    q = "model.layers.0.self_attn.q_proj"
    torch.save({f"{q}.lora_A": torch.randn(4, 32), f"{q}.lora_B": torch.randn(32, 4)}, "lora.pt")
    merged = {
        f"transformer.h.{i}.attn.c_attn.lora_{part}": torch.randn(shape)
        for i in (0, 1)
        for part, shape in (("A", (8, 32)), ("B", (64, 4)))
    }
    tuned = {f"{q}.lora_a.weight": torch.randn(4, 32), f"{q}.lora_b.weight": torch.randn(32, 4)}
    own = {"loralib_state": merged, "torchtune_state": tuned, "gpt2": network("gpt2")}
    return own | {"network": network(), "other_network": network()}


def peft_model():
    """A Llama of two layers, LoRA on its 14 linear layers and on its embedding."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]
    return get_peft_model(network(), LoraConfig(r=4, target_modules=targets))


# What the reader has before a section starts; a page stands for all its sections.
GIVEN = {
    "docs/models.md": recipe_names,
    "Quickstart": operands,
    "One line for PEFT": lambda: {"model": peft_model()},
    "Any model, many tasks": lambda: {"model": network(), "net": plain(), "x": torch.randn(3, 4)},
    "PEFT models": lambda: {"base": network()},
    "Adapter files": lambda: {name: network() for name in ("network", "fresh_network", "other_network")},
    "loralib and torchtune": state_dicts,
}


@pytest.fixture
def others(monkeypatch):
    """Stand-ins for what the tests cannot install: axolotl's plugins, torchtitan's converter."""

    class Converter:
        @dataclass(kw_only=True, slots=True)
        class Config:
            rank: int
            alpha: float
            target_modules: list[str]

    modules = {
        "axolotl.integrations.base": types.SimpleNamespace(BasePlugin=object),
        "torchtitan.components.lora": types.SimpleNamespace(LoRAConverter=Converter),
    }
    for name, module in modules.items():
        package, middle, _ = name.split(".")
        for path in (package, f"{package}.{middle}"):
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        monkeypatch.setitem(sys.modules, name, module)
    torchtitan._converter.cache_clear()
    yield
    torchtitan._converter.cache_clear()


@pytest.mark.parametrize(("page", "title"), RECIPES)
def test_recipe(page, title, hub, others, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = GIVEN.get(page, GIVEN.get(title, dict))()
    if "Whisper" in title or "T5" in title:
        names["batch"]["labels"] = LABELS
    above = PAGES[page].split(SECTIONS[page][title])[0]
    for block in blocks(above, "python"):
        exec("\n".join(re.findall(r"^(?:from|import) .*$", block, re.M)), names)
    for block in blocks(SECTIONS[page][title], "python"):
        block = block.replace("bf16=True", "bf16=True, use_cpu=True")  # which nobody wants who has a GPU
        exec(compile(block, f"{page}, {title}", "exec"), names)


def test_the_plugin_for_axolotl_fuses(others, capsys):
    (block,) = blocks(SECTIONS["docs/peft.md"]["axolotl"], "python")
    names = {}
    exec(block, names)
    names["FusedLoRA"]().post_lora_load(None, peft_model())
    assert "14 of 15 LoRA layers fused" in capsys.readouterr().out


def shows(printed, text):
    """Whether ``text`` is ``printed``, but for lines that an indented "..." stands for."""
    pattern = re.escape(text.strip()).replace(re.escape("    ..."), r"(?:    .*\n?)+?")
    return re.fullmatch(pattern, printed.strip()) is not None


def test_reports_of_patch_peft_as_printed():
    (shown,) = blocks(SECTIONS["README.md"]["One line for PEFT"], "text")
    model = peft_model()
    assert shows(str(patch_peft(model)), shown)
    model.add_adapter("head", LoraConfig(r=4, target_modules=["lm_head"]))
    (shown,) = blocks(SECTIONS["docs/peft.md"]["The report"], "text")
    assert shows(str(patch_peft(model)), shown)


def test_report_of_check_as_printed(capsys, tmp_path, monkeypatch):
    """An adapter of two layers that lacks one factor, checked against a model of one layer."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    model = apply_lora(network(), LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    save_adapter(model, "my-adapter")
    path = "my-adapter/adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    del state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    save_file(state, path, metadata=metadata)
    model.config.num_hidden_layers, model.config.architectures = 1, ["LlamaForCausalLM"]
    model.config.save_pretrained("llama")
    (shown,) = blocks(SECTIONS["docs/adapters.md"]["The command"], "text")
    command, _, shown = shown.partition("\n")
    assert command.startswith("$ fused-lora check ")
    capsys.readouterr()
    assert cli.main(command.split()[2:]) == 1
    assert shows(capsys.readouterr().out, shown)


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


# What transformers 4 calls ViT's layers, as docs/models.md says below the table.
OLDER = {"q_proj": "query", "v_proj": "value"}


@pytest.mark.parametrize("name", CONFIGS)
def test_counts(name):
    row = next(line for line in PAGES["docs/models.md"].splitlines() if line.startswith(f"| {name} |"))
    _, total, targets, *cells = [cell.strip() for cell in row.strip("|").split("|")]
    with torch.device("meta"):
        model = CONFIGS[name]()
    found = [f"{count_parameters(model).total:,}"]
    held = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    documented = [target if target in held else OLDER[target] for target in re.findall(r"`(\w+)`", targets)]
    for chosen in (documented, "all-linear"):
        apply_lora(model, LoRAConfig(r=8, target_modules=chosen))
        count = count_parameters(model)
        found += [str(len(list(lora_layers(model)))), f"{count.lora:,}", f"{100 * count.lora / count.total:.2f} %"]
        remove_lora(model)
    assert found == [total, *cells]


ELSEWHERE = (
    "tests/torchtune/",
    "tests/unit_tests/",
    "examples/NLG",
)  # in the libraries' own repositories


def anchor(heading):
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, fragment in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", PAGES[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if fragment:
            text = path.read_text()
            assert fragment in [anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)], fragment
    for name in re.findall(r"`((?:tests|examples|bench|docs)/[\w./-]*)`", PAGES[page]):
        assert name.startswith(ELSEWHERE) or (ROOT / name).exists(), name
