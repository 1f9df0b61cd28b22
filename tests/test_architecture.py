"""Imports between packages point one way, no modules import each other, and light modules stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOWER = {"core", "checkpoint", "tracking"}
STAGES = {"tokenizer_ext", "data", "training", "finetune", "merge", "evaluation"}
TOP = {"launcher", "report", "cluster"}

ALLOWED = {  # what each package may import, besides itself
    "core": set(),
    "checkpoint": {"core"},
    "tracking": {"core"},
    "data": LOWER,
    "tokenizer_ext": LOWER | {"data"},
    "merge": LOWER,
    "training": LOWER | {"data", "merge"},  # the preview and the post-training hook
    "finetune": LOWER | {"data", "training"},
    "evaluation": LOWER | {"data", "merge"},  # the sweep
    "launcher": LOWER | STAGES | TOP,
    "report": LOWER | STAGES | TOP,
    "cluster": LOWER | STAGES | TOP,
}


def modules() -> dict[str, Path]:
    """Every module of the package by name. `__main__.py` files are entry points and may import the launcher."""
    found = {}
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__main__.py":
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(["cpt_merge", *(part for part in parts if part != "__init__")])] = (
                    path
                )
    return found


MODULES = modules()


def imports(module: str) -> Iterator[str]:
    """The full names that a module imports, at its top and within functions."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module} has a relative import"
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield full if full in MODULES else node.module


def package_of(name: str) -> str:
    return name.removeprefix("cpt_merge.").partition(".")[0]


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_is_below_it(package: str) -> None:
    own = [module for module in MODULES if package_of(module) == package]
    assert own
    for module in own:
        used = {package_of(name) for name in imports(module) if name.startswith("cpt_merge.")}
        beyond = (used & set(ALLOWED)) - ALLOWED[package] - {package}
        assert not beyond, f"{module} imports {beyond}"


def test_no_modules_import_each_other() -> None:
    graph = {module: {name for name in imports(module) if name in MODULES} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as cycle:
        pytest.fail(" <- ".join(cycle.args[1]))


def test_only_tracking_imports_wandb() -> None:
    for module in MODULES:
        if package_of(module) != "tracking":
            assert "wandb" not in {name.partition(".")[0] for name in imports(module)}, module


@pytest.mark.parametrize(
    "module",
    ["launcher.cli", "launcher.plan", "merge.files", "checkpoint.reader"],
)
def test_the_command_line_and_the_file_merge_start_without_torch(module: str) -> None:
    heavy = ("torch", "transformers", "datasets", "wandb")
    code = f"import sys, cpt_merge.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_no_call_lets_transformers_run_a_models_own_code() -> None:
    """Without `trust_remote_code=False`, transformers asks on the terminal, and `y` runs it."""
    asking = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of = node.func.value
            loads = node.func.attr in ("from_pretrained", "from_config")
            automatic = isinstance(of, ast.Name) and of.id.startswith("Auto")
            values = {one.arg: one.value for one in node.keywords}
            answer = values.get("trust_remote_code")
            is_no = isinstance(answer, ast.Constant) and answer.value is False
            if loads and automatic and of.id != "AutoHfQuantizer" and not is_no:
                asking.append(f"{name}:{node.lineno}")
    assert asking == []
