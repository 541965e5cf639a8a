"""Where a patched layer takes PEFT's own forward: the result is PEFT's bit for bit, and the report says why.

Also accelerate, which acts through hooks.
"""

import copy

import pytest
import torch
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import variants
from peft_models import Eager, K, N, layers, patched_copy, peft_model, randomize, run
from torch import nn

from fused_lora import patch_peft, peft_parts, peft_status

DY = torch.randn(7, 3 * N, generator=torch.Generator().manual_seed(1))
X = torch.randn(7, K, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def reasons(model):
    return {status.reason for status in peft_status(model).layers}


@pytest.fixture
def eager(monkeypatch):
    return Eager(monkeypatch)


# What is done to a model before and after it is patched (the same function, on both copies), and the expected reason.
def disable(model):
    model.base_model.disable_adapter_layers()


def merge(model):
    model.merge_adapter()


def merge_then_disable(model):
    """PEFT unmerges inside forward."""
    model.merge_adapter()
    model.base_model.disable_adapter_layers()


def absent(model):
    model.add_adapter("elsewhere", LoraConfig(target_modules=["v"], r=2))
    for layer in layers(model)[:2]:
        layer.set_adapter("elsewhere")
    layers(model)[2].set_adapter("default")


def trainable_base(model):
    for layer in layers(model):
        layer.base_layer.weight.requires_grad_()


def hook_on(name, register):
    def edit(model):
        for layer in layers(model):
            module = layer.get_submodule(name)
            if register == "forward":
                module.register_forward_hook(lambda module, args, output: output * 1.5)
            elif register == "pre":
                module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
            elif register == "backward":
                module.register_full_backward_hook(lambda module, grads, _: tuple(2 * g for g in grads))
            else:  # as accelerate does it
                module.forward = lambda *args, forward=module.forward: forward(*args) + 1.0

    edit.__name__ = f"{register}-{name}"
    return edit


def subclassed_base(model):
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in layers(model):
        layer.base_layer.__class__ = Doubling


def parametrized_base(model):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    for layer in layers(model):
        nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Halved())


def weight_norm_base(model):
    for layer in layers(model):
        nn.utils.parametrizations.weight_norm(layer.base_layer)
        for parameter in layer.base_layer.parameters():
            parameter.requires_grad_(False)


def other_dropout(model):
    for layer in layers(model):
        layer.lora_dropout["default"] = nn.Hardtanh(-0.5, 0.5)


def nan_scaling(model):
    for layer in layers(model):
        layer.scaling["default"] = float("inf")


def half_adapter(model):
    for layer in layers(model):
        layer.lora_A.to(torch.bfloat16), layer.lora_B.to(torch.bfloat16)


def several_dtypes(model):
    model.add_adapter("other", LoraConfig(target_modules=["q", "k", "v"], r=2))
    randomize(model)
    for layer in layers(model):
        layer.lora_A["other"].to(torch.bfloat16), layer.lora_B["other"].to(torch.bfloat16)
    model.base_model.set_adapter(["other", "default"])


def several_dora(model):
    model.add_adapter("other", LoraConfig(target_modules=["q", "k", "v"], r=2, use_dora=True))
    model.base_model.set_adapter(["default", "other"])


def other_variant(model):
    model.add_adapter("other", LoraConfig(target_modules=["q", "k", "v"], r=2, init_lora_weights="mica"))
    model.set_adapter("other")


FALLBACKS = [
    (disable, peft_parts.DISABLED),
    (merge, peft_parts.MERGED),
    (merge_then_disable, peft_parts.DISABLED),
    (absent, peft_parts.ABSENT),
    (trainable_base, peft_parts.TRAINABLE),
    *((hook_on("base_layer", kind), peft_parts.HOOKS) for kind in ("forward", "pre", "backward", "instance")),
    *((hook_on("lora_A.default", kind), peft_parts.HOOKS) for kind in ("forward", "pre", "instance")),
    (hook_on("lora_B.default", "forward"), peft_parts.HOOKS),
    (hook_on("lora_dropout.default", "forward"), peft_parts.HOOKS),
    (subclassed_base, peft_parts.BASE),
    (parametrized_base, peft_parts.BASE),
    (weight_norm_base, peft_parts.BASE),
    (other_dropout, peft_parts.FACTORS),
    (nan_scaling, peft_parts.SCALE),
    (half_adapter, peft_parts.DTYPES),
    (several_dtypes, peft_parts.DTYPES),
    (several_dora, peft_parts.SEVERAL_DORA),
    *([(other_variant, peft_parts.VARIANT)] if hasattr(variants, "MiCALinearVariant") else []),
]


