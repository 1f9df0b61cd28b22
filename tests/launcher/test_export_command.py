"""`cpt-merge export`: a model from the checkpoints of a run."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt_merge.training.saved import open_checkpoint
from tests.command_line import cpt_merge


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, whose files a test may change."""
    shutil.copytree(finished, tmp_path / finished.name)
    return tmp_path / finished.name


def export(recipe: Path, run: Path, out: Path, *words: str) -> tuple[int, str]:
    done = cpt_merge("export", recipe, f"runs={run.parent}", "--out", out, *words)
    assert "Traceback" not in done.stderr
    return done.returncode, " ".join(done.stderr.split())


def mean(checkpoints: Iterable[Path], name: str) -> torch.Tensor:
    values = [open_checkpoint(path)(f"model.{name}").double() for path in checkpoints]
    return sum(values, torch.zeros_like(values[0])) / len(values)


def test_an_average_has_the_files_of_a_model_and_every_mean(
    recipe_path: Path, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run / "training" / "checkpoints" / "step-00000003",
                    run / "training" / "checkpoints" / "step-00000003-backup")  # fmt: skip
    code, said = export(recipe_path, run, tmp_path / "out", "--average", "1..6")
    assert code == 0, said
    assert "step-00000003 + step-00000006, divided by 2" in said
    steps = [run / "training" / "checkpoints" / f"step-{number:08d}" for number in (3, 6)]
    found, base = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", run / "embeddings" / "model")
    )
    assert {name: (w.shape, w.dtype) for name, w in found.items()} == {
        name: (w.shape, w.dtype) for name, w in base.items()
    }
    for name, values in found.items():
        torch.testing.assert_close(values, mean(steps, name).to(values.dtype), rtol=0, atol=0)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
        == AutoTokenizer.from_pretrained(run / "training" / "cpt").get_vocab()
    )
    names = {path.name for path in (run / "training" / "cpt").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_checkpoints_of_another_recipe_or_vocabulary_are_refused(
    recipe_path: Path, run: Path, tmp_path: Path
) -> None:
    changed = export(recipe_path, run, tmp_path / "out", "training.optimizer.learning_rate=0.5")
    record = run / "embeddings" / "stage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "key": "made again"}))
    for code, said in (changed, export(recipe_path, run, tmp_path / "out")):
        assert code == 2
        assert "was written with other settings or inputs than the recipe has now" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "words", "sentence"),
    [
        ("{", (), "step-00000006 cannot be read (JSONDecodeError"),
        ("{}", (), "step-00000006 cannot be read (KeyError"),
        ("[]", (), "step-00000006 cannot be read (TypeError"),
        (None, ("--step", "6"), "has no checkpoint of step 6; there are 3."),
        (None, ("--step", "3", "--average", "1..6"), "and no --step with it"),
    ],
)
def test_half_written_and_missing_checkpoints(
    recipe_path: Path, run: Path, tmp_path: Path, damage: str | None, words: tuple[str, ...],
    sentence: str,
) -> None:  # fmt: skip
    state = run / "training" / "checkpoints" / "step-00000006" / "train_state.json"
    state.unlink()
    if damage is not None:
        state.write_text(damage)
    code, said = export(recipe_path, run, tmp_path / "out", *words)
    assert (code, sentence in said) == (2, True), said
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_an_earlier_version_is_named(
    recipe_path: Path, run: Path, tmp_path: Path
) -> None:
    state = run / "training" / "checkpoints" / "step-00000006" / "train_state.json"
    layout = "DeepSpeed ZeRO 3 with offload all on 4 processes"
    state.write_text(json.dumps({**json.loads(state.read_text()), "layout": layout}))
    code, said = export(recipe_path, run, tmp_path / "out")
    assert code == 2
    assert f"is in the format of an earlier version of cpt-merge ({layout}), which this" in said
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_something_is_left_alone(
    recipe_path: Path, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    code, said = export(recipe_path, run, tmp_path / "out")
    assert (code, "exists and is not empty" in said) == (2, True), said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes"]
