"""``pytest bench/``: the options of the grid, which files hold benchmarks, what the JSON says beside the times."""

from __future__ import annotations

import argparse
import math

import pytest
from measure import environment
from providers import available
from shapes import add_grid_options, cases, device_of

from fused_lora.demo import usable_device

_LEFT_OUT = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("grid", "fused-lora benchmarks")
    add_grid_options(group.addoption)
    group.addoption(
        "--budget", type=float, help="seconds to spend on one provider of one case (default: 1, quick: 0.05)"
    )


def _check_device(options: argparse.Namespace) -> None:
    """Refuse what cannot be timed here, before any benchmark is made for it."""
    if options.device is not None:
        try:
            options.device = str(usable_device(options.device))
        except ValueError as error:
            raise ValueError(f"--device: {error}") from None


def _check_numbers(options: argparse.Namespace) -> None:
    """Refuse numbers that no layer can have: they would fail one benchmark after another, or be passed over."""
    for name, kind, fits, wanted in (
        ("rows", int, lambda rows: rows >= 1, "whole numbers, 1 or more"),
        ("rank", int, lambda rank: rank >= 1, "whole numbers, 1 or more"),
        ("p", float, lambda p: 0 <= p <= 1, "probabilities, 0 to 1"),
    ):
        text = getattr(options, name)
        for item in [] if text is None else text.split(","):
            try:
                number = kind(item)
            except ValueError:
                number = None
            if number is None or not fits(number):
                raise ValueError(f"--{name} takes a comma list of {wanted}, got {item!r}")
    if options.budget is not None and not 0 < options.budget < math.inf:
        raise ValueError(f"--budget takes seconds above 0, got {options.budget:g}")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.option.benchmark_disable_gc = True  # a collection in the middle of a pass would be timed
    config.stash[_LEFT_OUT] = {}
    try:
        _check_device(config.option)
        _check_numbers(config.option)
        cases(config.option)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"case", "provider"} <= set(metafunc.fixturenames):
        return
    config = metafunc.config
    device = device_of(config.option)
    parameters = [
        pytest.param(case, provider, id=f"{provider.name}-{case.id}")
        for case in cases(config.option)
        for provider in available(case, device, config.stash[_LEFT_OUT])
    ]
    metafunc.parametrize(("case", "provider"), parameters)


@pytest.fixture
def budget(pytestconfig: pytest.Config) -> float:
    """Seconds to spend on one provider of one case."""
    return pytestconfig.option.budget or (0.05 if pytestconfig.option.quick else 1.0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.pop("node", None)  # the machine's own name is nobody's business
    machine_info.update(environment(device_of(config.option)))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    output_json["left_out"] = config.stash[_LEFT_OUT]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, reason in config.stash[_LEFT_OUT].items():
        terminalreporter.write_line(f"left out: {name}: {reason}")
