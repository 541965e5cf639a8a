"""loralib's layers for the tests: constructor arguments, the shapes of a checkpoint, and the formula of each.

The shapes and formulas are loralib's, written out; nothing here asks fused_lora.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

V, K, N, R, ALPHA = 40, 24, 36, 4, 6.0
SCALE = ALPHA / R


@dataclass(frozen=True)
class Case:
    kind: str
    settings: dict = field(default_factory=dict)
    shapes: dict = field(default_factory=dict)  # of a checkpoint, in its order

    def build(self, library, **settings):
        args = {"Embedding": (V, K), "C": (K, N, self.settings.get("kernel_size", 3))}
        args = args.get(self.kind) or args.get(self.kind[0], (K, N))
        arguments = {"r": R, "lora_alpha": ALPHA} | self.settings | settings
        arguments.pop("kernel_size", None)
        return getattr(library, self.kind)(*args, **arguments)

    def checkpoint(self, dtype=torch.float32):
        """Tensors of unit scale over their fan-in, under loralib's keys."""
        scale = {"lora_A": 1.0 if self.kind == "Embedding" else self.shapes["lora_A"][1] ** -0.5, "lora_B": R**-0.5}
        weight = self.shapes["weight"]
        fan_in = 1 if self.kind == "Embedding" else K if self.settings.get("fan_in_fan_out") else weight[1:].numel()
        scale |= {"weight": fan_in**-0.5}
        tensors = {name: (torch.randn(shape) * scale.get(name, 1.0)).to(dtype) for name, shape in self.shapes.items()}
        for name in tensors:
            tensors[name] = tensors[name.removeprefix("conv.")]
        return tensors

    def input(self, dtype=torch.float32):
        if self.kind == "Embedding":
            return torch.randint(0, V, (8, 11))
        return torch.randn(*((2, K, *(9, 7, 5)[: int(self.kind[4])]) if self.kind[0] == "C" else (17, K))).to(dtype)

    def formula(self, x, weight, bias, a, b):
        """loralib's expression in training mode."""
        if self.kind == "Embedding":
            padding = self.settings.get("padding_idx")
            return F.embedding(x, weight, padding) + (F.embedding(x, a.t(), padding) @ b.t()) * SCALE
        if self.kind[0] == "C":
            convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[int(self.kind[4])]
            settings = {name: self.settings[name] for name in ("padding", "stride", "groups") if name in self.settings}
            return convolution(x, weight + (b @ a).view(weight.shape) * SCALE, bias, **settings)
        weight = weight.t() if self.settings.get("fan_in_fan_out") else weight
        return F.linear(x, weight, bias) + self.branch(x, a, b) * SCALE

    def branch(self, x, a, b):
        if self.kind == "Linear":
            return x @ a.t() @ b.t()
        groups, parts = self.settings["enable_lora"], []
        factors = zip(a.split(R), b.split(N // len(groups)), strict=True)
        for enabled in groups:
            if enabled:
                part_a, part_b = next(factors)
                parts.append(x @ part_a.t() @ part_b.t())
            else:
                parts.append((x @ a[:1].t() * 0).expand(-1, N // len(groups)))
        return torch.cat(parts, dim=-1)

    def delta(self, a, b):
        """ΔW in the layout of weight."""
        if self.kind == "MergedLinear":
            dense = self.branch(torch.eye(K, dtype=a.dtype), a, b).t()
            return (dense.t() if self.settings.get("fan_in_fan_out") else dense) * SCALE
        transposed = self.kind == "Embedding" or self.settings.get("fan_in_fan_out")
        dense = (b @ a).t() if transposed else (b @ a).view(self.shapes["weight"])
        return dense * SCALE


def _shapes(weight, a, b, bias=True, conv=False):
    shapes = {"weight": weight} | ({"bias": (N,)} if bias else {}) | {"lora_A": a, "lora_B": b}
    doubled = {f"conv.{name}": shape for name, shape in shapes.items() if "lora" not in name} if conv else {}
    return {name: torch.Size(shape) for name, shape in (shapes | doubled).items()}


def _conv(dimensions, size, rows, groups=1, **settings):
    weight = (N, K // groups, *[size] * dimensions)
    shapes = _shapes(weight, (R * size, K * size), (rows, R * size), settings.get("bias", True), conv=True)
    groups = {} if groups == 1 else {"groups": groups}
    return Case(f"Conv{dimensions}d", {"kernel_size": size} | groups | settings, shapes)


def _merged(*enabled, bias=True, **settings):
    weight = (K, N) if settings.get("fan_in_fan_out") else (N, K)
    shapes = _shapes(weight, (R * sum(enabled), K), (N // len(enabled) * sum(enabled), R), bias)
    return Case("MergedLinear", {"enable_lora": list(enabled), "bias": bias} | settings, shapes)


CASES = {
    "linear": Case("Linear", {}, _shapes((N, K), (R, K), (N, R))),
    "linear-no-bias": Case("Linear", {"bias": False}, _shapes((N, K), (R, K), (N, R), bias=False)),
    "linear-turned": Case("Linear", {"fan_in_fan_out": True}, _shapes((K, N), (R, K), (N, R))),
    "merged-qv": _merged(True, False, True),
    "merged-qv-turned": _merged(True, False, True, fan_in_fan_out=True),
    "merged-last": _merged(False, False, False, True, bias=False),
    "merged-all": _merged(True, True),
    "merged-one": _merged(True),
    "embedding": Case("Embedding", {}, _shapes((V, K), (R, V), (K, R), bias=False)),
    "embedding-padding": Case("Embedding", {"padding_idx": 3}, _shapes((V, K), (R, V), (K, R), bias=False)),
    "conv2d": _conv(2, 3, N * 3, padding=1),
    "conv2d-groups": _conv(2, 3, N // 3 * 3, 3, stride=2, bias=False),
    "conv1d-1": _conv(1, 1, N),
    "conv3d-1": _conv(3, 1, N),
    # Not in loralib, whose shapes fail in the first forward.
    "conv1d": _conv(1, 3, N),
    "conv3d": _conv(3, 2, N * 4, padding=1),
}
THEIRS = [name for name in CASES if name not in ("conv1d", "conv3d")]


def load(case, library, tensors, **settings):
    """The layer of a case after loading a checkpoint, strictly."""
    layer = case.build(library, **settings).to(tensors["weight"].dtype)
    layer.load_state_dict(tensors)
    return layer
