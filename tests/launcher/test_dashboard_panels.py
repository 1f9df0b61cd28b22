"""What `cpt-merge dashboard` charts is what the stages log: held against the log of a real small run."""

import json
from pathlib import Path

import pytest

from cpt_merge.evaluation.chat_template import read_chat_template
from cpt_merge.evaluation.models import load_tokenizer
from cpt_merge.launcher.dashboard import pipeline_of
from cpt_merge.launcher.preview import make_interview, read_prompts
from cpt_merge.launcher.recipe import Recipe, load_recipe
from cpt_merge.tracking import read_log
from cpt_merge.tracking.workspace import Panel, layout
from tests.command_line import cpt_merge
from tests.launcher.conftest import ROOT
from tests.tracking.wandb_log import attempts, items, records


def spread(name: str, value: object) -> set[str]:
    """The names of numbers as W&B shows them: a dot leads into a mapping."""
    if isinstance(value, dict):
        return {found for key, inner in value.items() for found in spread(f"{name}.{key}", inner)}
    return {name}


def logged_by(run: Path) -> dict[str, set[str]]:
    """Kind of panel -> every name that W&B's own logs of the run hold for it."""
    folders = sorted(run.glob("*/log"))
    rows, summary, logs = {}, {}, [read_log(folder) for folder in folders]
    for folder in folders:
        for log in attempts(folder):
            rows |= {
                name: value
                for row in items(log)
                for name, value in row.items()
                if not name.startswith("_")
            }
            updates = [one for record in records(log) for one in record.summary.update]
            summary |= {
                one.key or ".".join(one.nested_key): json.loads(one.value_json) for one in updates
            }
    media = {
        name.removesuffix("._type"): kind for name, kind in rows.items() if name.endswith("._type")
    }
    numbers = {name for name in rows if name.partition(".")[0] not in media}
    tables = {name for name, kind in media.items() if kind == "table-file"}
    charts = {name for name in tables if name.endswith("_table")}
    copied = {
        name for name in summary if name.partition(".")[0] in media or name.startswith("_")
    }  # of the newest row
    summarised = {name: value for name, value in summary.items() if name not in copied}
    assert not media.keys() & {name for log in logs for name in log.summary}, (
        "one would take the other's place"
    )
    return {
        "curves": numbers,
        "bars": numbers
        | {found for name, value in summarised.items() for found in spread(name, value)},
        "chart": {name.removesuffix("_table") for name in charts},
        "table": tables - charts,
        "images": {name for name, kind in media.items() if kind == "image-file"},
    }


def panels_of(recipe: Recipe) -> list[Panel]:
    return [panel for section in layout(pipeline_of(recipe)) for panel in section.panels]


def names_of(panels: list[Panel], begin: str) -> set[str]:
    return {name for panel in panels for name in panel.keys if name.startswith(begin)}


@pytest.fixture(scope="module")
def logged(finished: Path) -> dict[str, set[str]]:
    return logged_by(finished)


@pytest.fixture(scope="module")
def panels(recipe: Recipe) -> list[Panel]:
    return panels_of(recipe)


def test_every_panel_shows_what_is_logged(logged: dict[str, set[str]], panels: list[Panel]) -> None:
    for panel in panels:
        assert panel.keys, panel.title
        if not panel.needs:
            assert set(panel.keys) <= logged[panel.kind], panel.title
        assert panel.x in logged["curves"]


def test_what_only_some_runs_log_is_logged_under_that_name(panels: list[Panel]) -> None:
    folders = (ROOT / "training", ROOT / "evaluation")
    sources = "".join(
        path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")
    )
    names = [
        name
        for panel in panels
        if panel.needs
        for name in panel.keys
        if not name.startswith("sweep/")
    ]
    assert set(names) == {
        "train/mfu", "train/router_entropy", "train/busiest_expert", "train/router_loss",
        "eval/breakdowns", "eval/not_run",
    }  # fmt: skip
    for name in names:
        # the evaluation logs its tables as f"eval/{table}"
        logged_as = name.removeprefix("eval/")
        assert f'"{name}"' in sources or f'"{logged_as}"' in sources, name


