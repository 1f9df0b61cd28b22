"""From text to chat model by sbatch: the same bytes as on one machine; a merge by three nodes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cpt_merge.recipes.demo.corpus import CorpusSettings, build_language
from tests.slurm.cluster import ROOT, SlurmCluster, SlurmJob
from tests.slurm.jobs import MODELS, differing, start

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="session")
def one_machine(
    recipe_path: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run on this machine with as many processes, started by torchrun."""
    runs = tmp_path_factory.mktemp("one-machine") / "runs"
    shutil.copytree(prepared, runs)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4"]
    training = ["-m", "cpt_merge.training", str(recipe_path), f"runs={runs}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, *training], cwd=ROOT, check=True, env=environment)
    return runs / "demo"


@pytest.mark.parametrize("model", MODELS)
def test_the_models_are_those_of_one_machine(
    model: str, by_sbatch: tuple[Path, SlurmJob], one_machine: Path
) -> None:
    assert not differing(by_sbatch[0] / model, one_machine / model)


def test_all_of_the_pipeline_has_run_over_both_nodes(by_sbatch: tuple[Path, SlurmJob]) -> None:
    run, job = by_sbatch
    assert "FSDP2: 4 shards, 4 processes" in job.log
    assert "preflight: 2 nodes" in job.log
    assert "the pipeline is finished" in job.log
    assert (run / "report.html").is_file()
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert results
    logs = {path.name for path in (run / "slurm" / f"{job.id}-0").glob("train-rank-*.log")}
    assert logs == {f"train-rank-{rank:04d}-node{rank // 2 + 1}.log" for rank in range(4)}
    for stage in ("tokenizer", "embeddings", "data", "training", "merge", "evaluation"):
        assert (run / stage / "stage.json").is_file()


def test_a_merge_over_three_nodes_has_the_digest_of_one_process(
    cluster: SlurmCluster, one_machine: Path, inputs: Path, tmp_path: Path
) -> None:
    cpt = one_machine / "training" / "cpt"
    models = [f"--cpt={cpt}", f"--base={inputs / 'base'}", f"--chat={inputs / 'chat'}"]
    command = [sys.executable, "-m", "cpt_merge", "merge-models", *models]
    subprocess.run([*command, f"--out={tmp_path / 'alone'}"], cwd=ROOT, check=True)
    srun = "srun --nodes=3 --ntasks-per-node=2 --ntasks=6".split()
    cluster.slurm(*srun, *command, f"--out={tmp_path / 'nodes'}")
    assert not differing(tmp_path / "alone", tmp_path / "nodes")


def test_fine_tuning_and_preferences_run_over_both_nodes(
    cluster: SlurmCluster, by_sbatch: tuple[Path, SlurmJob], recipe_path: Path, tmp_path: Path
) -> None:
    """A second job of the same run, whose recipe asks for more, takes over its CPT."""
    runs, recipe = tmp_path / "runs", yaml.safe_load(recipe_path.read_text(encoding="utf-8"))
    shutil.copytree(by_sbatch[0], runs / "demo")
    settings = {"sequence_length": 128, "global_batch_size": 4, "epochs": 1, "heldout": 0.1}
    said = build_language("ko", CorpusSettings()).conversations[:150]
    turns = [{"instruction": asked, "output": reply} for asked, reply, *_ in said]
    pairs = [
        {"prompt": asked, "chosen": reply, "rejected": other}
        for (asked, reply, *_), (_, other, *_) in itertools.pairwise(said)
        if reply != other
    ]
    for section, rows in (("finetune", turns), ("dpo", pairs)):
        path = tmp_path / f"{section}.jsonl"
        path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
        recipe[section] = {**settings, "sources": [{"path": str(path), "language": "ko"}]}
    further = tmp_path / "further.yaml"
    further.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    job = start(cluster, further, runs)
    assert job.wait_for_end() == "COMPLETED", job.log
    assert "the pipeline is finished" in job.log
    assert job.log.count("FSDP2: 4 shards, 4 processes") == 2  # training is not repeated
    results = json.loads((runs / "demo" / "evaluation" / "results.json").read_text())
    assert list(results["models"])[2:] == ["cpt", "merged", "tuned", "tuned_merged", "aligned"]
