"""How it is timed: one pass, the bytes it keeps for the backward, and where and with what it ran."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from time import perf_counter

import torch
from providers import Inputs
from torch import Tensor, nn


class Pass:
    """One forward, or forward and backward, of a layer: ``prepare()`` untimed, then the call.

    The call ends with the device idle. What it made (y and its graph) is released by the next ``prepare``, so that no
    deallocation is timed; the gradients are cleared there too, so that none is accumulated.
    """

    def __init__(self, layer: nn.Module, inputs: Inputs, mode: str):
        self.layer, self.x, self.dy = layer, inputs.x, inputs.dy
        self.backward = mode == "forward+backward"
        self.cuda = inputs.x.device.type == "cuda"
        self.result: Tensor | None = None
        self.flush = _flush_buffer(inputs.x.device) if self.cuda else None

    def prepare(self) -> None:
        self.result = self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None
        if self.flush is not None:
            self.flush.zero_()
            torch.cuda.synchronize(self.x.device)

    def __call__(self) -> None:
        self.result = self.layer(self.x)
        if self.backward:
            self.result.backward(self.dy)
        if self.cuda:
            torch.cuda.synchronize(self.x.device)

    def seconds(self) -> float:
        """Prepare, run once, and return the time of the run."""
        self.prepare()
        start = perf_counter()
        self()
        return perf_counter() - start


_flush_buffers: dict[torch.device, Tensor] = {}


def _flush_buffer(device: torch.device) -> Tensor:
    """Twice the L2 cache: writing it leaves nothing of the last pass there, as in a network of many layers."""
    if device not in _flush_buffers:
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 1 << 27
        _flush_buffers[device] = torch.empty(2 * size, dtype=torch.int8, device=device)
    return _flush_buffers[device]


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that one forward keeps alive for its backward, beyond x and the parameters."""
    # By the storage's own address, which a tensor on the meta device has too.
    own = {t.untyped_storage()._cdata for t in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    del y  # only now: while the graph lives, no address can be used twice
    return sum(kept.values())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    """The CPU's model as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, object]:
    """Device, versions, commit and date: what a figure has to be quoted with. Says nothing of who ran it."""
    status = _git("status", "--porcelain")
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "peft", "torchtune", "loralib", "fused-lora")},
        "commit": _git("rev-parse", "--verify", "--quiet", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
