"""A stage that is run alone says when what it uses was made of something else."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.freshness import _changed_text, check_current
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stages import DATA, EMBEDDINGS, EVALUATION, MERGE, TRAINING, pipeline
from tests.command_line import cpt_merge
from tests.launcher.conftest import adopt


@pytest.fixture
def copied(finished: Path, recipe_path: Path, pair: Path, texts: Path, tmp_path: Path) -> Path:
    """The recipe of a finished run whose models, text and prompts are its own."""
    values = yaml.safe_load(recipe_path.read_text(encoding="utf-8"))
    path = tmp_path / "tiny.yaml"
    values["runs"] = str(tmp_path / "runs")
    shutil.copytree(finished, tmp_path / "runs" / "tiny", ignore=shutil.ignore_patterns(".lock"))
    shutil.copytree(pair, tmp_path / "pair")
    values["models"] = {name: str(tmp_path / "pair" / name) for name in ("base", "chat")}
    for source in values["corpus"]["sources"]:
        source["path"] = shutil.copy(source["path"], tmp_path)
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    for before in (texts, recipe_path.parent):
        adopt(tmp_path / "runs" / "tiny", str(before), str(tmp_path))
    adopt(tmp_path / "runs" / "tiny", str(pair), str(tmp_path / "pair"))
    return path


def edit_text(recipe: Path) -> Path:
    path = recipe.parent / "ko.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text + '\n{"text": "가나 다라"}', encoding="utf-8")
    return path


def edit_model(recipe: Path, name: str) -> None:
    path = recipe.parent / "pair" / name / "model.safetensors"
    weights = bytearray(path.read_bytes())
    weights[-1] ^= 1
    path.write_bytes(bytes(weights))


def test_nothing_is_said_of_what_has_not_changed(
    copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in (copied.parent / "ko.jsonl", *(copied.parent / "pair").rglob("*.*")):
        os.utime(file)
    for stage in pipeline(None, dpo=False):
        check_current(Run.load(copied), stage)
    assert capfd.readouterr().err == ""


def test_training_refuses_the_store_of_text_that_has_changed(copied: Path) -> None:
    before = (copied.parent / "runs" / "tiny" / "training" / "stage.json").read_bytes()
    path = edit_text(copied)
    done = cpt_merge("train", copied)
    assert done.returncode == 2, done.stderr
    said = " ".join(done.stderr.split())
    assert f"tiny/data, but since that was made {path} has changed" in said
    assert "run `cpt-merge data RECIPE`" in said
    assert (copied.parent / "runs" / "tiny" / "training" / "stage.json").read_bytes() == before


@pytest.mark.parametrize("stage", [EMBEDDINGS, DATA, MERGE, EVALUATION])
def test_other_stages_say_that_text_has_changed(
    stage: object, copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = edit_text(copied)
    check_current(Run.load(copied), stage)  # type: ignore[arg-type]
    said = " ".join(capfd.readouterr().err.split())
    assert "is used as it is, although since it was made" in said
    assert f"{path} has changed" in said


def test_text_that_is_gone_does_not_stop_the_training(
    copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (copied.parent / "ko.jsonl").unlink()
    check_current(Run.load(copied), TRAINING)
    assert "ko.jsonl does not exist" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "command", "folder"),
    [
        ("base", "data", "tokenizer"),
        ("base", "train", "tokenizer"),
        ("base", "merge", "tokenizer"),
        ("chat", "merge", "tokenizer"),
        ("chat", "evaluate", "tokenizer"),
    ],
)
def test_a_model_that_has_changed(name: str, command: str, folder: str, copied: Path) -> None:
    edit_model(copied, name)
    done = cpt_merge(command, copied)
    assert done.returncode == 2, done.stderr
    said = " ".join(done.stderr.split())
    assert f"tiny/{folder}, but since that was made" in said
    assert f"the {name} model (model.safetensors) has changed" in said


@pytest.mark.parametrize(
    ("command", "override", "setting"),
    [
        ("data", "tokenizer.new_pieces.ko=30", "tokenizer.new_pieces.ko"),
        ("merge", "training.optimizer.learning_rate=0.002", "optimizer.learning_rate"),
        ("evaluate", "merge.ratio=0.5", "ratio"),
        ("sweep", "training.tokens=3000", "tokens"),
    ],
)
def test_settings_of_an_earlier_stage(
    command: str, override: str, setting: str, copied: Path
) -> None:
    done = cpt_merge(command, copied, override)
    assert done.returncode == 2, done.stderr
    assert f"the setting {setting} has changed" in " ".join(done.stderr.split())


def test_a_source_that_was_added_belongs_to_no_store(copied: Path) -> None:
    values = yaml.safe_load(copied.read_text(encoding="utf-8"))
    values["corpus"]["sources"].append({"path": str(copied.parent / "en.jsonl"), "language": "en"})
    for source in values["corpus"]["sources"]:
        source.pop("weight", None)
    copied.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError, match=r"the setting corpus\.sources has changed"):
        check_current(Run.load(copied), TRAINING)


def test_a_stage_that_was_run_again(copied: Path) -> None:
    record = copied.parent / "runs" / "tiny" / "tokenizer" / "stage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "key": "0" * 16}))
    with pytest.raises(UserError, match="tokenizer has been run again"):
        check_current(Run.load(copied), TRAINING)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (["1", "2"], ["1", "3"], "b.txt has changed"),
        (["1", "2"], ["3", "4"], "a.txt and 1 more have changed"),
        (["1", "2", "3"], ["1", "2"], "text has lost 1 file"),
        (["2", "1"], ["1", "2"], "text has changed"),
    ],
)
def test_which_files_of_a_source_have_changed(
    before: list[str], now: list[str], said: str, copied: Path
) -> None:
    folder = copied.parent / "text"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text("가나")
    run = Run.load(copied, [f"corpus.sources.0.path={folder}"])
    assert _changed_text(run, str(folder), before, now).endswith(said)


def test_another_commit_of_a_dataset_has_no_files_to_name(copied: Path) -> None:
    run = Run.load(copied, ["corpus.sources.0.path=org/text"])
    assert _changed_text(run, "org/text", ["hub:1"], ["hub:2"]) == "org/text has changed"
