"""The command ``check``, and what ends any command early: code of a model that exits, a closed pipe, a full disk."""

import os
import subprocess
import sys

import adapter_nets as nets
import pytest
from test_cli import refused

from fused_lora import LoRAConfig, apply_lora, check_adapter, cli, save_adapter
from fused_lora.adapter_files import WEIGHTS_FILE


@pytest.fixture
def folder(tmp_path):
    return save_adapter(apply_lora(nets.make_net(), LoRAConfig(target_modules=["up"])), tmp_path / "adapter")


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write the user's module ``users_model``, which is imported from the current folder."""
    monkeypatch.chdir(tmp_path)
    yield (tmp_path / "users_model.py").write_text
    sys.modules.pop("users_model", None)


# ---- --model module:factory


@pytest.mark.parametrize(
    "text",
    [
        "import sys\ndef make(): sys.exit(0)\n",
        "import sys\nsys.exit(0)\n",
        "import sys\ndef make(): sys.exit('no weights here')\n",
    ],
    ids=["factory", "import", "with words"],
)
def test_a_model_whose_code_exits_cannot_be_made(capsys, folder, user_module, text):
    user_module(text)
    message = refused(capsys, "check", str(folder), "--model", "users_model:make")
    assert "--model users_model:make" in message
    assert ("no weights here" if "no weights" in text else "SystemExit: 0") in message


def test_a_models_module_does_not_read_the_commands_arguments(capsys, folder, user_module, monkeypatch):
    arguments = ["check", str(folder), "--model", "users_model:make"]
    monkeypatch.setattr(sys, "argv", ["fused-lora", *arguments])
    user_module(
        "import argparse, adapter_nets\n"
        "parser = argparse.ArgumentParser()\nparser.add_argument('--model', default='small')\n"
        "on_import = parser.parse_args().model\n"
        "def make():\n    assert (on_import, parser.parse_args().model) == ('small', 'small')\n"
        "    return adapter_nets.make_net()\n"
    )
    assert cli.main(arguments) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert sys.argv == ["fused-lora", *arguments]


@pytest.mark.parametrize("args", [["check", ""], ["check", "adapter", "--subfolder", ""]], ids=["path", "subfolder"])
def test_an_empty_path_is_a_mistake_on_the_command_line(capsys, args):
    assert "''" in refused(capsys, *args)


def test_the_command_names_its_own_option_for_links(capsys, folder, tmp_path):
    (folder / WEIGHTS_FILE).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS_FILE).symlink_to(tmp_path / "elsewhere")
    assert cli.main(["check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "pass --follow-symlinks if" in out
    assert "follow_symlinks=True" not in out
    assert "pass follow_symlinks=True if" in str(check_adapter(folder))
    assert cli.main(["check", str(folder), "--follow-symlinks"]) == 0


# ---- output that cannot be written


def written_to(output, *args, unbuffered):
    """(exit code, stderr) of the command with its output going there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    program = [sys.executable, "-m", "fused_lora", *map(str, args)]
    done = subprocess.run(program, stdout=output, stderr=subprocess.PIPE, text=True, env=environment)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("command", "unbuffered"), [("check", True), ("check", False), ("--help", False)], ids=["now", "late", "help"]
)
def test_a_reader_that_leaves_is_no_failure(folder, command, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        args = [command, folder] if command == "check" else [command]
        assert written_to(writer, *args, unbuffered=unbuffered) == (141, "")
    finally:
        os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", [True, False], ids=["unbuffered", "buffered"])
def test_output_that_cannot_be_written_is_an_error_in_one_line(folder, unbuffered):
    with open("/dev/full", "w") as full:
        code, err = written_to(full, "check", folder, unbuffered=unbuffered)
    assert code == 2
    assert err.startswith("fused-lora: error: ")
    assert "No space left" in err
    assert err.count("\n") == 1
