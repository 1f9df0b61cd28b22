"""The data stage from the command line: several Slurm tasks, and what makes it run again."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cpt_merge.core.artifact import read_record
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.execute import _file_errors
from cpt_merge.launcher.recipe import load_recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stages import DATA, pipeline
from tests.command_line import cpt_merge
from tests.data.test_tokenise import digest


def test_how_much_of_a_source_is_trained_on_concerns_training_alone(recipe_path: Path) -> None:
    one = load_recipe(recipe_path, [])
    for change in (["corpus.sources.0.weight=2"], ["corpus.shares={ko: 0.5, zh_tw: 0.4, en: 0.1}"]):
        other = load_recipe(recipe_path, change)
        changed = [
            stage.name
            for stage in pipeline(None, dpo=False)
            if dict(stage.config(one)) != dict(stage.config(other))
        ]
        assert changed == ["training"]


def test_the_number_of_processes_does_not_make_another_store(recipe_path: Path) -> None:
    one, other = load_recipe(recipe_path, []), load_recipe(recipe_path, ["data.processes=7"])
    assert all(
        dict(stage.config(one)) == dict(stage.config(other)) for stage in pipeline(None, dpo=False)
    )


def test_a_corpus_that_has_grown_costs_only_what_is_new(
    recipe_path: Path, texts: Path, tmp_path: Path
) -> None:
    for language in ("ko", "zh_tw", "en"):
        shutil.copy(texts / f"{language}.jsonl", tmp_path)
    overrides = [f"runs={tmp_path}", "name=grown", "data.processes=1"]
    overrides += [
        f"corpus.sources.{number}.path={tmp_path}/{language}.jsonl"
        for number, language in enumerate(("ko", "zh_tw", "en"))
    ]
    assert cpt_merge("tokenizer", recipe_path, *overrides).returncode == 0
    assert cpt_merge("data", recipe_path, *overrides).returncode == 0
    with open(tmp_path / "ko.jsonl", "a", encoding="utf-8") as file:
        file.write('\n{"text": "새로운 글"}\n')
    done = cpt_merge("data", recipe_path, *overrides)
    assert done.returncode == 0, done.stderr
    assert "3 blocks of text were tokenised before; 2 of 3 files are unchanged" in done.stderr
    run = Run(load_recipe(recipe_path, overrides))
    grown = digest(run.store)
    shutil.rmtree(run.blocks)
    shutil.rmtree(run.folder("data"))
    assert cpt_merge("data", recipe_path, *overrides).returncode == 0
    assert digest(run.store) == grown


def test_a_file_that_cannot_be_written_to_its_end(recipe_path: Path, tmp_path: Path) -> None:
    """The limit of a file's size stands in for the disk: the stage ends in one sentence."""
    overrides = [f"runs={tmp_path}", "name=full", "data.processes=1"]
    assert cpt_merge("tokenizer", recipe_path, *overrides).returncode == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        done = cpt_merge("data", recipe_path, *overrides)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 2
    assert "data: no space left: " in done.stderr or "data: File too large: " in done.stderr
    assert "(finished and kept: tokenizer)" in done.stderr


def test_numpy_does_not_say_that_no_space_is_left(recipe_path: Path) -> None:
    run = Run(load_recipe(recipe_path, []))
    full = pytest.raises(UserError, match="data: no space left: ")
    with full, _file_errors(run, DATA), open("/dev/full", "wb") as device:
        np.ones(100_000).tofile(device)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [2])
def test_slurm_tasks_share_the_work(tasks: int, recipe_path: Path, tmp_path: Path) -> None:
    overrides = [f"runs={tmp_path}", "name=shared"]
    assert cpt_merge("tokenizer", recipe_path, *overrides).returncode == 0
    assert cpt_merge("data", recipe_path, *overrides).returncode == 0
    run = Run(load_recipe(recipe_path, overrides))
    alone = digest(run.store)
    os.rename(run.folder("data"), tmp_path / "alone")
    os.rename(run.blocks, tmp_path / "blocks")
    command = [sys.executable, "-m", "cpt_merge.launcher.cli", "data", str(recipe_path), *overrides]
    slurm = {"SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_LOCALID": "0"}
    processes = [
        subprocess.Popen(command, env={**os.environ, **slurm, "SLURM_PROCID": str(rank)})
        for rank in reversed(range(tasks))
    ]
    assert [process.wait(120) for process in processes] == [0] * tasks
    assert digest(run.store) == alone
    record = read_record(run.folder("data"))
    assert record is not None
    assert record.results["documents"] > 0
