"""What a whole run leaves in its logs: one group, ids that last, where things come from, and how it went."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cpt_merge.core.artifact import read_record
from cpt_merge.launcher.identity import group_name
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.stages import pipeline
from cpt_merge.tracking import read_log
from tests.launcher.conftest import ROOT
from tests.tracking.conftest import KEY
from tests.tracking.server import WandbServer
from tests.tracking.wandb_log import attempts, records

NAMES = [stage.name for stage in pipeline(None, dpo=False)]


def test_one_group_and_a_run_for_each_stage_whose_id_is_in_its_record(
    finished: Path, recipe: Recipe
) -> None:
    for stage in NAMES:
        logs = attempts(finished / stage / "log")
        assert len(logs) == 1
        run = next(
            record.run for record in records(logs[0]) if record.WhichOneof("record_type") == "run"
        )
        written = read_record(finished / stage)
        assert written
        assert (run.run_group, run.job_type) == (group_name(recipe.name, recipe.directory), stage)
        assert run.run_id == f"{run.run_group}-{stage}-{written.key[:8]}"
        assert written.tracking == {"mode": "offline", "run_id": run.run_id, "group": run.run_group}


def test_every_checkpoint_names_the_wandb_run(finished: Path) -> None:
    record = read_record(finished / "training")
    assert record
    states = list(finished.glob("training/checkpoints/step-*/train_state.json"))
    assert states
    for state in states:
        assert json.loads(state.read_text())["tracking"] == record.tracking


def test_the_config_says_how_to_get_the_result_again(finished: Path) -> None:
    for stage in NAMES:
        settings = read_log(finished / stage / "log").run["settings"]
        assert settings["recipe"]["name"] == "tiny"
        record = read_record(finished / stage)
        assert record
        assert settings["inputs"] == record.inputs
        assert {"commit", "command", "host"} <= set(settings["origin"])
        assert {"python", "torch", "wandb"} <= set(settings["versions"])


def test_lineage_leads_from_text_and_pair_to_the_chat_model(finished: Path) -> None:
    logs = {stage: read_log(finished / stage / "log") for stage in NAMES}
    left = {
        (one.name, one.digest): stage
        for stage in NAMES
        for one in logs[stage].artifacts
        if not one.used
    }
    used = {
        stage: [(one.name, one.digest) for one in logs[stage].artifacts if one.used]
        for stage in NAMES
    }
    assert sorted(left.values()) == sorted(
        stage.name for stage in pipeline(None, dpo=False) if stage.output
    )
    before = {stage: {left[one] for one in used[stage] if one in left} for stage in NAMES}
    assert before == {
        "tokenizer": set(), "embeddings": {"tokenizer"}, "data": {"tokenizer"}, "training": {"embeddings", "data"},
        "merge": {"training", "tokenizer"}, "evaluation": {"training", "merge"},
    }  # fmt: skip
    assert {re.sub("-[0-9a-f]{6}$", "", name) for name, _ in used["tokenizer"]} == {
        "base-base", "chat-chat", "text-ko", "text-zh_tw", "text-en",
    }  # fmt: skip
    for stage in NAMES:
        for one in logs[stage].artifacts:
            assert Path(one.uri.removeprefix("file://")).exists(), one


def test_each_stage_says_that_it_finished(finished: Path) -> None:
    for stage in NAMES:
        assert read_log(finished / stage / "log").alerts[-1]["title"] == f"{stage} finished"


@pytest.mark.slow
def test_sync_of_a_whole_run_gives_its_rows_and_its_lineage(finished: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "tiny"
    shutil.copytree(
        finished, run_folder, ignore=shutil.ignore_patterns("*.safetensors", "checkpoints")
    )
    with WandbServer() as server:
        environment = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        command = [sys.executable, "-m", "cpt_merge.launcher.cli", "sync", str(run_folder)]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
        assert [run.job_type for run in server.runs.values()] == NAMES, "in the order of the stages"
        assert {run.group for run in server.runs.values()} == {
            next(iter(server.runs.values())).group
        }
        training = next(run for run in server.runs.values() if run.job_type == "training")
        assert training.rows("train/loss") == read_log(finished / "training" / "log").series(
            "train/loss"
        )
        makers = {one.full_name: server.runs[one.maker].job_type for one in server.artifacts}
        edges = {(name, run.job_type) for run in server.runs.values() for name in run.used}
        assert {(makers[name], user) for name, user in edges if name.startswith("tiny-")} == {
            ("tokenizer", "embeddings"), ("tokenizer", "data"), ("tokenizer", "merge"), ("embeddings", "training"),
            ("data", "training"), ("training", "merge"), ("training", "evaluation"), ("merge", "evaluation"),
        }  # fmt: skip
        outside = {
            (name.split(":")[0].rpartition("-")[0], user)
            for name, user in edges
            if not name.startswith("tiny-")
        }
        assert {
            ("text-ko", "tokenizer"),
            ("text-zh_tw", "data"),
            ("text-en", "evaluation"),
            ("chat", "merge"),
        } <= outside
        for artifact in server.artifacts:
            if artifact.type in ("model", "store", "text", "tokenizer"):
                assert artifact.files == {}, "references only"
                assert all(
                    entry["ref"].startswith("file://")
                    for entry in artifact.manifest["contents"].values()
                )
