"""The command line: what a user sees, the exit codes, and that a wrong result is reported as one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fused_lora import LoRALinear, accuracy, cli, demo, demo_report, digits, doctor, save_adapter
from fused_lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE

CPU = torch.device("cpu")


def run_program(*args, env=None, **options):
    """A python program of its own, without the interpreter that conftest sets, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environment, **options)


def refused(capsys, *args):
    """The one line that a wrong command line gives, with exit code 2 and nothing on stdout."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(args))
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    return err


# ---- doctor


def test_doctor_checks_every_strategy(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "torch on cpu" in out
    assert "triton on cpu" in out  # under the interpreter, which conftest sets
    assert "All numeric checks passed." in out
    assert " NO" not in out
    assert all(len(line) < 80 for line in out.splitlines())


def test_doctor_says_why_triton_cannot_run():
    done = run_program("-m", "fused_lora", "doctor")
    assert done.returncode == 0, done.stderr
    assert "cannot run: the tensors are on the CPU" in done.stdout
    assert "triton on cpu" not in done.stdout


def test_doctor_reports_a_wrong_result(capsys, monkeypatch):
    def without_branch(x, weight, a, b, scale, bias, **_):
        return torch.nn.functional.linear(x, weight, bias) + 0 * (a.sum() + b.sum())

    monkeypatch.setattr(accuracy, "lora_linear", without_branch)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"Numeric checks that FAILED: {2 * len(doctor._REGIMES)}." in out
    assert "passed" not in out


def test_doctor_survives_a_strategy_that_raises(capsys, monkeypatch):
    def broken(case, strategy):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(doctor, "compare", broken)
    assert cli.main(["doctor"]) == 1
    assert "FAILED: RuntimeError: no kernel image is available" in capsys.readouterr().out


# ---- demo


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One quick run of the demo: (its output, its folder)."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    done = run_program("-m", "fused_lora", "demo", "--quick", "--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder


def row(text, start):
    """The words of the only line that begins with ``start``, after it."""
    (line,) = (line for line in text.splitlines() if line.strip().startswith(start))
    return line.strip().removeprefix(start).split()


def percent(word):
    return float(word.rstrip("%"))


def test_demo_mends_the_weak_digit(finished):
    out, _ = finished
    _, before, after, change = row(out, "8 (weak)")
    assert percent(before) < 50
    assert percent(after) > 60
    assert float(change) > 40
    _, before, after, _ = row(out, "mean of the other nine")
    assert percent(before) > 90
    assert percent(after) > 85


def test_demo_claims_hold(finished):
    out, _ = finished
    for claim in ("6 frozen weights", "with LoRA switched off", "the adapter file"):
        assert row(out, claim)[-1] == "yes"
    for result in accuracy.RESULTS:
        assert row(out, f"{result} ")[-1] == "yes"


def test_demo_counts_and_times(finished):
    out, _ = finished
    base = 64 * 1000 + 1000 + 1000 * 2000 + 2000 + 2000 * 10 + 10
    adapters = 8 * (64 + 1000 + 1000 + 2000 + 2000 + 10)
    assert row(out, "whole network") == [f"{base + adapters:,}", f"{adapters:,}", f"{adapters / (base + adapters):.2%}"]
    for layer in ("fused LoRALinear, ms", "plain PyTorch LoRA layer, ms"):
        median, lower, upper = map(float, row(out, layer))
        assert 0 < lower <= median <= upper


def test_demo_writes_an_adapter_and_a_figure(finished):
    out, folder = finished
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, demo.FIGURE_FILE]
    assert str(folder / WEIGHTS_FILE) in out
    assert (folder / demo.FIGURE_FILE).read_bytes().startswith(b"\x89PNG")
    tensors = load_file(folder / WEIGHTS_FILE)
    assert {name.removeprefix("base_model.model."): tuple(t.shape) for name, t in tensors.items()} == {
        "fc1.lora_A.weight": (8, 64),
        "fc1.lora_B.weight": (1000, 8),
        "fc2.lora_A.weight": (8, 1000),
        "fc2.lora_B.weight": (2000, 8),
        "fc3.lora_A.weight": (8, 2000),
        "fc3.lora_B.weight": (10, 8),
    }
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 16, ["fc1", "fc2", "fc3"])


def test_demo_overwrites_its_own_files_and_no_others(finished, capsys, tmp_path):
    _, folder = finished
    demo.check(demo.Settings(out=folder))  # a second run is welcome
    foreign = tmp_path / WEIGHTS_FILE
    for write in (lambda: save_file({"a": torch.ones(1)}, foreign), lambda: foreign.write_text("notes")):
        write()
        kept = foreign.read_bytes()
        assert "--out" in refused(capsys, "demo", "--out", str(tmp_path))
        assert foreign.read_bytes() == kept


def test_demo_overwrites_no_other_figure(finished, capsys, tmp_path):
    figure = tmp_path / demo.FIGURE_FILE
    figure.write_bytes((finished[1] / demo.FIGURE_FILE).read_bytes())
    demo.check(demo.Settings(out=tmp_path))  # its own, copied
    for write in (lambda: plain_figure(figure), lambda: figure.write_text("notes")):
        write()
        kept = figure.read_bytes()
        assert "is not this demo's" in refused(capsys, "demo", "--out", str(tmp_path))
        assert figure.read_bytes() == kept


def plain_figure(path):
    from matplotlib.figure import Figure

    Figure().savefig(path)


def test_a_narrow_terminal_cuts_no_figure(capsys, monkeypatch):
    def tables(columns):
        monkeypatch.setenv("COLUMNS", columns)
        report = demo_report.Report()
        report.accuracies(8, digits.load(8, 0, CPU).test, [[0.25] * 10, [0.975] * 10])
        report.errors({"dx": accuracy.Error(1e-7, 2e-7, 3e-8, 4e-8)})
        report.step_times([[1.0, 2.0], [1.5, 2.5], [1.25, 2.25]])
        return capsys.readouterr().out

    assert "…" not in tables("40")
    assert tables("40") == tables("80")


def little_training(seed):
    torch.manual_seed(seed)
    data = digits.load(8, seed, CPU)
    base = digits.build_network(CPU)
    network = digits.with_lora(base, lambda linear: LoRALinear.from_linear(linear, r=4, lora_dropout=0.1))
    list(digits.train(network, data.domain, 1))
    return data, network


def test_same_seed_same_network():
    (data, first), (_, second) = little_training(3), little_training(3)
    assert digits.accuracies(first, data.test) == digits.accuracies(second, data.test)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def test_base_training_sees_little_of_the_weak_digit():
    data = digits.load(5, 0, CPU)
    assert len(data.train) + len(data.test) == 1797
    assert data.base.count(5) == digits.SHOWN
    assert data.domain.count(5) == data.train.count(5) > 100
    assert all(data.test.count(digit) > 40 for digit in range(10))


def test_claims_can_fail(tmp_path):
    data, network = little_training(0)
    frozen = {name: t.clone() for name, t in network.state_dict().items() if "lora" not in name}
    save_adapter(network, tmp_path)
    for layer in digits.lora_layers(network).values():
        layer.enabled = False
    base_logits = digits.logits(network, data.test)
    for layer in digits.lora_layers(network).values():
        layer.enabled = True

    def claims():
        return list(demo.check_claims(network, frozen, base_logits, data.test, tmp_path).values())

    assert claims() == [True, True, True]
    with torch.no_grad():
        network.fc3.lora_b[0, 0] += 1
    assert claims() == [True, True, False]
    with torch.no_grad():
        network.fc3.weight[0, 0] += 1
    assert claims() == [False, False, False]


def test_a_broken_claim_is_exit_code_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "check_claims", lambda *_: {"the frozen weights stay": False})
    monkeypatch.setattr(demo.Settings, "base_epochs", 1)
    monkeypatch.setattr(demo.Settings, "timing_rounds", 2)
    assert cli.main(["demo", "--epochs", "1", "--out", str(tmp_path)]) == 1
    assert row(capsys.readouterr().out, "the frozen weights stay") == ["NO"]


# ---- mistakes


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["demo", "--rank", "0"], ("rank", "0")),
        (["demo", "--rank", "many"], ("--rank", "many")),
        (["demo", "--epochs", "0"], ("epochs", "0")),
        (["demo", "--digit", "10"], ("digit", "10")),
        (["demo", "--seed", "-1"], ("seed", "-1")),
        (["demo", "--dropout", "1.5"], ("dropout", "1.5")),
        (["demo", "--device", "abacus"], ("abacus", "cpu")),
        (["demo", "--device", "meta"], ("meta", "cpu")),
        (["demo", "--device", "cuda:99"], ("cuda:99", "GPUs")),
        (["demo", "--out", ""], ("--out", "a folder is needed", "''")),
        (["demo", "--fast"], ("--fast",)),
        (["doctor", "now"], ("now",)),
        ([], ("required",)),
        (["tune"], ("tune",)),
    ],
)
def test_mistakes_name_the_value(capsys, args, words):
    message = refused(capsys, *args)
    assert all(word in message for word in words)


def test_out_must_be_a_folder(capsys, tmp_path):
    path = tmp_path / "taken"
    path.write_text("a user's notes")
    assert "is a file" in refused(capsys, "demo", "--out", str(path))
    assert "taken" in refused(capsys, "demo", "--out", str(path / "below"))
    assert path.read_text() == "a user's notes"


def test_missing_packages_name_the_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "_PACKAGES", (("scikit-learn", "sklearn"), ("rich", "no_such_package")))
    message = refused(capsys, "demo", "--out", str(tmp_path / "new"))
    assert "rich" in message
    assert "scikit-learn" not in message
    assert "pip install 'fused-lora[demo]'" in message
    assert not (tmp_path / "new").exists()


def test_help_and_version(capsys):
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as stop:
            cli.main([option])
        assert stop.value.code == 0
        assert "fused-lora" in capsys.readouterr().out


def test_importing_the_command_imports_no_extra():
    names = ("rich", "sklearn", "matplotlib", "safetensors", "triton", "peft")
    done = run_program("-c", f"import sys, fused_lora.cli; print([n for n in {names} if n in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


# ---- bench


def test_bench_outside_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "fused_lora" / "cli.py"))
    assert "clone" in refused(capsys, "bench")


@pytest.mark.parametrize("expected", [0, 1])
def test_bench_runs_pytest_on_the_folder(monkeypatch, capfd, tmp_path, expected):
    """Options and exit code pass through; the root, with its folder ``kernels``, stays off the path."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "fused-lora"\n')
    for folder in ("bench", "kernels", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bench" / "test_path.py").write_text(
        f"import sys\ndef test_first():\n    assert {str(tmp_path)!r} not in sys.path and '' not in sys.path\n"
        f"    assert {expected} == 0\ndef test_other(): assert False\n"
    )
    monkeypatch.chdir(tmp_path / "docs")
    assert cli.main(["bench", "-k", "first", "-p", "no:cacheprovider"]) == expected
    assert "1 deselected" in capfd.readouterr().out
