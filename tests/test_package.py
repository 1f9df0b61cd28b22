"""The wheel works by itself: from any directory, also from one whose folders have the names of our packages."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from cpt_merge.launcher.stages import pipeline
from tests.launcher.conftest import pair, recipe, recipe_path, shared, texts  # noqa: F401
from tests.processes import ROOT, Process, Processes

pytestmark = pytest.mark.slow
NAMES = (
    "core", "checkpoint", "data", "merge", "training", "tracking", "evaluation", "tokenizer_ext",
    "report", "launcher", "cluster", "slurm", "recipes",
)  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a fresh virtual environment with the wheel. It finds the dependencies in ours."""
    folder = tmp_path_factory.mktemp("package")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith(("tests/", "docs/", "benchmarks/")):
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--quiet"]
    build = [*pip, "wheel", str(folder / "source"), "--no-build-isolation", *offline]
    subprocess.run([*build, "--wheel-dir", str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")

    venv.create(folder / "venv", symlinks=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = str(folder / "venv" / "bin" / "python")
    subprocess.run([*pip, "--python", python, "install", str(wheel), *offline], check=True)
    return folder / "venv" / "bin"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with empty folders of all the names that our packages have."""
    for name in NAMES:
        (tmp_path / name).mkdir()
    return tmp_path


def run(environment: Path, here: Path, processes: Processes, *words: str | Path) -> Process:
    return processes.run(environment / "cpt-merge", *words, cwd=here, env={"PYTHONPATH": ""})


def test_the_package_of_the_wheel_is_the_one_that_runs(
    environment: Path, here: Path, processes: Processes
) -> None:
    code = "import cpt_merge, cpt_merge.core.package as p; print(cpt_merge.__file__, p.checkout())"
    python = environment / "python"
    done = processes.run(python, "-c", code, cwd=here, env={"PYTHONPATH": ""})
    file, checkout = done.stdout.split()
    assert Path(file).is_relative_to(environment.parent), done.stderr
    assert checkout == "None"
    assert run(environment, here, processes, "--version").stdout.startswith("cpt-merge ")


def test_recipes_and_scripts_are_in_the_wheel(
    environment: Path, here: Path, processes: Processes, recipe_path: Path  # noqa: F811
) -> None:  # fmt: skip
    example = run(environment, here, processes, "example", "demo").stdout
    assert example == (ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    zero = "launch.accelerate_config=zero2"
    planned = run(environment, here, processes, "plan", recipe_path, zero)
    assert planned.returncode == 0, planned.stderr
    assert "6 steps of 256 tokens" in planned.stdout

    submitted = run(environment, here, processes, "submit", "--dry-run", recipe_path)
    assert submitted.returncode == 0, submitted.stderr
    call = shlex.split(submitted.stderr)
    (script,) = [Path(word) for word in call if word.endswith("cpt_merge.sh")]
    assert script.is_relative_to(environment.parent)
    assert script.is_file()
    assert f"CPT_MERGE_PYTHON={environment / 'python'}" in call


def test_two_processes_train(
    environment: Path, here: Path, processes: Processes, recipe_path: Path  # noqa: F811
) -> None:  # fmt: skip
    runs = f"runs={here / 'runs'}"
    for stage in pipeline(None, dpo=False)[:4]:
        done = run(environment, here, processes, stage.command, recipe_path, runs)
        assert done.returncode == 0, done.stderr
    assert "FSDP2: 2 shards, 2 processes" in done.stderr
    run_folder = here / "runs" / "tiny"
    assert (run_folder / "merge" / "chat" / "model.safetensors").is_file()
    record = json.loads((run_folder / "training" / "stage.json").read_text())
    assert record["versions"]["cpt-merge"] != "not installed"
