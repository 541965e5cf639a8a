"""Set up once for every test: triton interprets its kernels, and memory that was never written is poison."""

import importlib
import os
import sys
from pathlib import Path

# Read when triton is imported, so it must come first. TRITON_INTERPRET=0 pytest tests/test_gpu.py: on a GPU, compiled.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch.utils import _device

POISON_INTEGER = 0x5A

# ``with torch.device(...)`` knows torch's constructors by a set that it makes once: here, before torch.empty is
# replaced, which would leave the original out of it, and so on the CPU.
_device._device_constructors()
torch.set_num_threads(1)  # the tensors are so small that a second thread costs more than it brings


def _poisoned(allocate):
    """``allocate``, filling with NaN what it hands to the package; what torch allocates for itself is left alone."""

    def allocate_poison(*args, **kwargs):
        result = allocate(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("fused_lora"):
            result.fill_(float("nan") if result.is_floating_point() else POISON_INTEGER)
        return result

    return allocate_poison


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Uninitialised memory that reaches a result shows as NaN, on every run instead of on the unlucky one."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Import a module of ``bench/`` by name; the modules leave with the test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCH)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)  # a benchmark may have asked for others
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCH:
            del sys.modules[name]
