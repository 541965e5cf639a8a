"""``bench/gpu.py``: its quick path, the order of its cells, what is red, what crashes, what it renders."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fused_lora import tuned
from fused_lora.kernels import tiles

BENCH = Path(__file__).parents[1] / "bench"


def quick(output: Path, *arguments: str) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCH / "gpu.py"), "--quick", "--device=cpu", f"--output={output}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 red" in done.stdout
    return json.loads(output.read_text())


def test_the_quick_path_from_check_to_table(tmp_path, bench):
    content = quick(tmp_path / "gpu.json")
    assert {"torch", "triton", "commit", "date", "cuda", "device_name"} <= content.keys()
    assert content["crashes"] == []
    assert content["skipped_for_time"] == {"count": 0, "ids": ""}
    checked = content["correctness"]
    assert len(checked) == 14  # five strategies; three skinny kernels; three forms each of expand and grad_x
    assert all(verdict["cases"] == 1 and verdict["worst"] <= 2.0 for verdict in checked.values())
    assert content["ceilings"]["copy_bytes_per_second"] > 0
    assert [(cell["mode"], cell["p"]) for cell in content["cells"]] == [
        ("forward+backward", 0.0), ("forward+backward", 0.1), ("forward", 0.0), ("forward", 0.1),
    ]  # fmt: skip
    for cell in content["cells"]:
        timed = {"frozen", "ours", "ours-beta1", "ours-pointer", "ours-descriptor", "addmm", "beta1", "plain", "peft"}
        assert timed <= cell["eager"].keys()
        assert cell["left_out"]["peft-compile"] == "compiled on a GPU only"
        for ratio in cell["eager_tax"].values():
            assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
    text = bench("gpu").sections(content, "gpu.json")
    assert text == ["gpu.json is of a --quick run: it shows that the benchmark runs, its times mean nothing."]


def test_the_quick_path_of_the_tuner_and_its_table(tmp_path, bench):
    content = quick(tmp_path / "tune.json", "--tune")
    assert content["rejected"] == []
    assert content["compiles_clean"]
    assert len(content["tuned_sizes"]) == 2
    (chip,) = tuned.read(tmp_path / "tune.json")
    found = {(entry["piece"], entry["dropout"]) for entry in chip["entries"]}
    masked = {(piece, p) for piece in ("shrink", "grad_a", "grad_x", "strategy") for p in (False, True)}
    assert found == masked | {("expand", False), ("grad_b", False)}

    table = tmp_path / "tuned.json"
    old = {"name": chip["name"], "capability": [0, 0], "source": "old", "entries": []}
    bench("gpu_state").write(table, {"version": tuned.VERSION, "chips": [old, old | {"name": "another"}]})
    assert bench("gpu_tune").install(tmp_path / "tune.json", table) == []
    assert [(c["name"], c["source"] == "old") for c in tuned.read(table)] == [("another", True), (chip["name"], False)]
    bench("gpu_state").write(tmp_path / "tune.json", content | {"compiles_clean": False})
    with pytest.raises(ValueError, match="stopped before its tiles were looked at; --compile does it here"):
        bench("gpu_tune").install(tmp_path / "tune.json", table)


def tuned_entry(piece: str, tile: object, **others: object) -> tuned.Entry:
    fields = {"regime": "mixed float16", "M": 8192, "N": 1024, "K": 14336, "R": 16, "dropout": True, "form": "triton"}
    return tuned.Entry(piece=piece, tile=tile, seconds=1.0, rule_seconds=2.0, **fields | others)


def test_tiles_that_do_not_compile_clean_are_left_to_the_rule(bench, tmp_path):
    """On a chip that kernel_health does not list, from a process that interprets kernels, through the table's file."""
    chip = {"name": "a GPU", "capability": [8, 7], "source": "made up"}
    good, spills = tiles.SkinnyTile(64, 128, 16, 8, 3, split=9), tiles.SkinnyTile(128, 128, 64, 4, 3)
    entries = [tuned_entry("grad_a", good), tuned_entry("shrink", spills), tuned_entry("shrink", None, form="torch")]
    bench("gpu_state").write(tmp_path / "old.json", {"version": tuned.VERSION, "chips": []})
    record = {"version": tuned.VERSION, "chips": [{**chip, "entries": [entry.as_dict() for entry in entries]}]}
    bench("gpu_state").write(tmp_path / "tune.json", record)
    (rejected,) = bench("gpu_tune").install(tmp_path / "tune.json", tmp_path / "old.json", compile_here=True)
    assert "'shrink'" in rejected
    assert "B spilled" in rejected
    (installed,) = tuned.read(tmp_path / "old.json")
    usual = tuned_entry("shrink", None)
    found = [tuned.entry_of(fields) for fields in installed["entries"]]
    assert found == [entries[0], replace(usual, seconds=usual.rule_seconds), entries[2]]


