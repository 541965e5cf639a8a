"""Stand-ins for the small models that PEFT's tests ask the hub for: the same names and classes, random weights.

    python tests/peft_standins.py /tmp/hub && HF_HUB_CACHE=/tmp/hub python tests/peft_judge.py /path/to/peft ...

fills a hub cache, so that those tests run without a download. What a test expects of the real weights may fail, on both
sides alike: ``peft_judge.py`` compares the two.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_COMMIT = "0" * 40
_TEXT = ("the quick brown fox jumps over the lazy dog", "hello world", "what is the capital of France?", "1 2 3 4")
_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 37}
_LLAMA = _SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 512}
_OPT = _SMALL | {"ffn_dim": 37, "word_embed_proj_dim": 32, "max_position_embeddings": 512}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_T5 = {"d_model": 32, "d_ff": 37, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}
_BART = {"d_model": 32, "max_position_embeddings": 512, "decoder_start_token_id": 2} | {
    f"{side}_{what}": value
    for side in ("encoder", "decoder")
    for what, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 37))
}
_ROPE = {"rotary_dim": 4}
# Name on the hub: the class of transformers, and what its configuration says beyond the vocabulary.
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", _OPT | {"num_hidden_layers": 12}),
    "facebook/opt-125m": ("OPTForCausalLM", _OPT | {"num_hidden_layers": 12}),
    "hf-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT),
    "hf-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", _GPT | _ROPE),
    "hf-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", _GPT | _ROPE),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", _SMALL),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("BloomForCausalLM", {"hidden_size": 32, "n_head": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "Qwen/Qwen2-0.5B": ("Qwen2ForCausalLM", _LLAMA),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", _LLAMA | {"head_dim": 8}),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _BART),
    "ybelkada/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _SMALL),
    "hf-internal-testing/tiny-random-BertModel": ("BertModel", _SMALL),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _SMALL),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", _SMALL),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _SMALL),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _SMALL),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", _SMALL),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", _LLAMA),
}


def tokenizer():
    """A byte-level tokenizer that spells any text; its special tokens are 0 to 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special.values()), initial_alphabet=alphabet)
    made.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def fill(cache: Path) -> None:
    """Write every model of ``MODELS`` into a hub cache at ``cache``; a class this transformers lacks is left out."""
    import transformers

    words = tokenizer()
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name, (kind, sizes) in MODELS.items():
        model_class = getattr(transformers, kind, None)
        if model_class is None:
            print(f"left out: {name}: no {kind} in transformers {transformers.__version__}")
            continue
        torch.manual_seed(0)
        config = model_class.config_class(vocab_size=1024, **special, **sizes)
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / _COMMIT
        model_class(config).save_pretrained(snapshot)
        words.save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(_COMMIT)


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
