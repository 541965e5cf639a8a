"""A pytest plug-in that runs PEFT's own tests with every LoRA model patched right after it is made.

    PYTHONPATH=/path/to/fused-lora/tests pytest -p peft_plugin /path/to/peft/tests/test_custom_models.py -k lora

At the end it prints how many layers were patched, how many calls ran fused, and for the others the reasons, so that a
patch that does nothing shows. ``--fused-dropout torch`` patches with ``dropout="torch"``. It holds none of PEFT's code.
"""

from __future__ import annotations

import functools
import json
import weakref
from collections import Counter

import torch

from fused_lora import peft_forward, peft_parts, peft_patch

layers: Counter[str] = Counter()
calls: Counter[str] = Counter()
_seen: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def pytest_addoption(parser):
    parser.addoption("--fused-dropout", default="fused", choices=("fused", "torch"), help="dropout= of patch_peft")


def pytest_configure(config):
    from peft.tuners.tuners_utils import BaseTuner

    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_and_patch(self, model, *args, **kwargs):
        result = inject(self, model, *args, **kwargs)
        report = peft_patch.patch_peft(model, dropout=config.getoption("--fused-dropout"))
        _count_layers(model, report)
        return result

    BaseTuner.inject_adapter = inject_and_patch
    for name, route in (("fused_forward", peft_parts.route), ("mixed_forward", peft_parts.route_mixed)):
        setattr(peft_forward, name, _counted(getattr(peft_forward, name), route))


def _count_layers(model, report):
    modules = dict(model.named_modules())
    for status in report.layers:
        layer = modules[status.name]
        if layer not in _seen:
            _seen.add(layer)
            patched = isinstance(layer, peft_patch._fused_class())
            layers["patched" if patched else f"not patched: {status.layer}: {status.reason}"] += 1


def _counted(forward, route):
    @functools.wraps(forward)
    def counted(layer, *args):
        if torch.compiler.is_compiling():
            return forward(layer, *args)
        y = forward(layer, *args)
        chosen = route(layer, *args)
        calls[
            "fused" if y is not None else chosen if isinstance(chosen, str) else "nn.Dropout's bits without gradients"
        ] += 1
        return y

    return counted


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fused_lora"] = json.dumps((layers, calls))


def pytest_testnodedown(node, error):
    for total, counted in zip((layers, calls), json.loads(node.workeroutput["fused_lora"]), strict=True):
        total.update(counted)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("fused-lora")
    for title, counted in (("layers", layers), ("calls of patched layers", calls)):
        terminalreporter.line(f"{title}: {sum(counted.values())}")
        for what, count in counted.most_common():
            terminalreporter.line(f"  {count:>8}  {what}")
    if not calls["fused"]:
        terminalreporter.line("nothing ran fused: this run proves nothing", red=True)
