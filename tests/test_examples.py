"""The scripts under examples/ that need no transformers: counts, claims, data, and a small run of each."""

import gzip
import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import nn

from fused_lora import count_parameters, lora_layers

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = ("digits", "multitask", "parametrized")


@pytest.fixture
def example(monkeypatch):
    """Import a script as python does when it runs it: with its folder on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tmp_path_factory.mktemp(name) for name in SCRIPTS}


@pytest.fixture(scope="module")
def finished():
    return {}


@pytest.fixture
def run(example, folders, finished, capsys):
    """Run a script with --quick, or return what it gave before: (exit status, what was printed, the folder)"""

    def start(name, *arguments, again=False):
        key = (name, *arguments)
        if again or key not in finished:
            status = example(name).main(["--quick", "--device", "cpu", "--out", str(folders[name]), *arguments])
            finished[key] = status, capsys.readouterr().out, folders[name]
        return finished[key]

    return start


def wanted_files(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert all(path.is_dir() or path.stat().st_size > 1000 for path in folder.iterdir())
    assert (next(folder.glob("*.png"))).read_bytes().startswith(b"\x89PNG")


class TestDigits:
    def test_counts(self, example):
        digits = example("digits")
        network = digits.build()
        assert count_parameters(network) == (2_807_010, 2_807_010, 0)
        digits.add_lora(network)
        assert count_parameters(network) == (2_813_804, 6_794, 6_794)
        assert [layer.r for _, layer in lora_layers(network)] == [1, 1, 1]

    def test_run(self, run):
        status, printed, folder = run("digits")
        assert status == 0
        assert "Before: 2,807,010 parameters" in printed
        assert "2,813,804 parameters, 6,794 trainable (0.241 %), 6,794 of LoRA" in printed
        assert printed.count("yes") == 3
        wanted_files(folder, "adapter", "digits.png")
        numbers = re.search(r"9, fine-tuned on +(\d+) +(\d+) +(\d+) +(\d+)", printed).groups()
        pictures, base, tuned, off = map(int, numbers)
        assert base == off > pictures / 2 > tuned

    def test_a_claim_that_fails_fails_the_run(self, run, example, monkeypatch):
        digits = example("digits")
        train = digits.train
        monkeypatch.setattr(digits, "train", lambda network, data, steps, what: train(network, data, 2, what))
        monkeypatch.setattr(digits, "switch", lambda network, on: None)
        status, printed, _ = run("digits", "--seed", "1")
        assert status == 1
        assert "NO" in printed

    def test_fewer_than_no_pictures(self, run, capsys):
        with pytest.raises(SystemExit) as caught:
            run("digits", "--shown", "-3")
        assert caught.value.code == 2
        assert "--shown must be at least 0, got -3" in capsys.readouterr().err

    def test_data_without_the_digit(self, run, capsys, tmp_path):
        pictures, labels = np.zeros((3, 28, 28), dtype=np.uint8), np.arange(3)
        np.savez(tmp_path / "few.npz", x_train=pictures, y_train=labels, x_test=pictures, y_test=labels)
        with pytest.raises(SystemExit) as caught:
            run("digits", "--data", str(tmp_path / "few.npz"), "--digit", "9")
        assert caught.value.code == 2
        assert "no picture of 9 to train on" in capsys.readouterr().err


class TestMultitask:
    def test_run(self, run, example):
        status, printed, folder = run("multitask")
        assert status == 0
        assert printed.count("yes") == 5
        wanted_files(folder, "bold.safetensors", "slanted.safetensors", "framed.safetensors", "styles.png")
        rows = re.findall(r"^  (\w[\w ]*?)  +(base network|tasks?=\S+(?: \S+\])?) +(0\.\d{4})", printed, re.M)
        distance = {(wanted, ran): float(value) for wanted, ran, value in rows}
        assert len(distance) == 10
        for style in ("bold", "slanted", "framed"):
            assert distance[style, f'task="{style}"'] < distance[style, "base network"]
        both = distance["slanted and framed", 'tasks=["slanted", "framed"]']
        assert both < min(distance["slanted and framed", f'task="{style}"'] for style in ("slanted", "framed"))
        differ = float(re.search(r"largest difference (\S+)", printed)[1])
        assert differ < 1e-5
        assert set(load_file(folder / "bold.safetensors")) == {
            f"{layer}.bold.lora_{factor}" for layer in ("look", "digit", "squeeze", "draw") for factor in "ab"
        }

    def test_every_kind_of_layer_has_tasks(self, example):
        model = example("multitask").with_tasks(example("multitask").Redraw(), rank=2)
        assert [type(layer.base) for layer in model.lora_layers()] == [nn.Conv2d, nn.Embedding, nn.Linear, nn.Linear]


class TestParametrized:
    def test_share(self, example):
        parametrized = example("parametrized")
        total, trainable, lora = count_parameters(parametrized.add_lora(parametrized.build()))
        assert (total, trainable, lora) == (1_384_832, 3_328, 3_328)
        assert f"{100 * trainable / total:.2f} %" == f"{100 * 6_794 / 2_807_010:.2f} %" == "0.24 %"

    def test_run(self, run):
        status, printed, folder = run("parametrized")
        assert status == 0
        assert "1,384,832 parameters, 3,328 trainable: 0.24 %" in printed
        assert printed.count("yes") == 5
        wanted_files(folder, "adapter.safetensors", "cleaned.png")
        found = re.findall(r"^  (base network|with LoRA|LoRA switched off) +(dark|bright) +(0\.\d{4})", printed, re.M)
        distance = {(name, light): float(value) for name, light, value in found}
        assert distance["with LoRA", "bright"] < distance["base network", "bright"]
        assert distance["LoRA switched off", "dark"] == distance["base network", "dark"]


class TestPictures:
    @pytest.fixture
    def mnist(self):
        g = np.random.default_rng(0)
        return {
            "x_train": g.integers(0, 256, (6, 28, 28), dtype=np.uint8),
            "y_train": np.arange(6, dtype=np.uint8),
            "x_test": g.integers(0, 256, (3, 28, 28), dtype=np.uint8),
            "y_test": np.arange(3, dtype=np.uint8),
        }

    def check(self, pictures, source, mnist):
        for part, name in zip(pictures.load(source, 0), ("train", "test"), strict=True):
            assert part.images.dtype == torch.float32
            assert torch.equal(part.images.view(-1, 28, 28), torch.from_numpy(mnist[f"x_{name}"]) / 255)
            assert part.labels.tolist() == mnist[f"y_{name}"].tolist()

    def test_npz(self, example, mnist, tmp_path):
        np.savez(tmp_path / "mnist.npz", **mnist)
        self.check(example("_pictures"), tmp_path / "mnist.npz", mnist)
        np.savez(tmp_path / "other.npz", x_train=mnist["x_train"])
        with pytest.raises(ValueError, match="has no y_train, x_test, y_test"):
            example("_pictures").load(tmp_path / "other.npz", 0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"y_train": np.arange(5)},
                r"each picture are needed, not \(6, 784\) pixels and \(5,\) labels",
            ),
            ({"x_test": np.zeros((3, 8, 8))}, r"to test: 28 x 28 pixels"),
            ({"x_train": np.zeros((0, 28, 28)), "y_train": np.zeros(0)}, "to train: 28 x 28 pixels"),
            ({"x_test": np.zeros(3)}, r"28 x 28 pixels are needed, got a tensor of shape \(3,\)"),
            ({"y_test": np.array([0, 1, 10])}, "labels are 0 to 9, not 0 to 10"),
        ],
        ids=["lengths", "sides", "empty", "flat", "labels"],
    )
    def test_npz_of_something_else(self, example, mnist, tmp_path, change, message):
        np.savez(tmp_path / "mnist.npz", **mnist | change)
        with pytest.raises(ValueError, match=message):
            example("_pictures").load(tmp_path / "mnist.npz", 0)

    @pytest.mark.parametrize("left", [0, 0.05, 0.5, 0.99])
    def test_npz_cut_short(self, example, mnist, tmp_path, left):
        path = tmp_path / "mnist.npz"
        np.savez(path, **mnist)
        path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
        with pytest.raises(ValueError, match=r"mnist\.npz is broken or cut short"):
            example("_pictures").load(path, 0)

    def test_npz_damaged_inside(self, example, mnist, tmp_path):
        path = tmp_path / "mnist.npz"
        np.savez_compressed(path, **mnist)
        data = bytearray(path.read_bytes())
        data[600:900] = bytes(300)
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"mnist\.npz is broken or cut short"):
            example("_pictures").load(path, 0)

    def test_idx_cut_short_while_packed(self, example, mnist, tmp_path):
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
            packed = gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 1]))
            (tmp_path / f"{name}-ubyte.gz").write_bytes(packed[:-4])
        with pytest.raises(ValueError, match="is broken or cut short"):
            example("_pictures").load(tmp_path, 0)

    @pytest.mark.parametrize("folder", [".", "MNIST/raw"])
    @pytest.mark.parametrize("packed", [False, True])
    def test_idx(self, example, mnist, tmp_path, folder, packed):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        for name, array in zip(names, mnist.values(), strict=True):
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            data = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
            path = tmp_path / folder / f"{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)
        self.check(example("_pictures"), tmp_path, mnist)
        path.write_bytes(gzip.compress(data[:-1]) if packed else data[:-1])
        with pytest.raises(ValueError, match="is not an IDX file of bytes"):
            example("_pictures").load(tmp_path, 0)

    def test_scikit_learns(self, example):
        train, test = example("_pictures").load(None, 0)
        assert (len(train.labels), len(test.labels)) == (1347, 450)
        assert train.images.shape[1] == 784
        assert 0 <= train.images.min() < train.images.max() <= 1
        again, _ = example("_pictures").load(None, 0)
        assert torch.equal(train.images, again.images)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_seed_prints_the_same(run, name):
    assert run(name) == run(name, again=True)


WRITTEN = {
    "digits": ("adapter", "digits.png"),
    "multitask": ("bold.safetensors", "slanted.safetensors", "framed.safetensors", "styles.png"),
    "parametrized": ("adapter.safetensors", "cleaned.png"),
    "llama_quotes": ("adapter", "base", "tags.png"),
    "t5_toxicity": ("adapter", "base", "answers.png"),
}


@pytest.mark.parametrize(("name", "written"), [(name, file) for name, files in WRITTEN.items() for file in files])
def test_a_users_own_files_stay(example, tmp_path, capsys, name, written):
    """Whatever a script would write over: refused before any training."""
    target = file = tmp_path / written
    if not file.suffix:
        target.mkdir()
        file = target / ("model.safetensors" if written == "base" else "adapter_model.safetensors")
    if file.suffix == ".png":
        Figure().savefig(file)
    else:
        save_file({"a": torch.ones(1)}, file)
    kept = file.read_bytes()
    with pytest.raises(SystemExit) as caught:
        example(name).main(["--quick", "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert f"{target} is not this script's" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert file.read_bytes() == kept


def test_a_narrow_terminal_cuts_no_figure(example, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    example("_show").table("title", ["digit", "before", "after", "change"], [("all", "12.3456", "65.4321", "53.0865")])
    assert {"all", "12.3456", "65.4321", "53.0865"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("device", ["cuda:99", "meta", "abacus"])
def test_a_device_that_is_not_here(example, tmp_path, capsys, name, device):
    with pytest.raises(SystemExit) as caught:
        example(name).main(["--quick", "--out", str(tmp_path / "out"), "--device", device])
    assert caught.value.code == 2
    assert f"{device!r}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", WRITTEN)
def test_no_folder_is_not_the_current_one(example, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example(name), "run", lambda args: pytest.fail("it was about to train"))
    with pytest.raises(SystemExit) as caught:
        example(name).main(["--quick", "--out", ""])
    assert caught.value.code == 2
    assert "--out: a folder is needed" in capsys.readouterr().err


def test_what_counts_as_a_scripts_own(example, tmp_path):
    show = example("_show")
    (tmp_path / "adapter").mkdir()
    show.make_room(tmp_path, ["adapter", "none.png"], "me")
    save_file({"a": torch.ones(2)}, tmp_path / "adapter" / "x.safetensors", {"format": "pt"})
    assert not show.signed(tmp_path / "adapter", "me")
    show.sign(tmp_path / "adapter", "me")
    assert show.signed(tmp_path / "adapter", "me")
    assert not show.signed(tmp_path / "adapter", "you")
    assert load_file(tmp_path / "adapter" / "x.safetensors")["a"].tolist() == [1, 1]
    (tmp_path / "adapter" / "y.safetensors").write_text("notes")
    assert not show.signed(tmp_path / "adapter", "me")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "pytorch_model.bin").write_text("weights of another kind")
    assert not show.signed(tmp_path / "notes", "me")
    with show.figure(tmp_path / "a.png", "me"):
        pass
    assert show.signed(tmp_path / "a.png", "me")
    assert not show.signed(tmp_path / "a.png", "m")


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_cannot_be_followed_is_an_error_of_the_command_line(run, name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)  # or it would fetch what is not there
    (tmp_path / "broken.npz").write_bytes(b"PK")
    for arguments in (
        ["--data", str(tmp_path / "none.npz")],
        ["--data", str(tmp_path / "broken.npz")],
        ["--data", str(tmp_path)],
        ["--nonsense"],
    ):
        with pytest.raises(SystemExit) as caught:
            run(name, *arguments)
        assert caught.value.code == 2
        assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(run, name, capsys):
    with pytest.raises(SystemExit) as caught:
        run(name, "--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert f"python examples/{name}.py" in printed
    for option in ("--data", "--rank", "--seed", "--device", "--out", "--quick"):
        assert option in printed


def test_runs_as_a_script_from_anywhere(tmp_path):
    command = [sys.executable, str(EXAMPLES / "digits.py"), "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=True).stdout
    assert "python examples/digits.py" in printed


def test_no_script_is_long():
    for name in (*SCRIPTS, "_pictures"):
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 250, name
