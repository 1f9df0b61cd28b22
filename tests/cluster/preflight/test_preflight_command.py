"""The calls of the preflight, by real processes that take themselves for nodes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt_merge.cluster.preflight.reports import NONCE_FILE, read_nodes
from tests.cluster.preflight.conftest import JOB, PreflightJob
from tests.processes import ROOT, Processes


def test_real_nodes_are_compared_and_bad_ones_named(
    job: Callable[..., PreflightJob],
    tmp_path: Path,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared, stale = job(), tmp_path / "stale"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "cpt_merge", stale / "cpt_merge", ignore=ignored)
    with (stale / "cpt_merge" / "training" / "run.py").open("a") as file:
        file.write("# changed\n")
    command = ["-m", "cpt_merge", "preflight", *shared.arguments]
    tasks = [
        processes.python(*command, cwd=folder, env={**JOB, "SLURMD_NODENAME": node})
        for node, folder in (("node1", ROOT), ("node3", stale))
    ]
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    assert shared.call()[0] == 0
    code, out, said = shared.call("--judge", "--nodes", "node1,node2")  # waits for both
    assert (code, out) == (0, "\n"), said
    for task in tasks:
        assert task.finish() == 0, f"the judge decides, not a task: {task.stderr}"
    assert abs(read_nodes(shared.folder)["node1"].clock) < 2

    monkeypatch.setenv("SLURMD_NODENAME", "node4")
    elsewhere = (f"runs={tmp_path / 'local'}",)
    code, _, said = shared.call("--wait", "0", overrides=elsewhere)
    assert code == 0
    assert f"{NONCE_FILE}, which the first node wrote, does not exist here" in said

    nodes = "node1,node2,node3,node4,node5"
    code, out, said = shared.call("--judge", "--nodes", nodes, "--wait", "0")
    assert code == 2
    assert out == "node3,node4,node5\n"
    assert "ok    node1: clock" in said
    assert "BAD   node3: code: digest " in said
    assert "which 2 of 3 nodes have; copy the project there again" in said
    assert "BAD   node4: no report within 0 s" in said
    assert "node3, node4, node5 cannot be used" in said
    assert "set launch.spare_nodes = 3" in said
    judgement = json.loads((shared.folder / "judgement.json").read_text())
    assert list(judgement["bad"]) == ["node3", "node4", "node5"]


@pytest.mark.slow
def test_what_would_stop_any_node_is_found_before_the_others_are_asked(
    job: Callable[..., PreflightJob],
) -> None:
    begun = job()
    code, _, said = begun.call("--begin", overrides=("training.checkpoints.keep=1000000000",))
    assert code == 2
    assert "GB left and the run takes" in said
    assert begun.call("--begin", overrides=("models.chat=/none",))[0] == 2
    on_slurm = begun.call("--begin", overrides=("launch.processes=1000",))
    assert on_slurm[0] == 0, "on Slurm, srun decides about processes"


def test_options_that_contradict_each_other(job: Callable[..., PreflightJob]) -> None:
    begun = job()
    for options in (["--judge"], ["--nodes", "node1"], ["--begin", "--network"]):
        code, _, said = begun.call(*options)
        assert code == 2
        assert "or none of them" in said


def test_a_machine_without_slurm_is_checked_by_one_call(
    recipe_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "here")
    alone = PreflightJob(recipe_path, tmp_path, capsys)
    code, out, said = alone.call()
    assert (code, out) == (0, "\n"), said
    assert "ok    here: clock" in said
    assert "call it by srun" in alone.call("--network")[2]
