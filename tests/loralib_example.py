"""Run microsoft/LoRA's own GPT-2 (examples/NLG) with loralib and with fused-lora's drop-in, and compare the two.

    python tests/loralib_example.py /path/to/LoRA

loralib has no tests; this is what its users run: its model file, unchanged, whose ``import loralib`` finds one library
or the other; fine-tuning; saving with ``lora_state_dict`` and loading into the other library's model; evaluation.
In float64, where the two can differ by the order of sums only; exits with 1 where they differ by more.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from fused_lora.compat import loralib as ours
from fused_lora.compat import route

SETTINGS = {"n_positions": 32, "n_ctx": 32, "n_embd": 48, "n_layer": 2, "n_head": 4, "lora_attn_dim": 4}
VOCABULARY, STEPS = 100, 20
BOUND = 1e-9  # 1e6 roundings of float64: the order of sums, not another formula


def example(root: Path, library: ModuleType) -> ModuleType:
    """The example's model file, imported with ``library`` as its loralib."""
    sys.modules["loralib"] = library
    spec = importlib.util.spec_from_file_location("example", root / "examples/NLG/src/model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fine_tune(model: torch.nn.Module, library: ModuleType, tokens: torch.Tensor) -> list[float]:
    """The losses of the example's recipe: only LoRA trains, AdamW, next token."""
    library.mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        _, loss = model(tokens[:, :-1], lm_labels=tokens[:, 1:].contiguous())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(root: Path) -> int:
    sys.path.insert(0, str(root))
    theirs = importlib.import_module("loralib")
    torch.set_default_dtype(torch.float64)
    counted = {"fused": 0}
    fused = route.fused

    def counting(*args):
        counted["fused"] += 1
        return fused(*args)

    route.fused = counting
    tokens = torch.randint(0, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(1))
    models, losses = [], []
    for library in (theirs, ours):
        module = example(root, library)
        torch.manual_seed(0)
        models.append(module.GPT2LMModel(module.GPT2Config(VOCABULARY, **SETTINGS)))
        losses.append(fine_tune(models[-1], library, tokens))
    differences = {"losses of a fine-tuning": max(abs(a - b) / a for a, b in zip(*losses, strict=True))}
    states = [theirs.lora_state_dict(models[0]), ours.lora_state_dict(models[1])]
    assert list(states[0]) == list(states[1])
    before = [model.eval()(tokens)[0] for model in models]
    for model, state in zip(models, reversed(states), strict=True):
        model.load_state_dict(state, strict=False)
    after = [model(tokens)[0] for model in models]
    differences["outputs in evaluation"] = (before[0] - before[1]).abs().max().item()
    differences["outputs with the other's checkpoint"] = max(
        (a - b).abs().max().item() for a, b in zip(after, reversed(before), strict=True)
    )
    print(f"loss {losses[1][0]:.4f} -> {losses[1][-1]:.4f} in {STEPS} steps; {counted['fused']} calls ran fused")
    for what, difference in differences.items():
        print(f"largest difference, {what}: {difference:.1e}")
    return 0 if counted["fused"] and losses[1][-1] < losses[1][0] and max(differences.values()) < BOUND else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