def test_no_group_of_names_is_left_out(logged: dict[str, set[str]], panels: list[Panel]) -> None:
    shown = {name.partition("/")[0] for panel in panels for name in panel.keys}
    assert {name.partition("/")[0] for names in logged.values() for name in names} == shown


def test_every_table_chart_figure_and_curve_is_shown(
    logged: dict[str, set[str]], panels: list[Panel]
) -> None:
    for kind in ("table", "chart", "images", "curves"):
        shown = {name for panel in panels for name in [*panel.keys, panel.x]}
        assert logged[kind] <= shown


def test_a_recipe_without_preview_and_sweep_has_no_panels_of_them(
    recipe_path: Path, tmp_path: Path
) -> None:
    panels = panels_of(load_recipe(recipe_path, [f"runs={tmp_path}"]))
    assert not names_of(panels, "preview/") | names_of(panels, "sweep/")


@pytest.mark.parametrize(
    "prompts", [[], ["evaluation.prompts=null"]], ids=["without checks", "with checks"]
)
def test_a_preview_shows_all_that_is_made_of_its_replies(
    recipe_path: Path, pair: Path, prompts: list[str]
) -> None:
    given = load_recipe(recipe_path, ["training.preview.every=2", *prompts])
    asked = read_prompts(given)
    interview = make_interview(
        asked, load_tokenizer(pair / "chat"), read_chat_template(pair / "chat"), 8
    )
    metrics, _ = interview.score([[2]] * len(asked))
    expected = {f"preview/{name}" for name in metrics} | {"preview/replies", "preview/seconds"}
    assert names_of(panels_of(given), "preview/") == expected


def test_a_sweep_shows_the_figures_of_its_rule(recipe_path: Path, tmp_path: Path) -> None:
    def shown(*overrides: str) -> set[str]:
        panels = panels_of(load_recipe(recipe_path, [f"runs={tmp_path}", *overrides]))
        return {
            name
            for panel in panels
            if panel.kind == "chart"
            for name in panel.keys
            if name.startswith("sweep/")
        }

    of_rule = {"sweep/chat", "sweep/in_language", "sweep/bits_per_byte"}
    assert shown("sweep.recommend.tolerance=0.1") == of_rule
    assert shown("sweep.recommend.at_most.repetition=0.3") == {*of_rule, "sweep/repetition"}
    assert shown('sweep.suites=["language"]', "sweep.recommend.quality=bits_per_byte") == {
        "sweep/bits_per_byte"
    }
    (tmp_path / "tiny" / "sweep").mkdir(parents=True)
    assert shown() == of_rule, "the recipe says nothing of it, and the run was swept"


@pytest.mark.slow
def test_preview_and_sweep_of_a_real_run_are_shown(recipe_path: Path, tmp_path: Path) -> None:
    ratios, changes = (
        ["--ratios", "0:1:0.5"],
        [f"runs={tmp_path}", "training.preview.every=3", "launch.processes=1"],
    )
    for command in (["run"], ["sweep", *ratios]):
        done = cpt_merge(*command, recipe_path, *changes)
        assert done.returncode == 0, done.stdout + done.stderr
    logged, panels = logged_by(tmp_path / "tiny"), panels_of(load_recipe(recipe_path, changes))
    for panel in panels:
        if not panel.needs:
            assert set(panel.keys) <= logged[panel.kind], panel.title
    for kind in ("table", "chart", "images", "curves"):
        assert logged[kind] <= {name for panel in panels for name in [*panel.keys, panel.x]}
    rows = read_log(tmp_path / "tiny" / "training" / "log").rows
    assert all("train/tokens" in row for row in rows if "preview/seconds" in row), (
        "to be drawn over tokens"
    )
    assert (tmp_path / "tiny" / "sweep" / "stage.json").is_file()


def test_dry_run_prints_the_workspace_without_key_or_network(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra `dashboard` is not installed")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    done = cpt_merge("dashboard", recipe_path, "--dry-run", "--save-as", "mine")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["name"] == "mine"
    (runs,) = printed["spec"]["section"]["runSets"]
    (filtered,) = runs["filters"]["filters"]
    assert filtered["key"]["name"] == "group"
    assert filtered["value"].startswith("tiny-")
