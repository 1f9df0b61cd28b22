"""Jobs of slurm/cpt_merge.sh, and their results."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from tests.slurm.cluster import SlurmCluster, SlurmJob, submit

SCRIPT = "slurm/cpt_merge.sh"
MODELS = ("embeddings/model", "training/cpt", "merge/chat")  # in a run's folder


def start(
    cluster: SlurmCluster, recipe: Path, runs: Path, *options: str, nodes: str = "2",
    two: str = "ntasks-per-node", more: Sequence[str] = (), preflight: str = "no",
    **environment: str,
) -> SlurmJob:  # fmt: skip
    """The pipeline with two tasks on each of some nodes. Its log is next to `runs`."""
    asked = [f"--nodes={nodes}", f"--{two}=2", "--signal=USR1@30", *options]
    words = [*asked, SCRIPT, str(recipe), f"runs={runs}", *more]
    return submit(
        cluster, runs.parent / "job.log", *words, CPT_MERGE_PREFLIGHT=preflight, **environment
    )


def rows(runs: Path) -> list[dict[str, float]]:
    """The training's log: a row per step, each with its time."""
    path = runs / "demo" / "training" / "log" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    complete = map(json.loads, lines[:-1])  # the last line may be half written
    return [row for row in complete if "train/loss" in row]


def wait_for_step(job: SlurmJob, runs: Path, step: int) -> None:
    job.wait(lambda: any(row["train/step"] >= step for row in rows(runs)), f"step {step}")


def weights(runs: Path) -> bytes:
    return (runs / "demo" / "training" / "cpt" / "model.safetensors").read_bytes()


def chat_model(runs: Path) -> bytes:
    return (runs / "demo" / "merge" / "chat" / "model.safetensors").read_bytes()


def curve(runs: Path) -> list[tuple[float, float]]:
    """(step, loss): every step once, in order."""
    return [(row["train/step"], row["train/loss"]) for row in rows(runs)]


def resumed_at(job: SlurmJob, attempt: int = 1) -> int:
    """The step from which a restart of the job continued."""
    return int(re.findall(r"training: continues from step-(\d+)", job.log)[attempt - 1])


def differing(one: Path, other: Path) -> set[str]:
    """The files in which two models differ, without those that contain paths and times."""
    assert (one / "model.safetensors").is_file()
    ours, theirs = _digests(one), _digests(other)
    names = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
    return names - {"README.md", "cpt_merge.json"}


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def record(what: str, costs: dict[str, float]) -> None:
    path = Path(os.environ.get("CPT_MERGE_SLURM_RESULTS", "/tmp/cpt-merge-slurm.json"))
    found = json.loads(path.read_text()) if path.is_file() else {}
    found[what] = {name: round(value, 1) for name, value in costs.items()}
    path.write_text(json.dumps(found, indent=1))
