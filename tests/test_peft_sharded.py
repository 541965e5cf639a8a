"""Patched PEFT models whose tensors are sharded: FSDP2, DTensors, tensor parallelism, on one process."""

import copy

import pytest
import torch
from peft_models import Eager, K, N, layers, patched_copy, peft_model, run
from torch import nn

from fused_lora import patch_peft, peft_parts, peft_status, unpatch_peft

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built")
X = torch.randn(7, K, generator=torch.Generator().manual_seed(2))
DY = torch.randn(7, 3 * N, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def eager(monkeypatch):
    return Eager(monkeypatch)


@pytest.fixture
def mesh(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("unit", ["block", "layer-before", "layer-after", "factor"])
def test_fsdp2(unit, mesh, eager):
    """One process: sharded the layer computes what it computes unsharded, patched where it is fused."""
    from torch.distributed.fsdp import fully_shard

    model = peft_model()
    fused = unit in ("block", "layer-after")
    expected = run(patched_copy(model)[0] if fused else model, X, DY)
    eager.calls = 0
    if unit != "layer-before":
        patch_peft(model)
    for layer in layers(model):
        if unit.startswith("layer"):
            fully_shard(layer, mesh=mesh)
        elif unit == "factor":
            fully_shard(layer.lora_A["default"], mesh=mesh)
    if unit == "block":
        fully_shard(model.base_model.model, mesh=mesh)
    if unit == "layer-before":
        assert "patch_peft before fully_shard" in str(patch_peft(model))
    if unit == "layer-after":
        with pytest.raises(ValueError, match="unpatch before sharding"):
            unpatch_peft(model)
    y = model(X)
    assert torch.equal(y, expected.results["y"])
    y.backward(DY)
    for layer, name in zip(layers(model), "qkv", strict=True):
        grad = layer.lora_A["default"].weight.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        assert torch.equal(grad, expected.results[f"dbase_model.model.{name}.lora_A.default.weight"])
    assert eager.calls == (0 if fused else 3)


def shard(module, name, mesh, placement):
    from torch.distributed.tensor import distribute_tensor

    parameter = module._parameters[name]
    sharded = distribute_tensor(parameter.data, mesh, [placement])
    module._parameters[name] = nn.Parameter(sharded, requires_grad=parameter.requires_grad)


def all_distributed(model, mesh):
    """Every parameter a DTensor, without hooks; x must be one too."""
    from torch.distributed.tensor import Replicate

    for module in model.modules():
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                shard(module, name, mesh, Replicate())


def base_distributed(model, mesh):
    """Tensor parallelism of the base alone: PEFT's forward mixes DTensors and tensors, which raises."""
    from torch.distributed.tensor import Shard

    for layer in layers(model):
        shard(layer.base_layer, "weight", mesh, Shard(0))


def parallel_styles(model, mesh):
    """Column parallel as transformers and torch install it: DTensors, and hooks that turn tensors into them."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    for layer in layers(model):
        parallelize_module(layer.base_layer, mesh, ColwiseParallel())
        parallelize_module(layer.lora_B["default"], mesh, ColwiseParallel())


@pytest.mark.parametrize("first", ["shard", "patch"])
@pytest.mark.parametrize("kind", [all_distributed, base_distributed, parallel_styles], ids=lambda kind: kind.__name__)
def test_dtensors_and_tensor_parallelism(kind, first, mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    plain = peft_model()
    ours = copy.deepcopy(plain)
    if first == "patch":
        patch_peft(ours)
    for m in (plain, ours):
        kind(m, mesh)
    patch_peft(ours)
    reasons = {status.reason for status in peft_status(ours).layers}
    assert reasons == {peft_parts.HOOKS if kind is parallel_styles else peft_parts.TENSORS}
    results = []
    for m in (plain, ours):
        x = distribute_tensor(X, mesh, [Replicate()]) if kind is all_distributed else X
        try:
            y = m(x)
            y.sum().backward()
        except RuntimeError as error:
            results.append(str(error))
            continue
        tensors = [y, *(p.grad for p in m.parameters() if p.grad is not None)]
        results.append([t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors])
    assert (type(results[0]) is str) == (kind is base_distributed)
    if kind is base_distributed:
        assert results[0] == results[1]
    else:
        assert len(results[0]) == len(results[1]) > 6
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
