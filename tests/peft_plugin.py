"""A pytest plug-in that runs PEFT's own tests with every LoRA model patched right after it is made.

    PYTHONPATH=/path/to/fused-lora/tests pytest -p peft_plugin /path/to/peft/tests/test_custom_models.py -k lora

At the end it prints how many layers were patched, how many calls ran fused, and for the others the reasons, so that a
patch that does nothing shows. ``--fused-dropout torch`` patches with ``dropout="torch"``, ``off`` leaves PEFT alone;
``--fused-outcomes FILE`` writes what became of every test (``peft_judge.py`` compares two such files). It holds none of
PEFT's code.
"""

from __future__ import annotations

import functools
import json
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch

from fused_lora import peft_forward, peft_parts, peft_patch

layers: Counter[str] = Counter()
calls: Counter[str] = Counter()
outcomes: dict[str, str] = {}
_seen: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def pytest_addoption(parser):
    modes = ("fused", "torch", "off")
    parser.addoption("--fused-dropout", default="fused", choices=modes, help="dropout= of patch_peft; off: no patch")
    parser.addoption("--fused-outcomes", type=Path, help="JSON file for the outcome of every test and the counts")
    parser.addoption("--fused-offline", action="store_true", help="PEFT's tests never wait for the hub")


def pytest_configure(config):
    if config.getoption("--fused-dropout") == "off":
        return
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


class _Known(dict):
    """PEFT's record of the models it has fetched, with every model in it: nothing is asked of the hub again."""

    def __contains__(self, key):
        return True

    def __missing__(self, key):
        return 0


def pytest_collection_finish(session):
    if session.config.getoption("--fused-offline"):
        for module in list(sys.modules.values()):
            if isinstance(vars(module).get("_HUB_MODEL_ACCESSES"), dict):
                module._HUB_MODEL_ACCESSES = _Known()


def pytest_runtest_logreport(report):
    """The worst phase of a test is its outcome: passed < skipped < failed."""
    ranks = ("passed", "skipped", "failed")
    known = outcomes.get(report.nodeid, "passed")
    outcomes[report.nodeid] = max(known, report.outcome, key=ranks.index)


def pytest_collectreport(report):
    if report.failed:
        outcomes[f"{report.nodeid} (collection)"] = "failed"


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fused_lora"] = json.dumps((layers, calls))
    elif path := session.config.getoption("--fused-outcomes"):
        path.write_text(json.dumps({"outcomes": outcomes, "layers": layers, "calls": calls}, indent=1) + "\n")


@pytest.hookimpl(optionalhook=True)  # it is xdist's hook
def pytest_testnodedown(node, error):
    # A worker that died has nothing to say; pytest reports it.
    for total, counted in zip(
        (layers, calls), json.loads(node.workeroutput.get("fused_lora", "[{}, {}]")), strict=True
    ):
        total.update(counted)


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.section("fused-lora")
    if config.getoption("--fused-dropout") == "off":
        terminalreporter.line("PEFT was not patched")
        return
    for title, counted in (("layers", layers), ("calls of patched layers", calls)):
        terminalreporter.line(f"{title}: {sum(counted.values())}")
        for what, count in counted.most_common():
            terminalreporter.line(f"  {count:>8}  {what}")
    if not calls["fused"]:
        terminalreporter.line("nothing ran fused: this run proves nothing", red=True)
