"""A pytest plug-in that runs torchtune's own tests with fused-lora's drop-ins in place of torchtune's.

    PYTHONPATH=/path/to/fused-lora/tests pytest -p torchtune_plugin tests/torchtune/modules/peft

from torchtune's folder. The names that ``fused_lora.compat.torchtune`` offers are swapped wherever torchtune has
imported them, so its model builders make our layers too. At the end it prints how many layers were made and how many
calls ran fused, and for the others the reasons, so that a swap that does nothing shows.

torchtune's recipes freeze the base weights before training, its unit tests do not, and a layer whose base trains is not
fused. So base weights are frozen here before each call; ``--trainable-base`` leaves them. It holds none of torchtune's
code.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter

import pytest

from fused_lora.compat import route, torchtune

SWAPPED = (
    "AdapterModule",
    "LoRALinear",
    "disable_adapter",
    "get_adapter_params",
    "get_adapter_state_dict",
    "get_merged_lora_ckpt",
    "set_trainable_params",
)
layers: Counter[str] = Counter()
calls: Counter[str] = Counter()


def pytest_addoption(parser):
    parser.addoption("--trainable-base", action="store_true", help="leave base weights as torchtune's tests make them")


def pytest_configure(config):
    import torchtune as theirs
    from torchtune.modules import peft

    places: Counter[str] = Counter()
    originals = {name: getattr(peft, name) for name in SWAPPED}
    for module in [m for path, m in sys.modules.items() if path.split(".")[0] == theirs.__name__]:
        for name, original in originals.items():
            if getattr(module, name, None) is original:
                setattr(module, name, getattr(torchtune, name))
                places[name] += 1
    assert all(places[name] for name in SWAPPED), places

    init, forward = torchtune.LoRALinear.__init__, torchtune.LoRALinear.forward

    @functools.wraps(init)
    def counted_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        layers["with a quantised base" if self._quantize_base else "plain"] += 1

    @functools.wraps(forward)
    def frozen_forward(self, x):
        self.weight.requires_grad_(False)
        return forward(self, x)

    torchtune.LoRALinear.__init__ = counted_init
    if not config.getoption("--trainable-base"):
        torchtune.LoRALinear.forward = frozen_forward
    route.refusal = _counting(route.refusal, lambda reason: f"not fused: {reason}" if reason else None)
    route.fused = _counting(route.fused, lambda y: "fused")


def _counting(function, what):
    @functools.wraps(function)
    def counted(*args):
        result = function(*args)
        if what(result) is not None:
            calls[what(result)] += 1
        return result

    return counted


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fused_lora"] = json.dumps((layers, calls))


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node, error):
    for total, counted in zip((layers, calls), json.loads(node.workeroutput["fused_lora"]), strict=True):
        total.update(counted)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("fused-lora")
    for title, counted in (("layers", layers), ("calls of layers that are not disabled", calls)):
        terminalreporter.line(f"{title}: {sum(counted.values())}")
        for what, count in counted.most_common():
            terminalreporter.line(f"  {count:>8}  {what}")
    if not calls["fused"]:
        terminalreporter.line("nothing ran fused: this run proves nothing", red=True)
