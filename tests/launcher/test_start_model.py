"""`training.start`: another model than the base to start from, through the pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpt_merge.core.artifact import read_record
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.fetch import hub_models
from cpt_merge.launcher.inputs import check_inputs
from cpt_merge.launcher.lineage import notes_on_training, used
from cpt_merge.launcher.plan import show_plan
from cpt_merge.launcher.recipe import load_recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import prepare
from cpt_merge.launcher.stages import EMBEDDINGS
from tests.command_line import cpt_merge

EMBEDDING = "model.embed_tokens.weight"


def started(recipe_path: Path, start: Path | str, tmp_path: Path, *more: str) -> Run:
    return Run.load(recipe_path, [f"training.start={start}", f"runs={tmp_path / 'runs'}", *more])


@pytest.mark.slow
def test_the_chat_model_is_trained_and_a_line_warns_of_its_second_vector(
    finished: Path, recipe_path: Path, pair: Path, tmp_path: Path
) -> None:
    """The paper's row chat -> CPT; then another run starts from what this one made."""
    words = [f"runs={tmp_path}", "launch.processes=1", "training.preview.every=6"]
    chat = f"training.start={pair / 'chat'}"
    planned = cpt_merge("plan", recipe_path, chat, *words)
    assert planned.returncode == 0, planned.stderr
    said = " ".join((planned.stdout + planned.stderr).split())
    assert "contains 1.00 times chat - base already, and the merge adds 1.0 times more" in said
    assert f"start {pair / 'chat'}, in place of the base" in said
    done = cpt_merge("run", recipe_path, chat, "merge.ratio=0", *words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny"
    made, of_chat = (load_file(path / "model.safetensors")
                     for path in (run / "embeddings" / "model", pair / "chat"))  # fmt: skip
    for name, values in of_chat.items():
        assert torch.equal(made[name][: len(values)], values), name
    merged, cpt = (load_file(path / "model.safetensors")
                   for path in (run / "merge" / "chat", run / "training" / "cpt"))  # fmt: skip
    assert all(torch.equal(merged[name], cpt[name]) for name in cpt)
    card = (run / "merge" / "chat" / "README.md").read_text()
    assert "CPT started from chat (" in card
    again = cpt_merge(
        "train", recipe_path, f"training.start={finished / 'training' / 'cpt'}", *words
    )
    assert again.returncode == 2, "the rows of the last run are those of another start"
    assert "the setting" not in again.stderr
    assert "the model to start from has changed" in " ".join(again.stderr.split())
    back = cpt_merge("train", recipe_path, *words)
    assert "the setting training.start has changed" in " ".join(back.stderr.split())


@pytest.mark.slow
def test_the_model_of_another_run_keeps_all_its_rows(
    finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    runs, cpt = f"runs={tmp_path}", finished / "training" / "cpt"
    for command in ("tokenizer", "embeddings"):
        done = cpt_merge(command, recipe_path, f"training.start={cpt}", runs)
        assert done.returncode == 0, done.stderr
    made = load_file(tmp_path / "tiny" / "embeddings" / "model" / "model.safetensors")
    assert all(
        torch.equal(made[name], one) for name, one in load_file(cpt / "model.safetensors").items()
    )
    rows = len(made[EMBEDDING])
    assert f"embeddings: {rows} of {rows} rows are" in done.stderr


def test_fingerprint_keys_and_lineage(
    finished: Path, recipe_path: Path, pair: Path, tmp_path: Path
) -> None:
    plain = prepare(Run.load(recipe_path), EMBEDDINGS)
    assert plain.key == read_record(finished / "embeddings").key  # type: ignore[union-attr]
    assert "training.start" not in plain.config
    start = Run.load(recipe_path, [f"training.start={pair / 'chat'}"])
    context = prepare(start, EMBEDDINGS)
    assert context.key != plain.key
    assert context.inputs["start"] == start.pair_inputs()["chat"]
    assert [one.name for one in used(context) if "start" in one.name] == ["start-chat"]
    assert notes_on_training(Run.load(recipe_path)) == ()
    hub = load_recipe(recipe_path, ["training.start=org/model@main"])
    assert [*hub_models(hub)] == ["training.start"]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("own", "is in the folder of this run, whose stages make it again"),
        ("run", "is the folder of a run; give one of its models"),
        ("width", "do not fit together"),
        ("family", "architectures llama in base, mistral in training.start"),
        ("tokens", "lacks 1 token of the base ("),
        ("pieces", "pieces that this run's tokenizer lacks"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_the_first_stage(
    finished: Path, recipe_path: Path, pair: Path, tmp_path: Path, what: str, sentence: str
) -> None:
    start, more = tmp_path / "start", ["launch.processes=1"]
    shutil.copytree(pair / "chat", start)
    if what == "own":
        shutil.copytree(start, tmp_path / "runs" / "tiny" / "training" / "cpt")
        start = tmp_path / "runs" / "tiny" / "training" / "cpt"
    elif what == "run":
        start = finished
    elif what == "width":
        weights = load_file(start / "model.safetensors")
        weights["model.norm.weight"] = torch.ones(16)
        save_file(weights, start / "model.safetensors", {"format": "pt"})
    elif what == "family":
        config = json.loads((start / "config.json").read_text())
        (start / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    else:
        shutil.rmtree(start)
        shutil.copytree(finished / "training" / "cpt", start)
        if what == "tokens":
            shutil.copy(finished / "tokenizer" / "tokenizer" / "tokenizer.json", start)
            content = json.loads((start / "tokenizer.json").read_text())
            vocab = content["model"]["vocab"]
            piece = next(one for one, number in vocab.items() if number == 300)
            vocab["other"] = vocab.pop(piece)
            content["model"]["merges"] = []
            (start / "tokenizer.json").write_text(json.dumps(content))
            (start / "tokenizer.model").unlink(missing_ok=True)
        else:
            more.append("tokenizer={}")
    run = started(recipe_path, start, tmp_path, *more)
    with pytest.raises(UserError) as error:
        show_plan(run.recipe)
    assert sentence in str(error.value)


@pytest.mark.slow
def test_a_start_that_fits_passes_the_checks(
    finished: Path, recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_inputs(started(recipe_path, finished / "training" / "cpt", tmp_path).recipe)
    assert "times chat - base" not in capsys.readouterr().err
    check_inputs(started(recipe_path, finished / "merge" / "chat", tmp_path).recipe)
    assert "contains 1.0" in capsys.readouterr().err
