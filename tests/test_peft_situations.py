"""Patched PEFT models in the situations users bring: whole models, every variant, frozen parts.

A result is PEFT's bit for bit where PEFT's forward runs and obeys the accuracy rule where the fused one does.
``test_peft_rows.py`` says which test covers which situation.
"""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import variants
from peft_models import K, N, Run, assert_accurate, layers, patched_copy, peft_model, randomize, run
from test_models import llama
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lora import patch_peft, peft_parts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
DRAWS = 6
X = torch.randn(7, K, generator=torch.Generator().manual_seed(2))
DY = torch.randn(7, 3 * N, generator=torch.Generator().manual_seed(1))
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


class Logits(nn.Module):
    """A language model from its embeddings to its logits, so that x has a gradient; (2, 9, 32) -> (2, 9, 61)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(inputs_embeds=x).logits


def inputs():
    return torch.randn(40, K), torch.randn(40, 3 * N)


def llama_inputs():
    return torch.randn(2, 9, 32), torch.randn(2, 9, 61)


def peft_llama(seed=0, train=True, **config):
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]} | config
    model = get_peft_model(llama()[0], LoraConfig(**config))
    randomize(model)
    return model.train(train)


def draws_of(make, inputs=inputs, check=lambda report: None, call=lambda m: m):
    """(ours, PEFT's, the truth) of DRAWS models."""
    draws = []
    for seed in range(DRAWS):
        ours, plain, truth = make(seed), make(seed), make(seed).double()  # tied factors cannot be copied
        check(patch_peft(ours))
        x, dy = inputs()
        wide = run(call(truth), x.double(), dy.double())
        draws.append((run(call(ours), x, dy), run(call(plain), x, dy), wide))
    return draws


def all_fused(report):
    assert report.fused == len(report.layers) > 0, report


PATTERNS = {"rank_pattern": {"down_proj": 7}, "alpha_pattern": {"layers.1.self_attn.q_proj": 11}}


@pytest.mark.parametrize("config", [{}, PATTERNS, {"use_rslora": True} | PATTERNS], ids=lambda config: "+".join(config))
def test_a_whole_llama(config):
    assert_accurate(draws_of(lambda seed: Logits(peft_llama(seed, **config)), llama_inputs, all_fused))


# PEFT's class for each variant of lora.Linear beside DoRA, and what LoraConfig is given for it.
VARIANTS = {
    "ALoraLinearVariant": lambda: {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
    "ArrowLinearVariant": lambda: {"arrow_config": lora.ArrowConfig(top_k=1)},
    "BdLoraLinearVariant": lambda: {"use_bdlora": lora.BdLoraConfig(["q_proj"], ["v_proj", "down_proj"], nblocks=2)},
    "VeloraLinearVariant": lambda: {"velora_config": lora.VeloraConfig(num_groups=4)},
    "MontecloraLinearVariant": lambda: {"monteclora_config": lora.MontecloraConfig(num_samples=2, buffer_size=3)},
    "MiCALinearVariant": lambda: {"init_lora_weights": "mica"},
    "KasaLinearVariant": lambda: {"kasa_config": lora.KasaConfig()},
}


def arrow_llama(arrow_config):
    """Arrow routes between two further adapters."""
    model, settings = peft_llama(), {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model.add_adapter("task", LoraConfig(**settings))
    randomize(model)
    arrow_config.task_adapter_names, arrow_config.gks_adapter_names = ["default", "task"], []
    model.add_adapter("router", LoraConfig(**settings, arrow_config=arrow_config))
    model.set_adapter("router")
    return model


@pytest.mark.parametrize("kind", VARIANTS)
def test_variants_run_peft_s_forward(kind):
    if not hasattr(variants, kind):
        pytest.skip(f"PEFT {peft.__version__} does not have this variant")
    config = VARIANTS[kind]()
    model = arrow_llama(**config) if "arrow_config" in config else peft_llama(**config)
    ours, report = patched_copy(model)
    assert {status.reason for status in report.layers} == {peft_parts.VARIANT}
    ids, results = torch.arange(18).reshape(2, 9), []
    for m in (ours, model):
        torch.manual_seed(4)
        loss = m(input_ids=ids, labels=ids).loss
        if loss.requires_grad:
            loss.backward()
        results.append({"loss": loss.detach()} | {n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(t, results[1][name]) for name, t in results[0].items())


def tied_llama(seed):
    """LoRA on the embedding and on the output head that is tied to it: one pair of factors, seen transposed."""
    torch.manual_seed(seed)
    model, _ = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    targets = ["q_proj", "embed_tokens", "lm_head"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, ensure_weight_tying=True))
    randomize(model)
    table, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    if head.lora_A["default"].weight.data_ptr() != table.lora_embedding_B["default"].data_ptr():
        pytest.skip(f"PEFT {peft.__version__} does not tie the factors")
    assert not head.lora_A["default"].weight.is_contiguous()
    return Logits(model)


def test_tied_adapters_of_a_tied_llama():
    def check(report):
        assert {(status.layer, status.state) for status in report.layers} == {
            ("lora.Embedding", "peft"),
            ("lora.Linear", "fused"),
        }

    draws = draws_of(tied_llama, llama_inputs, check)
    assert any("lm_head.lora_A" in name for name in draws[0][0].results)
    assert_accurate(draws)


@pytest.mark.parametrize("active", [["default", "elsewhere"], ["elsewhere", "default"]], ids="-".join)
def test_an_active_adapter_that_only_some_layers_have(active):
    """It is skipped on q and k, which run the other adapter alone, and v runs both."""

    def make(seed):
        model = peft_model(seed=seed)
        model.add_adapter("elsewhere", LoraConfig(target_modules=["v"], r=2))
        randomize(model)
        model.base_model.set_adapter(active)
        return model

    assert_accurate(draws_of(make, check=all_fused))


def test_an_active_adapter_that_the_layer_lacks():
    """q and k run their base layers alone, bit for bit as in PEFT; v is fused."""
    draws = []
    for seed in range(DRAWS):
        model = peft_model(seed=seed)
        model.add_adapter("elsewhere", LoraConfig(target_modules=["v"], r=2))
        randomize(model)
        model.set_adapter("elsewhere")
        ours, report = patched_copy(model)
        assert [status.state for status in report.layers] == ["base", "base", "fused"]
        x, dy = inputs()
        draws.append((run(ours, x, dy), run(model, x, dy), run(copy.deepcopy(model).double(), x.double(), dy.double())))
        assert torch.equal(draws[-1][0].results["y"][:, : 2 * N], draws[-1][1].results["y"][:, : 2 * N])
    assert_accurate(draws)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "x", "all"])
def test_only_the_gradients_asked_for(frozen):
    """The same gradients exist as in PEFT, with the same values to the accuracy rule."""
    draws = []
    for seed in range(DRAWS):
        model = peft_model(seed=seed, bias="all")
        for name, parameter in model.named_parameters():
            if frozen == "all" or frozen in name:
                parameter.requires_grad_(False)
        ours, _ = patched_copy(model)
        x, dy = torch.randn(300, K), torch.randn(300, 3 * N)
        if frozen != "x":
            truth = run(copy.deepcopy(model).double(), x.double(), dy.double())
            draws.append((run(ours, x, dy), run(model, x, dy), truth))
            continue
        runs = []
        for m, dtype in ((ours, x.dtype), (model, x.dtype), (copy.deepcopy(model).double(), torch.float64)):
            leaf = torch.zeros((), dtype=dtype, requires_grad=True)  # run() wants a gradient of what it is given
            runs.append(run(Constant(m, x.to(dtype)), leaf, dy.to(dtype)))
        draws.append(tuple(runs))
    asked = {name.partition(".default")[0][-6:] for name in draws[0][0].results if "lora_" in name}
    assert asked == {"lora_A", "lora_B"} - ({"lora_A", "lora_B"} if frozen == "all" else {frozen})
    assert_accurate(draws)


class Constant(nn.Module):
    """A model of an x that wants no gradient; the argument only takes part."""

    def __init__(self, model, x):
        super().__init__()
        self.model, self.x = model, x

    def forward(self, leaf):
        y = self.model(self.x)
        assert y.requires_grad
        return y + 0 * leaf


def test_autocast_of_a_16_bit_x_over_a_float32_base():
    """What a layer gets that comes after another one under autocast."""
    draws = []
    for seed in range(DRAWS):
        model = peft_model(seed=seed)
        x, dy = torch.randn(300, K).to(BF16), torch.randn(300, 3 * N).to(BF16)
        ours, report = patched_copy(model)
        all_fused(report)
        truth = run(copy.deepcopy(model).double(), x.double(), dy.double())
        draws.append((run(ours, x, dy, BF16), run(model, x, dy, BF16), truth))
    assert_accurate(draws)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_as_peft(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=reentrant)

    assert_accurate(draws_of(lambda seed: peft_model(seed=seed), check=all_fused, call=Checkpointed))
    model, results = peft_model(lora_dropout=0.3), []
    for m in (patched_copy(model, dropout="torch")[0], model):
        torch.manual_seed(9)
        results.append(run(Checkpointed(m), X, DY))
    assert results[0].equals(results[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_llama_that_checkpoints_itself(reentrant):
    """transformers' own gradient checkpointing, block by block in training mode."""
    draws = []
    for seed in range(DRAWS):
        model = peft_llama(seed)
        ours, report = patched_copy(model)
        all_fused(report)
        for m in (model, ours):
            m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        x, dy = llama_inputs()
        truth = run(Logits(copy.deepcopy(model).double()), x.double(), dy.double())
        draws.append((run(Logits(ours), x, dy), run(Logits(model), x, dy), truth))
    assert_accurate(draws)


def test_a_llama_compiles_to_one_graph_as_in_peft():
    model = Logits(peft_llama())
    ours, report = patched_copy(model)
    all_fused(report)
    explained = [torch._dynamo.explain(m)(llama_inputs()[0]) for m in (ours, model)]
    assert [(e.graph_count, e.graph_break_count) for e in explained] == [(1, 0)] * 2
    assert_accurate_compiled(ours, model, llama_inputs, "aot_eager")


def test_inductor():
    model = peft_model()
    ours, _ = patched_copy(model)
    assert_accurate_compiled(ours, model, inputs, "inductor")


def assert_accurate_compiled(ours, plain, inputs, backend):
    """The accuracy rule on the compiled models, several inputs."""
    truth, draws = copy.deepcopy(plain).double(), []
    compiled = [torch.compile(m, backend=backend, fullgraph=True) for m in (ours, plain)]
    for _ in range(DRAWS):
        x, dy = inputs()
        results = [run(m, x, dy).results for m in compiled]
        results = [Run({name.replace("_orig_mod.", ""): t for name, t in found.items()}) for found in results]
        draws.append((*results, run(truth, x.double(), dy.double())))
    assert_accurate(draws)


def test_a_subclass_of_peft_s_layer_is_left_alone():
    """As torchao's and Intel's layers are: their forward is theirs."""

    class Quantised(lora.Linear):
        def forward(self, x, *args, **kwargs):
            return 2 * super().forward(x, *args, **kwargs)

    model = peft_model()
    for layer in layers(model):
        layer.__class__ = Quantised
    ours, report = patched_copy(model)
    assert {status.state for status in report.layers} == {"peft"}
    assert "only lora.Linear is fused, and its type is Quantised" in str(report)
    assert run(ours, X, DY).equals(run(model, X, DY))


@pytest.mark.parametrize(
    ("dtype", "p", "peft_raises"), [(torch.float32, 0.0, True), (BF16, 0.0, False), (BF16, 0.1, False)]
)
def test_x_written_in_place(dtype, p, peft_raises):
    """x itself is kept for the backward; PEFT kept a copy where it dropped or cast."""
    model = peft_model(dtype=dtype, lora_dropout=p)
    for m, raises in ((model, peft_raises), (patched_copy(model)[0], True)):
        x = X.to(dtype).clone()
        y = m(x)
        x.add_(1)
        if raises:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward(DY.to(y.dtype))
        else:
            y.backward(DY.to(y.dtype))
