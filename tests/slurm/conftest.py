"""A cluster of three nodes, the demo's models and text, and a run that is ready for training."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import ROOT, SlurmCluster, SlurmJob, submit
from tests.slurm.jobs import SCRIPT, start

INPUTS = ROOT / "runs" / "demo-inputs"
SETTINGS = {
    "tokenizer": {
        "new_pieces": {"zh_tw": 900, "ko": 600}, "min_frequency": 3, "character_coverage": 0.98,
    },
    "training": {
        "tokens": 128 * 12 * 48, "sequence_length": 128, "global_batch_size": 12,
        "micro_batch_size": 2, "precision": "fp32", "optimizer": {"learning_rate": 1e-3},
        "log_every": 1, "evaluate_every": 24, "evaluate_sequences": 12, "continuations": 0,
        "checkpoints": {"every": 8},
    },
    "evaluation": {"max_new_tokens": 8, "samples_shown": 1},
    "tracking": {"mode": "offline"},
    "launch": {"processes": 2},
}  # fmt: skip


@pytest.fixture(scope="session")
def inputs() -> Path:
    """The demo's models and text; made once, which takes minutes."""
    command = [sys.executable, "-m", "cpt_merge.recipes.demo.prepare", "--out", str(INPUTS)]
    subprocess.run(command, cwd=ROOT, check=True)
    return INPUTS


@pytest.fixture(scope="session")
def recipe_path(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's recipe with fewer pieces, tokens and prompts; needs `runs` as an override."""
    recipe = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
    folder = tmp_path_factory.mktemp("recipe")
    prompts = (inputs / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(prompts[::40]), encoding="utf-8")
    recipe.update(SETTINGS | {"name": "demo"})
    recipe["corpus"]["heldout"] = 0.006
    recipe["evaluation"]["prompts"] = str(folder / "prompts.jsonl")
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prepared(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokenizer, embedding and data stages are finished."""
    runs = tmp_path_factory.mktemp("prepared")
    for command in ("tokenizer", "embeddings", "data"):
        words = ["-m", "cpt_merge", command, str(recipe_path), f"runs={runs}"]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    return runs


@pytest.fixture
def runs(prepared: Path, tmp_path: Path) -> Path:
    """A copy of `prepared`, to be trained."""
    shutil.copytree(prepared, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Three nodes of four CPUs."""
    if os.geteuid() != 0:
        pytest.skip("the nodes of the throw-away cluster are network namespaces, which need root")
    cluster = SlurmCluster()
    try:
        cluster.up(3)
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(autouse=True)
def _whole(cluster: SlurmCluster) -> Iterator[None]:
    """Keep one test's failure from causing the next one's."""
    yield
    cluster.restore()


@pytest.fixture(scope="session")
def undisturbed(
    cluster: SlurmCluster,
    recipe_path: Path,
    prepared: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The runs folder of an undisturbed training on 2 x 2 tasks."""
    runs = tmp_path_factory.mktemp("undisturbed") / "runs"
    shutil.copytree(prepared, runs)
    job = start(cluster, recipe_path, runs)
    assert job.wait_for_end() == "COMPLETED", job.log
    return runs


@pytest.fixture(scope="session")
def by_sbatch(
    cluster: SlurmCluster, recipe_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, SlurmJob]:
    """The run of one job, from nothing, over 2 nodes of 2 tasks."""
    folder = tmp_path_factory.mktemp("by-sbatch")
    runs = folder / "runs"
    words = ["--nodes=2", "--ntasks-per-node=2", SCRIPT, recipe_path, f"runs={runs}"]
    job = submit(cluster, folder / "job.log", *words)
    assert job.wait_for_end() == "COMPLETED", job.log
    return runs / "demo", job
