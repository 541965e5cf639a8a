"""Who may import whom, what an import costs, and what it leaves alone."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, KERNELS = ROOT / "fused_lora", ROOT / "kernels"

# From the ground up. A module may import its own room and those below. The names are the first words of modules and
# packages: "task" stands for task_layer and its sisters, "ops" for all that is in it.
ROOMS = (
    {"kernels"},
    {
        "blocks",
        "dropout",
        "plan",
        "tuned",
        "reference",
        "rank",
        "vendor",
        "derivatives",
        "registered",
        "checks",
        "pieces",
    },
    {"ops"},
    {"layer", "modules", "dora", "convolution", "parametrize", "config"},
    {"inject", "report"},
    {
        "tasks",
        "task",
        "adapters",
        "adapter",
        "convert",
        "peft",
        "substitution",
        "cli",
        "demo",
        "digits",
        "doctor",
        "accuracy",
        "compat",
    },
)
FREE = {"__init__", "__main__"}  # the public names, and the door of the command line
SHAPELESS = {"utils", "util", "common", "helpers", "misc", "backends", "registry"}


def modules(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Every module below ``folder`` by its dotted name."""
    return {
        prefix + ".".join(path.relative_to(folder).with_suffix("").parts): path for path in sorted(folder.rglob("*.py"))
    }


MODULES = {name: path for name, path in modules(PACKAGE).items() if name.split(".")[-1] not in FREE}
KERNEL_MODULES = {name: path for name, path in modules(KERNELS, "kernels.").items() if not name.endswith("__init__")}
EVERYTHING = MODULES | KERNEL_MODULES


def imports(name: str, path: Path) -> list[tuple[str, bool]]:
    """(module, whether merely importing ``name`` imports it) of every import; ours by their names in EVERYTHING."""
    package = ("fused_lora." + name).split(".")[:-1]
    found = []

    def visit(node, eager):
        if isinstance(node, ast.Import):
            found.extend((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            found.extend((".".join([*base, alias.name]), eager) for alias in node.names)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        inner = eager and not typing_only and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(path.read_text()), True)
    return [(_ours(target), eager) for target, eager in found]


def _ours(target: str) -> str:
    """ "ops.linear" for "fused_lora.ops.linear.lora_linear", "fused_lora" for a name of the package itself."""
    if target.split(".")[0] != "fused_lora":
        return target
    parts = target.split(".")[1:]
    while parts and ".".join(parts) not in EVERYTHING:
        parts.pop()
    return ".".join(parts) or "fused_lora"


def room(name: str) -> int:
    for level, words in enumerate(ROOMS):
        if re.split("[._]", name)[0] in words:
            return level
    raise AssertionError(f"{name} has no room: say in ROOMS of {Path(__file__).name} what it may import")


@pytest.mark.parametrize("name", EVERYTHING)
def test_imports_go_down(name):
    for target, _ in imports(name, EVERYTHING[name]):
        if target in EVERYTHING:
            assert room(target) <= room(name), f"{name} imports {target}, which is above it"
        if target == "fused_lora":
            assert room(name) == len(ROOMS) - 1, f"{name} imports the package that imports it"


def test_no_module_imports_itself_in_a_circle():
    graph = {
        name: {target for target, _ in imports(name, path) if target in EVERYTHING} for name, path in EVERYTHING.items()
    }
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    # demo and its report are written as one and split in two files.
    assert graph.keys() <= {"demo", "demo_report"}, f"a circle among {sorted(graph)}"


@pytest.mark.parametrize("name", KERNEL_MODULES)
def test_kernels_know_nothing_of_the_package(name):
    for target, _ in imports(name, KERNEL_MODULES[name]):
        assert target in KERNEL_MODULES or target.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}, target


def test_tiles_are_pure_python():
    """The planner reads them everywhere, with or without triton."""
    for target, _ in imports("kernels.tiles", KERNELS / "tiles.py"):
        assert target.split(".")[0] in sys.stdlib_module_names, target


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("compat")])
def test_drop_ins_use_public_names(name):
    """Of what lies outside their folder; a name with an underscore is its own module's."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 1:
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            assert not private, f"{name} imports {', '.join(private)} of {node.module}"


def test_ops_do_not_import_each_other():
    operators = [name for name in MODULES if name.startswith("ops.")]
    for name in operators:
        assert not [target for target, _ in imports(name, MODULES[name]) if target in operators and target != name]


def test_the_reference_shares_only_the_mask():
    """Or it would be no oracle."""
    assert {target for target, _ in imports("reference", MODULES["reference"]) if target in EVERYTHING} == {"dropout"}


@pytest.mark.parametrize("name", MODULES)
def test_importing_a_module_needs_torch_and_nothing_else(name):
    for target, eager in imports(name, MODULES[name]):
        if eager and target not in MODULES:
            top = target.split(".")[0]
            allowed = top in {"torch", "fused_lora", *sys.stdlib_module_names} or target == "kernels.tiles"
            assert allowed, f"{name} imports {target} at its top; import it where it is used"


def test_every_module_says_what_it_is_about():
    shapeless = [name for name in EVERYTHING if name.split(".")[-1] in SHAPELESS]
    assert not shapeless, f"{shapeless}: name a module after what it does"


IMPORT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())

import logging, os, random, warnings
import torch

def state():
    return dict(
        dtype=torch.get_default_dtype(), device=torch.get_default_device(), threads=torch.get_num_threads(),
        interop=torch.get_num_interop_threads(), grad=torch.is_grad_enabled(), rng=torch.get_rng_state().tolist(),
        random=random.getstate(), deterministic=torch.are_deterministic_algorithms_enabled(),
        precision=torch.get_float32_matmul_precision(), tf32=torch.backends.cuda.matmul.allow_tf32,
        anomaly=torch.is_anomaly_enabled(), cuda=torch.cuda.is_initialized(), environ=dict(os.environ),
        path=list(sys.path), filters=list(warnings.filters), handlers=list(logging.getLogger().handlers),
        linear=(torch.nn.functional.linear, torch.nn.Linear.forward, torch.nn.Module.__call__, torch.Tensor.__matmul__),
        excepthook=sys.excepthook, dynamo="torch._dynamo" in sys.modules,
    )

before = state()
loaded = set(sys.modules)
import fused_lora
import fused_lora.compat.loralib, fused_lora.compat.torchtune
after = state()
assert not torch.cuda.is_initialized()
for name in before:
    assert before[name] == after[name], name
new = {{name.split(".")[0] for name in set(sys.modules) - loaded}}
heavy = new & {{"numpy", *{peers!r}}}
assert not heavy, heavy
"""
PEERS = (
    *("triton", "peft", "transformers", "safetensors", "sklearn", "rich", "matplotlib", "tqdm"),
    *("torchtune", "torchao", "loralib"),
)


@pytest.mark.parametrize("absent", [(), PEERS], ids=["with everything installed", "with torch alone"])
def test_import_takes_nothing_prints_nothing_and_changes_nothing(absent, tmp_path):
    command = [sys.executable, "-W", "error", "-c", IMPORT.format(absent=absent, peers=PEERS)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr == ""


def test_the_folder_of_the_kernels_is_no_package_of_its_own():
    """PyPI has a package named ``kernels``, and transformers imports it. ``pytest`` keeps the root off the path."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not Path(spec.origin or "").is_relative_to(ROOT), "run pytest, not python -m pytest"
    found = importlib.util.find_spec("fused_lora.kernels")
    assert found is not None
    assert Path(found.origin).parent in (KERNELS, PACKAGE / "kernels")
