"""What the recipe makes of a preview and of a sweep: prompts, scores, and sentences for what does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.chat_template import read_chat_template
from cpt_merge.evaluation.checks import parse_check
from cpt_merge.evaluation.conversation import prompt
from cpt_merge.evaluation.models import load_tokenizer
from cpt_merge.launcher.cli import main
from cpt_merge.launcher.inputs import check_inputs
from cpt_merge.launcher.preview import COLUMNS, make_interview, preview_of, read_prompts
from cpt_merge.launcher.recipe import Recipe, load_recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import prepare
from cpt_merge.launcher.stages import SWEEP
from cpt_merge.merge.plan import MergeInputs
from tests.command_line import cpt_merge

EVERY = "training.preview.every=2"


@pytest.fixture(scope="module")
def resized(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run whose vocabulary is ready, and nothing else."""
    overrides = [f"runs={tmp_path_factory.mktemp('runs')}", "launch.processes=1"]
    for stage in ("tokenizer", "embeddings"):
        done = cpt_merge(stage, recipe_path, *overrides)
        assert done.returncode == 0, done.stderr
    return overrides


def test_a_recipe_without_a_preview_makes_none(recipe: Recipe) -> None:
    nothing = Path("unread")
    assert preview_of(recipe, MergeInputs(nothing)) is None


@pytest.mark.slow
def test_the_preview_asks_in_the_merged_models_ids(recipe_path: Path, resized: list[str]) -> None:
    run = Run(load_recipe(recipe_path, [*resized, EVERY]))
    made = preview_of(run.recipe, MergeInputs(run.resized, run.base, run.chat, run.tokenizer))
    assert made is not None
    plan, interview = made
    assert plan is not None
    tokenizer = load_tokenizer(run.tokenizer)
    assert tokenizer.decode(interview.prompts[0]) == "[INST] 가나 天地 go home [/INST]"
    assert len(interview.prompts) == 3  # one in each language
    assert interview.ends == set(plan.format.stop_ids)


@pytest.mark.slow
def test_a_chat_model_without_a_template_is_refused_before_the_first_stage(
    recipe_path: Path, pair: Path, tmp_path: Path
) -> None:
    chat = shutil.copytree(pair / "chat", tmp_path / "chat")
    config = json.loads((chat / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (chat / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"chat has no chat template, which training.preview needs; add a"
    ):
        check_inputs(load_recipe(recipe_path, [EVERY, f"models.chat={chat}"]))
    unasked = [f"models.chat={chat}", "evaluation.suites=[language]"]
    check_inputs(load_recipe(recipe_path, unasked))  # nobody asks for one


def test_a_recipe_without_a_chat_sibling_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(recipe_path.read_text())
    del values["models"]["chat"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"`models.chat` is missing; set it"):
        load_recipe(tmp_path / "r.yaml", [EVERY])


def test_prompts_are_the_evaluations(recipe_path: Path) -> None:
    given = load_recipe(recipe_path, [EVERY, "training.preview.prompts=1"])
    assert [one.language for one in read_prompts(given)] == ["ko", "zh_tw", "en"]
    built_in = load_recipe(
        recipe_path, [EVERY, "training.preview.prompts=2", "evaluation.prompts=null"]
    )
    found = read_prompts(built_in)
    assert sorted(one.language for one in found) == ["en", "en", "ko", "ko", "zh_tw", "zh_tw"]
    assert all(one.turns[0].checks for one in found)


def test_replies_are_scored_by_form_and_by_their_checks(pair: Path) -> None:
    tokenizer, template = load_tokenizer(pair / "chat"), read_chat_template(pair / "chat")
    user = [{"role": "user", "content": "go home"}]
    checks = [
        parse_check({"name": "contains", "words": [word]}, "here") for word in ("rice", "sleep")
    ]
    interview = make_interview(
        [prompt("en", user, checks), prompt("en", user)], tokenizer, template, 64
    )
    replies = [
        [*tokenizer.encode("we eat rice", add_special_tokens=False), 2],
        tokenizer.encode("[INST] we"),
    ]
    metrics, rows = interview.score(replies)
    assert metrics["en/stopped"] == 0.5
    assert metrics["en/keeps_format"] == 0.5
    assert metrics["en/chat"] == 0.5
    first = dict(zip(COLUMNS[1:], rows[0], strict=True))
    assert first["prompt"] == "go home"
    assert first["reply"] == "we eat rice"
    assert first["stopped"] == 1.0
    assert (
        first["instruction_checks"] == metrics["en/instruction_checks"] == 0.5
    )  # of two words one
    assert rows[1][-1] is None  # nothing to check


@pytest.mark.parametrize(
    ("options", "count"),
    [(("--ratios", "0:1:0.5", "--per-layer", "ramp(0.3, 1)", "--search", "4"), 3), ((), 0)],
)
def test_the_options_of_a_sweep_are_overrides(
    options: tuple[str, ...], count: int, recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that all its processes get them."""
    ran: list[Run] = []
    monkeypatch.setattr("cpt_merge.launcher.execute.run_stage", lambda run, stage: ran.append(run))
    assert main(["sweep", str(recipe_path), *options]) == 0
    (run,) = ran
    assert len(run.words) == 1 + count
    if options:
        assert run.recipe.sweep.ratios == [
            0,
            0.5,
            1,
        ]  # though YAML 1.1 would read 0:1:0.5 as a time
        assert run.recipe.sweep.per_layer == "ramp(0.3, 1)"
        assert run.recipe.sweep.search.trials == 4


def test_a_run_that_is_not_trained_has_nothing_to_sweep(recipe_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training is not finished; run `cpt-merge train RECIPE`"):
        prepare(Run.load(recipe_path, [f"runs={tmp_path}"]), SWEEP)


@pytest.mark.slow
def test_the_command_sweeps_a_finished_run_in_two_processes(
    finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "tiny")
    words = ("--ratios", "0:1:0.5", f"runs={tmp_path}", "sweep.recommend.bits_per_byte_rise=null")
    done = cpt_merge("sweep", recipe_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "tiny" / "sweep" / "results.json").read_text())
    assert [point["ratios"]["all"] for point in results["points"]] == [0.0, 0.5, 1.0]
    merged = json.loads((finished / "evaluation" / "results.json").read_text())["models"]["merged"][
        "scores"
    ]
    at_1 = results["points"][2]["metrics"]
    # the hook merged fp32 masters, a sweep starts from CPT as it was exported: bf16, so one rounding more
    for end, value in merged["ko"]["bits_per_byte"].items():
        assert at_1["ko"]["bits_per_byte"][end] == pytest.approx(value, rel=1e-3)
    assert "sweep: recommended: " in done.stderr
    again = cpt_merge("sweep", recipe_path, *words)
    assert again.stderr.count("is already measured") == 3