def same(a, b):
    return torch.equal(a.nan_to_num(7.0, 8.0, 9.0), b.nan_to_num(7.0, 8.0, 9.0))


@pytest.mark.parametrize(("edit", "reason"), FALLBACKS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("order", ["edit-then-patch", "patch-then-edit"])
def test_falls_back_to_peft_exactly(edit, reason, order, eager):
    model = peft_model()
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    if order == "patch-then-edit":
        patch_peft(ours)
        assert peft_status(ours).fused == 3
    for m in (plain, ours):
        torch.manual_seed(5)
        edit(m)
    patch_peft(ours)
    assert reason in reasons(ours)
    assert str(peft_status(ours)).count(reason) == 1
    expected = run(plain, X, DY)
    before = eager.calls
    result = run(ours, X, DY)
    assert eager.calls - before == sum(status.state != "fused" for status in peft_status(ours).layers) > 0
    assert result.results.keys() == expected.results.keys()
    if edit is not absent:  # there one layer stays fused
        assert all(same(t, expected.results[name]) for name, t in result.results.items())


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.randn(7, K + 1), RuntimeError),
        (torch.zeros(7, K, dtype=torch.int64), RuntimeError),
        (torch.randn(7, K, dtype=torch.float64), RuntimeError),
        (torch.randn(7, K, dtype=torch.bfloat16), RuntimeError),
        (torch.randn(7, K, device="meta"), RuntimeError),
        (torch.randn(()), RuntimeError),
        ([1.0, 2.0], TypeError),
        (None, TypeError),
    ],
    ids=["width", "int", "float64", "bf16", "device", "scalar", "list", "none"],
)
def test_bad_input_raises_what_peft_raises(x, error):
    model = peft_model()
    ours, _ = patched_copy(model)
    messages = []
    for m in (model, ours):
        with pytest.raises(error) as raised:
            m(x)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def torch_dropout_dora():
    return peft_model(use_dora=True, lora_dropout=0.3)


def torch_dropout_of_two_dtypes():
    model = peft_model(dtype=torch.bfloat16, adapters=2, lora_dropout=0.3)
    for layer in layers(model):
        layer.lora_A["other"].to(torch.bfloat16), layer.lora_B["other"].to(torch.bfloat16)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [(torch_dropout_dora, peft_parts.DORA_TORCH), (torch_dropout_of_two_dtypes, peft_parts.SEVERAL_DTYPES)],
    ids=["dora", "two-dtypes"],
)
def test_torch_dropout_where_it_is_not_fused(make, reason):
    model = make()
    ours, report = patched_copy(model, dropout="torch")
    assert {status.reason for status in report.layers} == {reason}
    results = []
    for m in (ours, model):
        torch.manual_seed(6)
        results.append(run(m, X.to(layers(m)[0].base_layer.weight.dtype), DY))
    assert results[0].equals(results[1])


def test_hooks_on_the_layer_itself_fire(eager):
    """They are nn.Module's own business, around the fused forward as around PEFT's."""
    model = peft_model()
    ours, _ = patched_copy(model)
    seen = []
    for m in (model, ours):
        calls = []
        seen.append(calls)
        for layer in layers(m):
            layer.register_forward_pre_hook(lambda module, args, calls=calls: calls.append("before"))
            layer.register_forward_hook(lambda module, args, y, calls=calls: (calls.append("after"), y)[1])
            layer.register_full_backward_hook(lambda module, dx, dy, calls=calls: calls.append("backward"))
        before = eager.calls
        run(m, X, DY)
    assert peft_status(ours).fused == 3
    assert eager.calls == before  # none of the second model's
    assert seen[0] == seen[1]
    assert len(seen[0]) == 9