def test_what_is_not_compiled_in_time_or_cannot_be_is_not_clean(bench):
    module, tile, chip = bench("gpu_clean"), tiles.SkinnyTile(64, 128, 16, 8, 3), tiles.Chip(108, (8, 0))
    (left,), (why,) = module.clean([tuned_entry("grad_a", tile, N=1000)], chip, deadline=0.0)
    assert (left.tile, left.form, left.gain) == (None, "triton", 1.0)
    assert why.endswith("True, False, True): not compiled, for want of time")  # a mask; 16 divides K but not N
    assert module._breaches(("80", "bfloat16", "fly", tile, False, True, True), chip) == ["KeyError: 'fly'"]


def test_every_cell_of_the_issue_is_in_the_grid_and_the_claim_comes_first(bench):
    grid = bench("gpu_grid").cells(quick=False)
    assert len(grid) == len({case.id for case in grid}) == 3 * 4 * 5 * 4 * 2 * 4 * 2
    first = grid[:8]
    assert {(c.shape_set, c.M, c.rank, c.regime, c.mode) for c in first} == {
        ("llama-3-8b", 8192, 16, "bf16", "forward+backward")
    }
    assert {(c.linear, c.p) for c in first} == {(n, p) for n in ("q,o", "k,v", "gate,up", "down") for p in (0.0, 0.1)}
    assert all(c.M == 512 for c in grid[8:16] if c.regime == "bf16" and c.mode == "forward+backward")
    in_time = bench("gpu_grid").in_time
    assert not any(in_time(name, first[0]) for name in ("ours", "peft-compile", "ours-pointer"))
    assert [in_time(name, grid[-1]) == "" for name in ("frozen", "beta1", "peft-compile", "ours-pointer")] == [
        True, True, False, False,
    ]  # fmt: skip
    penalties = [bench("gpu_grid").penalty(case) for case in grid]
    assert penalties == sorted(penalties)


def worker(bench, tmp_path, **state):
    path = tmp_path / "state.json"
    bench("gpu_state").write(path, {"crashes": [], "correctness": {}, "cells": [], **state})
    return bench("gpu_worker").Worker(Namespace(output=path, device="cpu", deadline=0.0, quick=True, tune=False))


def test_what_is_red_or_was_never_checked_is_not_timed(bench, tmp_path):
    case = bench("gpu_grid").cells(quick=True)[0]
    green = {"worst": 1.0, "cases": 1, "red": ""}
    strategies = bench("gpu_grid").STRATEGIES
    verdicts = {f"{name} | bf16-fp32": green for name in strategies}
    verdicts["ours-torch | bf16-fp32"] = {"red": "dx is off"}
    verdicts["expand pointer | bf16-fp32"] = {"red": "y is off"}
    del verdicts["ours-beta1 | bf16-fp32"]
    judge = worker(bench, tmp_path, correctness=verdicts)
    assert judge.why_not("ours", case) == ""
    assert judge.why_not("peft", case) == ""
    assert judge.why_not("ours-torch", case) == "red: ours-torch: dx is off"
    assert judge.why_not("ours-pointer", case) == "red: expand pointer: y is off"
    assert judge.why_not("ours-descriptor", case) == ""
    assert judge.why_not("ours-beta1", case) == "not checked against float64: for want of time"


