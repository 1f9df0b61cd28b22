"""What `cpt-merge dashboard` charts is what the stages log: held against the log of a real small run."""

import json
from pathlib import Path

import pytest

from launcher.dashboard import pipeline_of
from launcher.recipe import Recipe
from launcher.stages import STAGES
from tests.launcher.conftest import ROOT, cpt_merge
from tests.tracking.wandb_log import attempts, items, records
from tracking import read_log
from tracking.dashboard import Panel, layout


def spread(name: str, value: object) -> set[str]:
    """The names of numbers as W&B shows them: a dot leads into a mapping."""
    if isinstance(value, dict):
        return {found for key, inner in value.items() for found in spread(f"{name}.{key}", inner)}
    return {name}


@pytest.fixture(scope="module")
def logged(finished: Path) -> dict[str, set[str]]:
    """Kind of panel -> every name that W&B's own log of the run holds for it."""
    rows, summary, logs = {}, {}, [read_log(finished / stage.name / "log") for stage in STAGES]
    for stage in STAGES:
        for log in attempts(finished / stage.name / "log"):
            rows |= {name: value for row in items(log) for name, value in row.items() if not name.startswith("_")}
            updates = [one for record in records(log) for one in record.summary.update]
            summary |= {one.key or ".".join(one.nested_key): json.loads(one.value_json) for one in updates}
    media = {name.removesuffix("._type"): kind for name, kind in rows.items() if name.endswith("._type")}
    numbers = {name for name in rows if name.partition(".")[0] not in media}
    tables = {name for name, kind in media.items() if kind == "table-file"}
    charts = {name for name in tables if name.endswith("_table")}
    copied = {name for name in summary if name.partition(".")[0] in media or name.startswith("_")}  # of the newest row
    summarised = {name: value for name, value in summary.items() if name not in copied}
    assert not media.keys() & {name for log in logs for name in log.summary}, "one would take the other's place"
    return {
        "curves": numbers,
        "bars": numbers | {found for name, value in summarised.items() for found in spread(name, value)},
        "chart": {name.removesuffix("_table") for name in charts},
        "table": tables - charts,
        "images": {name for name, kind in media.items() if kind == "image-file"},
    }


@pytest.fixture(scope="module")
def panels(recipe: Recipe) -> list[Panel]:
    return [panel for section in layout(pipeline_of(recipe)) for panel in section.panels]


def test_every_panel_shows_what_is_logged(logged: dict[str, set[str]], panels: list[Panel]) -> None:
    for panel in panels:
        assert panel.keys, panel.title
        if not panel.needs:
            assert set(panel.keys) <= logged[panel.kind], panel.title
        assert panel.x in logged["curves"]


def test_what_only_some_runs_log_is_logged_under_that_name(panels: list[Panel]) -> None:
    folders = (ROOT / "training", ROOT / "evaluation")
    sources = "".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    names = [name for panel in panels if panel.needs for name in panel.keys]
    assert names == ["train/mfu", "eval/breakdowns", "eval/not_run"]
    assert all(f'"{name}"' in sources for name in names)


def test_no_group_of_names_is_left_out(logged: dict[str, set[str]], panels: list[Panel]) -> None:
    shown = {name.partition("/")[0] for panel in panels for name in panel.keys}
    assert {name.partition("/")[0] for names in logged.values() for name in names} == shown


def test_every_table_chart_figure_and_curve_is_shown(logged: dict[str, set[str]], panels: list[Panel]) -> None:
    for kind in ("table", "chart", "images", "curves"):
        shown = {name for panel in panels for name in [*panel.keys, panel.x]}
        assert logged[kind] <= shown


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