def test_selective_checkpointing():
    """It works through dispatch modes, which must see PEFT's operations."""
    from torch.utils import checkpoint

    def policy(context, operation, *args, **kwargs):
        keep = operation == torch.ops.aten.mm.default
        return checkpoint.CheckpointPolicy.MUST_SAVE if keep else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    class Selective(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            def contexts():
                return checkpoint.create_selective_checkpoint_contexts(policy)

            return checkpoint.checkpoint(self.model, x, use_reentrant=False, context_fn=contexts)

    model = peft_model()
    ours, _ = patched_copy(model)
    assert run(Selective(ours), X, DY).equals(run(Selective(model), X, DY))


def test_a_vector_through_dora_keeps_peft_s_shape():
    model = peft_model(use_dora=True)
    ours, _ = patched_copy(model)
    assert torch.equal(ours(X[0]), model(X[0]))


def test_input_casting_off():
    """disable_input_dtype_casting: PEFT's error on mixed dtypes, fused where nothing has to be cast."""
    ours, _ = patched_copy(peft_model(dtype=torch.bfloat16))
    with disable_input_dtype_casting(ours):
        assert reasons(ours) == {peft_parts.DTYPES}
        with pytest.raises(RuntimeError):
            ours(X.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert peft_status(ours).fused == 3
            ours(X.bfloat16())
    assert peft_status(ours).fused == 3
    ours, _ = patched_copy(peft_model())
    with disable_input_dtype_casting(ours):
        assert peft_status(ours).fused == 3


def test_functorch_forward_mode_and_dispatch_modes(eager):
    from torch.utils.flop_counter import FlopCounterMode

    model = peft_model()
    ours, _ = patched_copy(model)
    tangent = torch.randn_like(X)
    for transform in (
        lambda m: torch.func.grad(lambda x: m(x).square().sum())(X),
        lambda m: torch.func.vmap(m)(X),
        lambda m: torch.func.jvp(m, (X,), (tangent,))[1],
        lambda m: torch.func.functional_call(m, dict(m.named_parameters()), (X,)),
    ):
        before = eager.calls
        expected = transform(model)
        used = eager.calls - before
        result = transform(ours)
        if eager.calls - before - used:
            assert torch.equal(result, expected)
        else:
            torch.testing.assert_close(result, expected)
    flops = []
    for m in (model, ours):
        with FlopCounterMode(display=False) as counter:
            m(X).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    traced = torch.jit.trace(ours, X, check_trace=False)
    torch.testing.assert_close(traced(X), model(X))


def test_export():
    ours, _ = patched_copy(peft_model(train=False))
    program = torch.export.export(ours, (X,))
    torch.testing.assert_close(program.module()(X), ours(X))


def test_accelerate_hooks():
    from accelerate.hooks import ModelHook, add_hook_to_module

    def hook_all(model):
        for layer in layers(model):
            add_hook_to_module(layer, ModelHook())

    plain, hidden, after = peft_model(), peft_model(), peft_model()
    hook_all(hidden)
    assert "hides the patch" in str(patch_peft(hidden))
    assert run(hidden, X, DY).equals(run(plain, X, DY))
    patch_peft(after)
    expected = run(after, X, DY)
    hook_all(after)
    assert peft_status(after).fused == 3
    assert run(after, X, DY).equals(expected)


def test_global_hooks(eager):
    ours, _ = patched_copy(peft_model())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        assert reasons(ours) == {peft_parts.HOOKS}
        ours(X)
    finally:
        handle.remove()
    assert eager.calls == 3
    assert layers(ours)[0].lora_A["default"] in seen


@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_base_made_in_inference_mode_trains_as_in_peft(adapters, config):
    """PEFT saves no weight where x needs no gradient, as in a model's first layer."""
    model = peft_model(adapters=adapters, **config)
    with torch.inference_mode():
        weights = [layer.base_layer.weight.clone() for layer in layers(model)]
    for layer, weight in zip(layers(model), weights, strict=True):
        layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    patch_peft(model)
    assert {str(peft_parts.parts_of(layer)) for layer in layers(model)} == {peft_parts.INFERENCE}
    model(torch.randn(5, K)).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)