def test_a_provider_that_ended_the_process_is_left_out_of_its_regime(bench, tmp_path):
    bf16 = bench("gpu_grid").cells(quick=False)[0]
    mixed = next(case for case in bench("gpu_grid").cells(quick=False) if case.regime == "bf16-fp32")
    judge = worker(bench, tmp_path, crashes=[{"at": f"{bf16.id} | peft", "error": "illegal access"}])
    assert judge.why_not("peft", bf16) == f"it ended the process before, at {bf16.id}: illegal access"
    assert judge.why_not("addmm", bf16) == ""
    assert judge.why_not("peft", mixed) == ""


_DIES_ONCE = """
import json, os, sys
output = sys.argv[sys.argv.index("--output") + 1]
attempt = os.path.splitext(output)[0] + ".attempt"
state = json.load(open(output))
if not state["crashes"]:
    open(attempt, "w").write("a cell | peft\\nillegal access")
    os._exit(3)
state["cells"].append({"id": "a cell"})
json.dump(state, open(output, "w"))
"""


def test_a_crash_is_written_down_and_the_table_goes_on(bench, tmp_path, monkeypatch):
    gpu = bench("gpu")
    (tmp_path / "gpu_worker.py").write_text(_DIES_ONCE)
    monkeypatch.setattr(gpu, "_HERE", tmp_path)
    state = {"crashes": [], "cells": []}
    options = Namespace(output=tmp_path / "out.json", device="cpu", quick=False, tune=False)
    bench("gpu_state").write(options.output, state)
    gpu.measure(options, state, deadline=10.0**10)
    assert state["crashes"] == [{"at": "a cell | peft", "error": "illegal access"}]
    assert state["cells"] == [{"id": "a cell"}]
    assert not (tmp_path / "out.attempt").exists()


def test_a_check_that_kills_its_process_is_red_and_one_without_time_is_not(bench, tmp_path):
    gpu, file = bench("gpu"), tmp_path / "check.json"
    file.write_text(json.dumps({"a | bf16": {"red": ""}, "attempting": "b | bf16"}))
    assert gpu._blame(file, "its process ended: -11")
    assert json.loads(file.read_text()) == {"a | bf16": {"red": ""}, "b | bf16": {"red": "its process ended: -11"}}
    file.write_text(json.dumps({"attempting": "b | bf16"}))
    assert not gpu._blame(file, "")
    assert json.loads(file.read_text()) == {}
    assert gpu._blame(file, "its process ended: 1")  # after a verdict that it wrote itself: the next one goes on
    assert json.loads(file.read_text()) == {}


def test_an_off_kernel_is_red(bench, monkeypatch):
    check = bench("gpu_check")
    linear = check.compare.__globals__["lora_linear"]
    off = lambda *args, **kwargs: linear(*args, **kwargs) * 1.02  # noqa: E731
    monkeypatch.setitem(check.compare.__globals__, "lora_linear", off)
    verdict = check.examine("ours", "bf16", torch.device("cpu"), quick=True)
    assert verdict["worst"] > 2.0
    assert "y: max" in verdict["red"]


def test_a_wrong_result_at_the_cell_itself_leaves_the_table(bench):
    module = bench("gpu_worker")

    class Fake:
        def __init__(self, factor):
            self.factor = factor

        def results(self):
            return [torch.full((3, 3), self.factor)] * 4

    subjects = {"addmm": Fake(1.0), "ours": Fake(1.01), "ours-torch": Fake(1.1), "peft": Fake(9.0)}
    left_out: dict[str, str] = {}
    module.gate(subjects, bench("gpu_grid").cells(quick=True)[0], left_out)
    assert subjects.keys() == {"addmm", "ours", "peft"}
    assert left_out["ours-torch"].startswith("red at this size: y is off by 1.0e-01")


