"""apply_lora through transformers.Trainer: checkpointing, bfloat16 autocast, accumulation, saving and resuming."""

import pytest
import torch
import transformers
from nets import train

from fused_lora import LoRAConfig, apply_lora, lora_layers, lora_parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    # What torch and accelerate say on a machine without an accelerator.
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*(lr_scheduler.step|autocast).*:UserWarning"),
]
STEPS, HALF = 4, 2
SIZES = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


class Sentences(torch.utils.data.Dataset):
    """Twenty sequences of nine tokens that rise by three, so that a few steps learn something."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        ids = torch.arange(9) * 3 + index % 4
        return {"input_ids": ids, "labels": ids.clone()}


def build(dropout):
    """The same base and the same factors, whatever was drawn before."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    model = transformers.LlamaForCausalLM(config)
    return apply_lora(model, LoRAConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear"))


class LossesAndGradients(transformers.TrainerCallback):
    """Loss and size of the gradient at every optimizer step, in full precision, and what has a gradient."""

    def __init__(self):
        self.losses, self.norms, self.with_gradient = [], [], set()

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.with_gradient |= gradients.keys()
        self.norms.append(sum(g.double().square().sum() for g in gradients.values()).sqrt().item())

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append((state.global_step, logs["loss"]))


def trainer_for(model, folder, reentrant, steps=STEPS, **settings):
    seen = LossesAndGradients()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        bf16=True,
        use_cpu=True,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=HALF,
        seed=3,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    return transformers.Trainer(model, arguments, train_dataset=Sentences(), callbacks=[seen]), seen


@pytest.mark.parametrize(("dropout", "reentrant"), [(0.0, False), (0.3, False), (0.3, True)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, dropout, reentrant):
    whole = build(dropout)
    frozen = {name: p.detach().clone() for name, p in whole.named_parameters() if not p.requires_grad}
    trainer, expected = trainer_for(whole, tmp_path / "whole", reentrant)
    trainer.train()
    assert [step for step, _ in expected.losses] == list(range(1, STEPS + 1))
    assert expected.losses[-1][1] < expected.losses[0][1]
    assert expected.with_gradient == {name for name, p in whole.named_parameters() if p.requires_grad}
    assert all(name.endswith(("lora_a", "lora_b")) for name in expected.with_gradient)
    assert all(torch.equal(whole.get_parameter(name), value) for name, value in frozen.items())

    resumed = train(build(dropout))  # other factors: what is resumed must come from the files
    trainer, found = trainer_for(resumed, tmp_path / "resumed", reentrant)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{HALF}"))
    assert found.losses == expected.losses[HALF:]
    assert found.norms == expected.norms[HALF:]
    for ours, theirs in zip(lora_parameters(resumed), lora_parameters(whole), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.float32


def test_checkpointing_and_accumulation_change_no_gradient(tmp_path):
    """One step over four sequences: whole batch or in parts, kept or recomputed, with the masks of a seed."""
    norms = []
    for checkpointing in (True, False):
        trainer, seen = trainer_for(build(0.3), tmp_path / str(checkpointing), False, steps=1)
        if not checkpointing:
            trainer.args.gradient_checkpointing = False
        trainer.train()
        norms += seen.norms
    assert norms[0] == norms[1] > 0


def test_evaluation_and_what_is_saved(tmp_path):
    model = build(0.3)
    trainer, _ = trainer_for(model, tmp_path, False)
    trainer.train()
    first, second = (trainer.evaluate(Sentences())["eval_loss"] for _ in range(2))
    assert first == second, "dropout rests in evaluation"
    trainer.save_model(tmp_path / "saved")
    saved = transformers.modeling_utils.load_state_dict(str(tmp_path / "saved" / "model.safetensors"))
    other = build(0.3)
    assert not other.load_state_dict(saved, strict=False).unexpected_keys
    for (_, ours), (_, theirs) in zip(lora_layers(other), lora_layers(model), strict=True):
        assert torch.equal(ours.lora_b, theirs.lora_b)
        assert ours.lora_b.any()
