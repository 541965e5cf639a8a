"""DoRA where something stands around the layer: in-place work on its output, transforms over its backward, autocast,
meta tensors, no rows or features at all, selective checkpointing.

x (..., K)   weight (N, K)   lora_a (R, K)   lora_b (N, R)   magnitude (N,)   y (..., N)
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import LoRALinear

K, N, R = 13, 9, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(dtype=torch.float64, **settings):
    layer = LoRALinear(K, N, r=R, use_dora=True, dtype=dtype, **settings)
    with torch.no_grad():
        layer.lora_b.normal_(std=0.3)
        layer.magnitude.mul_(1.5)
    return layer


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lead", [(), (6,), (2, 3)])
def test_work_in_place_on_the_output(lead, p):
    """A view that a Function made forbids it, and under FSDP2 ends the process."""
    layer, x = make(lora_dropout=p), torch.randn(*lead, K).double()
    gradients = []
    for act in (F.relu, F.relu_):
        torch.manual_seed(1)
        y = layer(x)
        assert y.shape == (*lead, N)
        assert not y._is_view()
        gradients.append(torch.autograd.grad(act(y).square().sum(), layer.trained()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lead", [(6,), (2, 3)])
class TestTransformsOverABackward:
    """y is made outside the transform, so that only the gradient of y knows of it."""

    @pytest.fixture
    def case(self, lead, p):
        layer = make(lora_dropout=p)
        x = torch.randn(*lead, K).double().requires_grad_()
        leaves = (x, layer.bias.requires_grad_(), *layer.trained())
        return layer(x), leaves, torch.randn(3, *lead, N).double()

    def test_forward_over_reverse(self, case):
        y, leaves, (dy, tangent, _) = case
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(dy, tangent)
            found = torch.autograd.grad(y, leaves, dual, retain_graph=True)
            found = [forward_ad.unpack_dual(grad).tangent for grad in found]
        # Linear in dy, so the tangent is the gradient at the tangent.
        for ours, truth in zip(found, torch.autograd.grad(y, leaves, tangent), strict=True):
            torch.testing.assert_close(ours, truth)

    @pytest.mark.parametrize("legacy", [False, True])
    def test_vmap(self, case, legacy):
        y, leaves, many = case
        truth = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in many]
        if legacy:
            found = torch.autograd.grad(y, leaves, many, is_grads_batched=True)
        else:
            found = torch.vmap(lambda dy: torch.autograd.grad(y, leaves, dy, retain_graph=True))(many)
        for ours, each in zip(found, zip(*truth, strict=True), strict=True):
            torch.testing.assert_close(ours, torch.stack(each))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_under_autocast(dtype):
    layer = make(dtype)
    wanted = layer._row_norms()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer._row_norms(), wanted)
        layer.reset_lora_parameters(False)
    assert torch.equal(layer.magnitude, layer._row_norms())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lead", [(6,), (2, 3)])
def test_meta(lead, p):
    layer = LoRALinear(K, N, r=R, use_dora=True, lora_dropout=p, device="meta")
    x = torch.randn(*lead, K, device="meta", requires_grad=True)
    y = layer(x)
    assert (y.device.type, y.shape) == ("meta", (*lead, N))
    y.sum().backward()
    assert all(t.grad.shape == t.shape for t in (x, *layer.trained()))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_no_rows(lead, create_graph):
    layer, x = make(), torch.randn(*lead, K).double().requires_grad_()
    leaves = (x, *layer.trained())
    grads = torch.autograd.grad(layer(x).sum(), leaves, create_graph=create_graph)
    assert [grad.shape for grad in grads] == [t.shape for t in leaves]
    assert not any(grad.any() for grad in grads)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_features(dtype):
    layer = LoRALinear(0, N, r=R, use_dora=True, dtype=dtype)
    assert not layer.magnitude.any()
    for lead in ((), (3,), (2, 3)):
        assert layer(torch.empty(*lead, 0, dtype=dtype)).shape == (*lead, N)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_selective_checkpointing(p):
    layers = nn.Sequential(make(lora_dropout=p), nn.Tanh(), LoRALinear(N, N, r=R, use_dora=True, dtype=torch.float64))
    x = torch.randn(6, K).double().requires_grad_()
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

    def contexts():
        return create_selective_checkpoint_contexts(kept)

    results = []
    for _ in range(2):  # what is kept from call to call is there the second time
        torch.manual_seed(1)
        y = checkpoint(layers, x, use_reentrant=False, context_fn=contexts)
        results.append(torch.autograd.grad(y.sum(), (x, *layers[0].trained())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    if not p:
        truth = torch.autograd.grad(layers(x).sum(), (x, *layers[0].trained()))
        for ours, plain in zip(results[0], truth, strict=True):
            torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_mode_that_only_looks_changes_nothing(p, use_reentrant):
    """It ends before the backward, which must draw the mask that the forward drew under it."""
    layer, x = make(lora_dropout=p), torch.randn(6, K).double().requires_grad_()
    found = []
    for context in (contextlib.nullcontext(), FlopCounterMode(display=False)):
        torch.manual_seed(3)
        with context:
            y = checkpoint(layer, x, use_reentrant=use_reentrant)
        found.append([y, *torch.autograd.grad(y.square().sum(), x)] if not use_reentrant else [y, backward_of(y, x)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def backward_of(y, x):
    """dx; reentrant checkpointing does not work with torch.autograd.grad."""
    x.grad = None
    y.square().sum().backward()
    return x.grad
