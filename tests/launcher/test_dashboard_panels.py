"""What `cpt-merge dashboard` charts is what the stages log: held against the log of a real small run."""

import json
from pathlib import Path

import pytest

from launcher.recipe import Recipe
from launcher.stages import STAGES
from tests.launcher.conftest import ROOT, cpt_merge
from tracking import read_log
from tracking.dashboard import Panel, Pipeline, layout


def flat(values: dict, prefix: str = "") -> set[str]:
    """Names as W&B shows them: a dot leads into a mapping."""
    return {
        name
        for key, value in values.items()
        for name in (flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"})
    }


@pytest.fixture(scope="module")
def logged(finished: Path) -> dict[str, set[str]]:
    """Kind of panel -> every name that the run logged for it."""
    logs = [read_log(finished / stage.name / "log") for stage in STAGES]
    rows = {name for log in logs for row in log.rows for name in row} - {"time"}
    return {
        "curves": rows,
        "bars": rows | {name for log in logs for name in flat(log.summary)},
        "table": {name for log in logs for name in log.tables},
        "images": {name for log in logs for name in log.images},
    }


@pytest.fixture(scope="module")
def panels(recipe: Recipe) -> list[Panel]:
    languages = recipe.corpus.languages()
    return [panel for section in layout(Pipeline("group", languages, languages)) for panel in section.panels]


def test_every_panel_shows_what_is_logged(logged: dict[str, set[str]], panels: list[Panel]) -> None:
    for panel in panels:
        assert panel.keys, panel.title
        if not panel.needs:
            assert set(panel.keys) <= logged[panel.kind], panel.title
        assert panel.x in logged["curves"]


def test_what_only_some_runs_log_is_logged_under_that_name(panels: list[Panel]) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "training").rglob("*.py"))
    names = [name for panel in panels if panel.needs for name in panel.keys]
    assert names == ["train/mfu"]
    assert all(f'"{name}"' in sources for name in names)


def test_no_group_of_names_is_left_out(logged: dict[str, set[str]], panels: list[Panel]) -> None:
    shown = {name.partition("/")[0] for panel in panels for name in panel.keys}
    assert {name.partition("/")[0] for names in logged.values() for name in names} == shown


def test_every_table_figure_and_curve_is_shown(logged: dict[str, set[str]], panels: list[Panel]) -> None:
    for kind in ("table", "images", "curves"):
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