def synthetic(bench) -> dict:
    """A JSON as a GPU run leaves it, with made-up seconds: frozen 1 ms, ours 1.1, PEFT 1.3 per linear."""
    cells = []
    for case in bench("gpu_grid").cells(quick=False)[:4]:
        ratio = lambda value: {"median": value, "q1": value, "q3": value, "rounds": 9}  # noqa: E731
        seconds = {"frozen": ratio(1e-3), "ours": ratio(1.1e-3), "peft": ratio(1.3e-3)}
        cells.append(
            {**case.as_dict(), "id": case.id, "graph": seconds, "graph_tax": {"ours": ratio(1.1), "peft": ratio(1.3)},
             "forms": {"expand": "beta1", "grad_x": "descriptor"}, "peak_bytes": {"frozen": 2**20, "ours": 2**21}}
        )  # fmt: skip
    return {
        "kind": "fused-lora gpu", "device_name": "a GPU", "torch": "2", "triton": "3", "peft": "0", "commit": "c",
        "date": "d", "ceilings": {"copy_bytes_per_second": 4e12, "matmul_flops_per_second": 8e14}, "cells": cells,
        "correctness": {"ours | bf16": {"worst": 1.2, "cases": 5, "red": ""}, "shrink triton | fp16": {"red": "off"}},
        "correctness_seconds": 1, "crashes": [], "skipped_for_time": {"count": 7, "ids": ""},
    }  # fmt: skip


def test_sections_are_rendered_from_the_json_alone(bench):
    content = synthetic(bench)
    rendered = bench("gpu").sections(json.loads(json.dumps(content)), "x.json")
    headings = [line for line in rendered if line.startswith("#")]
    assert len(headings) == 4
    assert all(line.endswith("from x.json") for line in headings)
    text = "\n".join(rendered)
    case = content["cells"][0]
    assert "copy 4.00 TB/s (read + written), bf16 product 800 TFLOP/s" in text
    assert "| shrink triton | fp16 | RED | - | off |" in text
    assert "7 cells of the grid were not measured" in text
    failed = content | {"cells": [*content["cells"], {**content["cells"][0], "id": "lost", "failed": "out of memory"}]}
    assert "* no figures for lost: out of memory" in bench("gpu").sections(failed, "x.json")
    assert f"| {case['id']} | 1.0000 |" in text
    around = bench("gpu").sections(content | {"events_inside_graphs": False}, "x.json")
    assert [line for line in around if line not in rendered] == [
        "Graphs were timed by events around their replay: what draws dropout pays for two more kernels."
    ]


def test_the_line_and_the_plots_of_the_report(bench, tmp_path):
    content, gpu = synthetic(bench), bench("gpu")
    what, result = gpu.summary(content, "x.json")
    assert what == "LoRA tax of the linears of a decoder layer"
    assert "llama-3-8b, M 8192, bf16, p 0, r 16, forward+backward: 1.100, floor 1." in result
    assert [path.name for path in gpu.figures(content, "x.json", tmp_path)] == ["x-tax.png", "x-rates.png"]
    assert all(path.stat().st_size > 0 for path in tmp_path.iterdir())
    assert gpu.figures(content | {"quick": True}, "x.json", tmp_path) == []


def test_a_layers_tax_and_floor_are_those_of_its_linears(bench):
    render = bench("gpu_sections")
    content = synthetic(bench)
    (layer,) = render.layers(content)
    assert layer["tax"]["ours"] == pytest.approx(1.1)
    assert layer["seconds"]["frozen"] == pytest.approx(7e-3)
    by_hand = 0.0
    for cell in content["cells"]:
        M, N, K = cell["M"], cell["N"], cell["K"]
        by_hand += cell["count"] * ((2 * M * N + 4 * M * K) / 4e12 + 6 * M * 16 * (N + K) / 8e14)
    assert layer["floor"] == pytest.approx(1 + by_hand / 7e-3)
    content["cells"].pop()
    assert render.layers(content) == []


