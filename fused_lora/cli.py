"""The command ``fused-lora``: doctor, demo, check, bench.

Exit code: 0 all is well; 1 a check failed, or found something; 2 the command line cannot be followed, or the output not
written (one line on stderr says why); 130 interrupted; 141 whoever read the output left.
``bench`` returns pytest's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import __version__, demo, doctor
from .adapter_files import FOLLOW_LINKS, AdapterError
from .adapters import check_adapter

if TYPE_CHECKING:
    from torch import nn

_READER_LEFT = 141  # what a shell reports of a program that SIGPIPE ended, as it does other tools before | head


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line (default: ``sys.argv``) and return the exit code.

    Raises:
        SystemExit: code 2 for a mistake in the arguments, 0 for --help and --version.
    """
    try:
        try:
            return _run(argv)
        finally:
            _flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # | head: no mistake
        _drop_output()
        return _READER_LEFT
    except OSError as error:
        print(f"fused-lora: error: {error}", file=sys.stderr)
        return 2


def _flush() -> None:
    """Writes what is waiting: what cannot be written shows here, not when the interpreter is gone."""
    try:
        print(end="", flush=True)
    except OSError:
        _drop_output()
        raise


def _drop_output() -> None:
    """Have what is still to be written go nowhere, so that the interpreter does not fail on it once more at its end."""
    with contextlib.suppress(OSError):  # a stdout that is no file needs nothing
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _run(argv: list[str] | None) -> int:
    parser = _Parser(prog="fused-lora", description="LoRA linear layers, fused forward and backward.")
    parser.add_argument("--version", action="version", version=f"fused-lora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{doctor,demo,check,bench}", required=True)
    commands.add_parser("doctor", help="what is installed, what can run here, and whether it computes right")
    _add_demo(commands.add_parser("demo", help="fine-tune a network on handwritten digits with the fused layer"))
    _add_check(commands.add_parser("check", help="what would go wrong, or silently wrong, in loading an adapter"))
    commands.add_parser(
        "bench", help="run the benchmarks of a checkout", epilog="Other options go to pytest: see bench/README.md."
    )
    args, rest = parser.parse_known_args(argv)
    command: argparse.ArgumentParser = commands.choices[args.command]
    if rest and args.command != "bench":
        command.error(f"unknown arguments: {' '.join(rest)}; see --help")
    if args.command == "bench":
        return _bench(rest, command)
    if args.command == "check":
        return _check(args, command)
    return doctor.run() if args.command == "doctor" else _demo(args, command)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    usual = demo.Settings()
    parser.add_argument("--seed", type=int, help="of the split, the training and the dropout (%(default)s)")
    parser.add_argument("--digit", type=int, help="the digit that the base network is weak on, 0 to 9 (%(default)s)")
    parser.add_argument("--rank", type=int, help="of the adapters (%(default)s)")
    parser.add_argument("--dropout", type=float, help="on the input of the adapters, 0 to 1 (%(default)s)")
    parser.add_argument("--epochs", type=int, help=f"of fine-tuning ({usual.tuning_epochs}, fewer with --quick)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:0; auto is a GPU where there is one (%(default)s)")
    parser.add_argument("--out", type=demo.folder, help="folder for the adapter and the figure (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="less training and fewer timed steps")
    parser.set_defaults(**vars(usual))


def _demo(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    settings = demo.Settings(**{name: value for name, value in vars(args).items() if name != "command"})
    try:
        demo.check(settings)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        parser.error(str(error))
    return demo.run(settings)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="directory of adapter_config.json and adapter_model.safetensors")
    parser.add_argument(
        "--model",
        help="what the adapter is for: a transformers model, by directory or name, of which the config alone is read; "
        "or module:factory, a function of yours without arguments that returns the model. Default: check the files "
        "alone",
    )
    parser.add_argument("--subfolder", help="of PATH, as PEFT has it for adapters with a name")
    parser.add_argument("--follow-symlinks", action="store_true", help="read files through links that leave PATH")


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if not args.path:
        parser.error("PATH is '': name the adapter's directory")
    model = None if args.model is None else _model(args.model, parser)
    try:
        report = check_adapter(args.path, model, subfolder=args.subfolder, follow_symlinks=args.follow_symlinks)
    except (AdapterError, ModuleNotFoundError) as error:
        parser.error(str(error))
    print(str(report).replace(FOLLOW_LINKS, "pass --follow-symlinks"))
    return 0 if report.ok else 1


def _model(name: str, parser: argparse.ArgumentParser) -> nn.Module:
    """The model that --model means."""
    module, colon, factory = name.partition(":")
    try:
        if colon and not Path(name).exists():
            with _arguments_of(name):
                return _made_by(module, factory)
        return _transformers_model(name)
    except SystemExit as error:  # let through, exit(0) would read as an adapter without a finding
        parser.error(f"--model {name}: it ends the program (SystemExit: {error}) instead of giving a model")
    except Exception as error:  # whatever the user's code or transformers raise, one line says it
        parser.error(f"--model {name}: {type(error).__name__}: {error}")


@contextlib.contextmanager
def _arguments_of(program: str) -> Iterator[None]:
    """A command line without arguments: a module that reads its own on import must not read ours."""
    ours, sys.argv = sys.argv, [program]
    try:
        yield
    finally:
        sys.argv = ours


def _made_by(module: str, factory: str) -> nn.Module:
    from torch import nn

    # The command is not run from the current folder's Python path, where a user's module is.
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = importlib.import_module(module)
    finally:
        del sys.path[0]
    for part in factory.split("."):
        made = getattr(made, part)
    model = made if isinstance(made, nn.Module) else made()  # type: ignore[operator]
    if not isinstance(model, nn.Module):
        raise TypeError(f"it gives a {type(model).__name__}, not a module")
    return model


def _transformers_model(name: str) -> nn.Module:
    """A model of its config's architecture on the meta device: names and shapes without weights."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    architecture = next(iter(config.architectures or ()), "")
    kind = getattr(transformers, architecture, None) or transformers.AutoModel
    with torch.device("meta"):
        return kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)


def _bench(options: list[str], parser: argparse.ArgumentParser) -> int:
    """Run pytest on the checkout's ``bench/`` and return its exit code."""
    root = _checkout()
    if root is None:
        parser.error(
            "the benchmarks are not in the installed package: clone the fused-lora repository, install it with "
            "pip install -e '.[bench]' and run this command inside it"
        )
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"the benchmarks need {', '.join(missing)}: pip install 'fused-lora[bench]'")
    # Like the command pytest, and unlike python -m pytest, this keeps the checkout's root off sys.path: there its
    # folder kernels/ would hide a package that transformers imports.
    start = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    return subprocess.call([sys.executable, "-c", start, "bench", *options], cwd=root)


def _checkout() -> Path | None:
    """The root of the fused-lora checkout that we are in, or that this package runs from."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        project = folder / "pyproject.toml"
        if (folder / "bench").is_dir() and project.is_file() and 'name = "fused-lora"' in project.read_text("utf-8"):
            return folder
    return None
