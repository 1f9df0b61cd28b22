"""The arrows between the folders point one way (docs/design.md), and light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = {"tokenizer_ext", "training", "merge", "evaluation"}
LOWER = {"tracking", "checkpoint", "core"}
FOLDERS = STAGES | LOWER | {"launcher"}

ALLOWED = {
    "core": set(),
    "checkpoint": {"core"},
    "tracking": {"core"},
    "tokenizer_ext": LOWER,
    "merge": LOWER,
    "evaluation": LOWER | {"merge"},  # the sweep adds the vector itself
    "training": LOWER | {"merge"},
    "launcher": STAGES | LOWER,
}


def imports(path: Path) -> set[str]:
    """The top-level names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_imports_only_what_lies_below_it(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*.py") if path.name != "__main__.py"]
    assert files
    for path in files:
        beyond = (imports(path) & FOLDERS) - ALLOWED[folder] - {folder}
        assert not beyond, f"{path.relative_to(ROOT)} imports {beyond}"


def test_wandb_is_known_to_tracking_only() -> None:
    for folder in FOLDERS - {"tracking"}:
        for path in (ROOT / folder).rglob("*.py"):
            assert "wandb" not in imports(path), path


@pytest.mark.parametrize("module", ["launcher.cli", "launcher.plan", "merge.run", "checkpoint.reader"])
def test_the_command_line_and_the_file_merge_start_without_torch(module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers', 'datasets', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