def test_rounds_and_ratios(bench):
    timing = bench("gpu_timing")
    assert [timing.rounds_for(once, 1.0) for once in (0.001, 0.1, 10.0)] == [31, 10, 7]
    # The machine is twice as slow in the second round: the ratio within each round does not see it.
    assert timing.paired({"ours": [1.0, 2.0], "peft": [2.0, 4.0]}, "ours", "peft")["median"] == 0.5


def test_a_state_on_disk_reads_back(bench, tmp_path):
    state = {"kind": "k", "cells": [{"id": 1}, {"id": 2}], "correctness": {"a": {"red": ""}}, "ceilings": None}
    bench("gpu_state").write(tmp_path / "s.json", state)
    assert json.loads((tmp_path / "s.json").read_text()) == state
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_without_a_gpu_only_quick_runs(bench, capsys):
    with pytest.raises(SystemExit):
        bench("gpu").main(["--device=cpu"])
    assert "there is no GPU: --quick runs the same path on a CPU" in capsys.readouterr().err


def test_the_tuner_leaves_out_forms_that_are_red(bench):
    tune, case = bench("gpu_tune"), bench("gpu_grid").cells(quick=True)[0]
    forms = {form for form, _ in tune.choices(case, torch.device("cpu"), "expand", True)}
    assert forms == {"torch", "beta1", "pointer", "descriptor"}
    left = {form for form, _ in tune.choices(case, torch.device("cpu"), "expand", True, ["pointer"])}
    assert left == forms - {"pointer"}


def test_the_script_refuses_a_phase_it_does_not_have():
    done = subprocess.run(["bash", str(BENCH / "gpu.sh"), "table", "fly"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "no phase fly: check, tune, table, model\n")


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def fake_cuda(bench, monkeypatch):
    """The clockwork of ``gpu_timing`` without a GPU: events read the host's clock, a graph is the call itself."""
    timing, tune = bench("gpu_timing"), bench("gpu_tune")
    flushed = []
    monkeypatch.setattr(timing, "_flush_buffer", lambda device: torch.zeros(8, dtype=torch.int8))
    monkeypatch.setattr(torch.Tensor, "amax", lambda self: flushed.append(self.dtype))
    calls = {"current_device": lambda: 0, "synchronize": lambda: None, "graph_pool_handle": lambda: (0, 0)}
    for name, value in {"Event": FakeEvent, **calls}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for module in (timing, tune):
        monkeypatch.setattr(module, "captured", lambda call, pool: call)
    return flushed


def test_launches_take_turns_behind_a_flush(bench, fake_cuda):
    calls: list[str] = []

    def slow():
        calls.append("slow")
        time.sleep(0.01)

    times = bench("gpu_timing").launch_rounds({"fast": lambda: calls.append("fast"), "slow": slow}, 0.2)
    rounds = len(times["slow"])
    assert rounds == len(times["fast"]) >= 7
    assert len(calls) == len(fake_cuda) == 2 * (rounds + 2)  # and two rounds before them
    assert calls.count("fast") == calls.count("slow")
    assert len({tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)}) == 2  # in both orders
    assert min(times["slow"]) >= 0.01 > max(times["fast"])


def test_the_tuner_times_graphs_on_a_gpu(bench, fake_cuda):
    calls = {0: lambda: time.sleep(0.004), 1: lambda: None}
    took = bench("gpu_tune").seconds_of(calls, SimpleNamespace(type="cuda"), quick=True)
    assert took[0] >= 0.004 > took[1]


def test_no_garbage_is_collected_in_a_capture(bench):
    timing = bench("gpu_timing")
    with timing._no_collection():
        assert not gc.isenabled()
        with timing._no_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
