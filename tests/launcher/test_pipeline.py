"""The whole pipeline by the command line, in real processes, on a tiny pair."""

import fcntl
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.launcher.execute import execute
from cpt_merge.launcher.inputs import check_inputs
from cpt_merge.launcher.recipe import Recipe, load_recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import prepare
from cpt_merge.launcher.stages import TOKENIZER
from cpt_merge.tracking import read_log
from tests.command_line import cpt_merge
from tests.processes import Processes


def test_a_chat_model_comes_out(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "merge" / "chat")
    tokenizer = AutoTokenizer.from_pretrained(finished / "merge" / "chat")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "가나 天地 go"}], return_dict=True, return_tensors="pt"
    )
    reply = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert reply.shape[1] > ids["input_ids"].shape[1]
    results = json.loads((finished / "evaluation" / "results.json").read_text())
    assert results


def test_every_stage_says_what_it_was_made_of(finished: Path) -> None:
    for stage in ("tokenizer", "embeddings", "data", "training", "merge", "evaluation"):
        record = json.loads((finished / stage / "stage.json").read_text())
        assert record["stage"] == stage
        assert record["inputs"]
        assert record["versions"]["torch"]
    assert (finished / "report.html").is_file()


def test_a_second_run_does_nothing(finished: Path, recipe_path: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    done = cpt_merge("run", recipe_path)
    assert done.returncode == 0
    assert done.stderr.count("finished already") == 6
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == stamps


@pytest.mark.slow
def test_a_changed_setting_runs_again_what_depends_on_it(
    finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "tiny")
    further = f"evaluation.models.again={finished / 'merge' / 'chat'}"
    settings = [f"runs={tmp_path / 'runs'}", "merge.ratio=0.5", "launch.processes=1", further]
    done = cpt_merge("run", recipe_path, *settings)
    assert done.returncode == 0, done.stderr
    skipped = [
        line.split(":")[0] for line in done.stderr.splitlines() if "finished already" in line
    ]
    assert skipped == ["tokenizer", "embeddings", "data", "training"]
    kept = sorted(
        path.relative_to(tmp_path / "runs" / "tiny")
        for path in tmp_path.rglob("*.unsent-1/log/wandb")
    )
    assert kept == [
        Path("evaluation.unsent-1/log/wandb"),
        Path("merge.unsent-1/log/wandb"),
    ]  # of the earlier results
    results = json.loads((tmp_path / "runs" / "tiny" / "evaluation" / "results.json").read_text())
    assert list(results["models"]) == ["base", "chat", "cpt", "merged", "again"]


@pytest.mark.slow
def test_training_with_other_settings_moves_the_old_work_aside(
    finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(finished, run)
    override = "training.optimizer.learning_rate=0.002"
    done = cpt_merge("train", recipe_path, f"runs={tmp_path / 'runs'}", override)
    assert done.returncode == 0, done.stderr
    assert (run / "training.old-1" / "cpt" / "model.safetensors").is_file()
    assert "is now" in done.stderr
    back = cpt_merge("train", recipe_path, f"runs={tmp_path / 'runs'}")
    assert back.returncode == 0, back.stderr
    assert "training.old-1 was made with these settings; it is taken back" in back.stderr
    assert "continues from step-00000006" in back.stderr
    assert (run / "training.old-2" / "cpt" / "model.safetensors").is_file()


def test_ctrl_c_saves_and_the_same_command_continues(
    finished: Path, recipe_path: Path, tmp_path: Path, processes: Processes
) -> None:
    shutil.copytree(
        finished, tmp_path / "runs" / "tiny", ignore=shutil.ignore_patterns("training", "merge")
    )
    command = [
        f"runs={tmp_path / 'runs'}",
        "training.tokens=1_000_000",
        "corpus.allow_repeats=true",
        "training.checkpoints.every=1000",
    ]
    process = processes.python("-m", "cpt_merge.launcher.cli", "train", recipe_path, *command)
    log = tmp_path / "runs" / "tiny" / "training" / "log" / "metrics.jsonl"
    process.wait_until(lambda: log.is_file() and "train/loss" in log.read_text(), "a logged step")
    process.signal(signal.SIGINT)
    assert process.finish() == 75, process.stderr
    assert "the same command continues" in process.stderr
    saved = [path.parent.name for path in (tmp_path / "runs").rglob("train_state.json")]
    assert len(saved) == 1
    alert = read_log(log.parent).alerts[-1]
    assert (alert["title"], "SIGINT" in alert["text"]) == ("training stopped", True)


@pytest.mark.parametrize(
    ("error", "word"),
    [(UserError("the disk is full."), "failed"), (Interrupted("by SIGTERM"), "stopped")],
)
def test_how_a_stage_ended_is_an_alert(
    error: UserError, word: str, recipe_path: Path, tmp_path: Path
) -> None:
    def run(*_: object) -> dict[str, Any]:
        raise error

    recipe = load_recipe(recipe_path, [f"runs={tmp_path}", "tracking.mode=disabled"])
    with pytest.raises(type(error)):
        execute(prepare(Run(recipe), replace(TOKENIZER, run=run)))
    (log,) = tmp_path.rglob("alerts.jsonl")
    (alert,) = read_log(log.parent).alerts
    assert (alert["title"], alert["text"]) == (f"tokenizer {word}", str(error))


def test_a_stage_that_fails_leaves_the_result_before_it(
    finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(finished, run)
    before = (run / "merge" / "stage.json").read_bytes()
    (run / "training" / "cpt" / "model.safetensors").write_bytes(b"damaged")
    done = cpt_merge("merge", recipe_path, f"runs={tmp_path / 'runs'}", "merge.ratio=0.5")
    assert done.returncode == 2, done.stderr
    assert (run / "merge" / "stage.json").read_bytes() == before
    assert (run / "merge" / "chat" / "model.safetensors").is_file()


def test_a_stage_whose_artifact_is_gone_runs_again(
    finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "merge" / "chat")
    done = cpt_merge("merge", recipe_path, f"runs={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    assert (run / "merge" / "chat" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", ["merge", pytest.param("train", marks=pytest.mark.slow)])
def test_a_hook_that_ended_before_its_stage_was_recorded(
    finished: Path, recipe_path: Path, tmp_path: Path, command: str
) -> None:
    """Its model is there, its stage.json is not: the merge stage, or the hook again, makes it anew."""
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(finished, run)
    assert (
        json.loads((run / "merge" / "chat" / "merge_report.json").read_text())["digest"]
        == "in memory"
    )
    (run / "merge" / "stage.json").unlink()
    if command == "train":
        (run / "training" / "stage.json").unlink()
    done = cpt_merge(command, recipe_path, f"runs={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    assert (run / "merge" / "stage.json").is_file()


@pytest.mark.slow
def test_training_that_diverges_makes_no_model(
    finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("training", "merge"))
    huge = [
        "training.optimizer.learning_rate=1e30",
        "training.optimizer.clip=1e30",
        "training.checkpoints.every=100",
    ]
    done = cpt_merge("train", recipe_path, f"runs={tmp_path / 'runs'}", *huge, "launch.processes=1")
    assert done.returncode == 2, done.stderr
    assert "diverged" in done.stderr or "non-finite" in done.stderr
    assert not (run / "training" / "cpt").exists()
    assert not (run / "training" / "stage.json").exists()


def test_a_run_that_is_in_use_is_left_alone(finished: Path, recipe_path: Path) -> None:
    with open(finished / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("process 1 on a node")
        lock.flush()
        done = cpt_merge("run", recipe_path)
    assert done.returncode == 2
    assert "is in use by process 1 on a node" in done.stderr


def test_plan_says_what_a_changed_setting_makes_to_do(finished: Path, recipe_path: Path) -> None:
    planned = cpt_merge("plan", recipe_path, "merge.ratio=0.5").stdout
    words = " ".join(planned.split())
    assert "training done" in words
    assert "merge to do, evaluation to do" in words


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["models.base=/nowhere"], "model /nowhere does not exist"),
        (["launch.processes=1000"], "launch.processes = 1000 but this machine has"),
        (
            ["training.global_batch_size=7"],
            "training.global_batch_size = 7 does not divide over 2 processes",
        ),
        (["evaluation.models.sft=/nowhere"], "model /nowhere does not exist"),
        (
            ["evaluation.models.chat=/nowhere"],
            "chat: the recipe's own model has this name; choose another",
        ),
        (
            ["launch.accelerate_config=/nowhere.yaml"],
            "launch.accelerate_config = /nowhere.yaml does not exist",
        ),
        (["merge.ratio=.nan"], "`merge.ratio`"),
        (["training.token=1"], "nearest known key is `training.tokens`"),
        (["corpus.sources.0.path=/nowhere.jsonl"], "text source /nowhere.jsonl does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    recipe_path: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    done = cpt_merge("run", recipe_path, f"runs={tmp_path}", *arguments)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["tokenizer.new_pieces.ko=3_000_000_000"],
            "asks for more pieces than characters are counted",
        ),
        (["training.tokens=999_999_999_999_999_999"], "and a run has at most"),
        (["training.phases=[{train: vocabulary, tokens: 1530}, {train: all}]"], "has no step left"),
        (["training.global_batch_size=7"], "does not divide over 2 processes of this machine"),
        (["evaluation.baseline=sft"], "evaluation.baseline = sft is none of the models"),
        (
            ["corpus.sources.0.weight=null", "corpus.sources.0.tokens=9_999_999_999"],
            "lower them or raise it",
        ),
        (
            ["evaluation.prompts=/nowhere.jsonl"],
            "evaluation.prompts = /nowhere.jsonl does not exist",
        ),
        (["tokenizer.pieces_from={ko: /nowhere}"], "pieces_from.ko = /nowhere does not exist"),
        (["models.chat=/nowhere"], "model /nowhere does not exist"),
        (["evaluation.models.sft=/nowhere"], "model /nowhere does not exist"),
    ],
)
def test_plan_refuses_what_would_stop_a_late_stage(
    recipe_path: Path, tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    done = cpt_merge("plan", recipe_path, f"runs={tmp_path}", *overrides)
    assert done.returncode == 2, done.stdout
    assert sentence in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("overrides", [[], ["training.tokens=1"]])
def test_status_takes_the_folder_of_a_run(
    finished: Path, recipe_path: Path, overrides: list[str]
) -> None:
    by_recipe = cpt_merge("status", recipe_path)
    by_folder = cpt_merge("status", finished, *overrides)
    if overrides:
        assert by_folder.returncode == 2
        assert "give its recipe to override keys" in by_folder.stderr
    else:
        assert by_folder.returncode == 0, by_folder.stderr
        assert "6 of 6, loss" in by_folder.stdout
        assert by_folder.stdout.split("logged")[0] == by_recipe.stdout.split("logged")[0]


def test_status_of_a_folder_without_a_log_says_what_to_write(tmp_path: Path) -> None:
    done = cpt_merge("status", tmp_path)
    assert done.returncode == 2
    assert "so its recipe is not known; write `cpt-merge status RECIPE`" in done.stderr


def test_a_folder_where_a_recipe_belongs_is_named(tmp_path: Path) -> None:
    done = cpt_merge("plan", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path} is a directory; give a recipe" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("words", "other"),
    [
        (["merge", "--cpt", "a", "--base", "b"], "cpt-merge merge-models"),
        (["merge", "--ratio=1", "r.yaml"], "cpt-merge merge-models"),
        (["evaluate", "--models", "a=b"], "cpt-merge evaluate-models"),
        (["evaluate", "--model", "a=b"], "cpt-merge evaluate-models"),
    ],
)
def test_options_of_a_command_without_a_recipe_point_to_it(words: list[str], other: str) -> None:
    done = cpt_merge(*words)
    assert done.returncode == 2
    assert f"takes a recipe and has no {words[1].partition('=')[0]}" in done.stderr
    assert other in done.stderr


@pytest.mark.parametrize("command", ["plan", "run"])
def test_text_that_cannot_be_read_is_found_before_any_stage(
    recipe_path: Path, tmp_path: Path, command: str
) -> None:
    text = tmp_path / "ko.jsonl"
    text.write_text('{"text": "가나다"}\nno json\n', encoding="utf-8")
    done = cpt_merge(command, recipe_path, f"runs={tmp_path}", f"corpus.sources.0.path={text}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"{text}: line 2 is not JSON" in done.stderr


def test_plan_and_doctor_and_report(finished: Path, recipe_path: Path) -> None:
    planned = cpt_merge("plan", recipe_path)
    assert planned.returncode == 0, planned.stderr
    assert "6 steps of 256 tokens" in planned.stdout
    assert cpt_merge("doctor").returncode in (0, 1)
    reported = cpt_merge("report", finished)
    assert reported.returncode == 0, reported.stderr


@pytest.mark.slow
def test_a_list_of_pieces_is_an_input_of_the_tokenizer_stage(
    recipe_path: Path, recipe: Recipe, tmp_path: Path
) -> None:
    """A changed list runs the stage again; a list that is gone loses nothing."""
    words = tmp_path / "words.txt"
    words.write_text("가나\n", encoding="utf-8")
    command = ("tokenizer", recipe_path, "name=listed", f"tokenizer.pieces_from={{ko: {words}}}")
    first = cpt_merge(*command)
    assert first.returncode == 0, first.stderr
    assert "finished already" in cpt_merge(*command).stderr
    words.write_text("가나다\n", encoding="utf-8")
    again = cpt_merge(*command)
    assert again.returncode == 0
    assert "entries are new pieces" in again.stderr
    words.unlink()
    gone = cpt_merge(*command)
    assert gone.returncode == 2
    assert "cannot be read" in gone.stderr
    assert (recipe.directory.parent / "listed" / "tokenizer" / "stage.json").is_file()


def test_what_the_evaluation_lacks_is_found_before_training(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpt_merge.evaluation.config.find_spec", lambda name: None)
    tasks = "evaluation.knowledge.tasks={kmmlu: ko}"
    check_inputs(load_recipe(recipe_path, [tasks]))  # the suite is not asked for
    with pytest.raises(UserError, match="needs lm-eval, which is not installed"):
        check_inputs(load_recipe(recipe_path, [tasks, "evaluation.suites=[knowledge]"]))
    for missing in (
        "evaluation.judge={url: 'http://h', model: m, questions: /nowhere.jsonl}",
        "evaluation.knowledge.folder=/nowhere",
    ):
        with pytest.raises(
            UserError, match=r"/nowhere.* does not exist; correct it or leave it out"
        ):
            check_inputs(load_recipe(recipe_path, [missing]))
