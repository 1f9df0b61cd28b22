"""`cpt-merge compare`: the evaluated models of several runs side by side. No model is asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cpt_merge.core.artifact import make_writable, stage_key
from cpt_merge.core.config import Section, apply_override, key, parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.evaluation.compare import summarise
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.measured import Measured, MeasuredModel
from cpt_merge.evaluation.outputs import write_and_track
from cpt_merge.evaluation.tables import show_overview, what_differs
from cpt_merge.launcher.identity import open_tracker
from cpt_merge.launcher.recipe import load_recipe
from cpt_merge.launcher.stages import EVALUATION
from cpt_merge.report import write_page
from cpt_merge.report.view import read_run
from cpt_merge.tracking import TrackingConfig


class _Settings(Section):
    """The sections of a recipe that a comparison may set."""

    tracking: TrackingConfig = key(TrackingConfig(mode="disabled"), "tracking")


@dataclass(frozen=True)
class _Row:
    """A model of the comparison, and the run that it is of."""

    run: str
    model: MeasuredModel


def compare(
    runs: Sequence[Path],
    chosen: Sequence[str],
    baseline: str | None,
    out: Path,
    settings: Sequence[str],
) -> None:
    """Compare the models of finished runs, print and track the table, and write `out`.

    `runs` are recipes or folders of runs or evaluations, `chosen` are rows as `ROW` or `NAME=ROW`
    (all if empty). Raises `UserError` for runs that were asked nothing in common.
    """
    values: dict[str, object] = {"tracking": {"mode": "disabled"}}
    for word in settings:
        apply_override(values, word)
    tracking = parse_section(_Settings, values, "the settings of the comparison").tracking
    measured = _alike(_read(runs))
    rows = _choose(_rows(measured), chosen)
    if baseline is not None and baseline not in rows:
        raise UserError(f"--baseline {baseline} is no row; there are {', '.join(rows)}.")
    first = next(iter(measured.values()))
    config = EvaluationConfig(**first.config)
    models = [replace(row.model.result, name=name) for name, row in rows.items()]
    results = summarise(models, first.metrics, baseline, config.seed)
    make_writable(out, "--out")
    folder = out / EVALUATION.name
    about = {"models": {name: row.model.directory for name, row in rows.items()}}
    inputs = {name: row.model.fingerprint for name, row in rows.items()}
    tracker = open_tracker(
        tracking, EVALUATION.name, out.resolve().name, folder, folder / "log",
        stage_key("compare", about, inputs), about,
    )  # fmt: skip
    directories = {name: Path(row.model.directory) for name, row in rows.items()}
    write_and_track(config, directories, results, folder, tracker)
    tracker.finish()
    if results.differences:
        say(what_differs(results))
    show_overview(results)
    write_page(read_run(out))


def _read(places: Sequence[Path]) -> dict[str, Measured]:
    """The evaluations by the names of their runs."""
    found: dict[str, Measured] = {}
    for place in places:
        folder = load_recipe(place, []).directory if place.suffix in (".yaml", ".yml") else place
        if not folder.is_dir():
            raise UserError(f"there is no run {folder}; give a recipe, or the folder of a run.")
        name = folder.resolve().name
        if name in found:
            raise UserError(
                f"{place} is the second run of the name {name}; its models could not be told "
                "apart, so rename its folder."
            )
        inner = folder / EVALUATION.name
        found[name] = Measured.read(inner if inner.is_dir() else folder)
    return found


def _alike(measured: Mapping[str, Measured]) -> dict[str, Measured]:
    """What the evaluations have in common; a line names each evaluator that is left out.

    Raises `UserError` if that is nothing.
    """
    runs = list(measured)
    common = []
    for evaluator in dict.fromkeys(name for one in measured.values() for name in one.asked):
        asked: dict[str | None, list[str]] = defaultdict(list)
        for run, one in measured.items():
            asked[one.asked.get(evaluator)].append(run)
        if len(asked) == 1:
            common.append(evaluator)
            continue
        groups = " and ".join(", ".join(names) for names in asked.values())
        what = "not all ran it" if None in asked else "other prompts, texts or settings"
        say(f"compare: {evaluator} is left out: {what} ({groups})")
    if not common:
        raise UserError(
            f"{', '.join(runs)} were evaluated on other prompts and texts, or with other settings; "
            "give them the same section `evaluation` and corpus, and evaluate again."
        )
    baselines = {
        model.fingerprint
        for one in measured.values()
        for model in one.models
        if model.result.name == one.baseline
    }
    if len(baselines) > 1 and any(_compares(one) for one in measured.values()):
        say("compare: comparisons of replies are left out: the runs have other baselines")
    return {run: one.only(common, len(baselines) == 1) for run, one in measured.items()}


def _compares(measured: Measured) -> bool:
    return any(len(one.result.findings) > len(measured.metrics) for one in measured.models)


def _rows(measured: Mapping[str, Measured]) -> dict[str, _Row]:
    """Every model once; a name that several models have gets its run before it."""
    once: dict[str, _Row] = {}
    for run, one in measured.items():
        for model in one.models:
            once.setdefault(model.fingerprint, _Row(run, model))
    names = [row.model.result.name for row in once.values()]
    return {
        name if names.count(name) == 1 else f"{row.run}:{name}": row
        for name, row in zip(names, once.values(), strict=True)
    }


def _choose(rows: Mapping[str, _Row], chosen: Sequence[str]) -> dict[str, _Row]:
    """The chosen rows in their order, under the names that were given."""
    found: dict[str, _Row] = {}
    for word in chosen:
        name, _, row = word.rpartition("=")
        if row not in rows:
            there = ", ".join(rows)
            raise UserError(f"--models {word}: no model is called {row}; there are {there}.")
        if (name or row) in found:
            raise UserError(f"--models names {name or row} twice; give each its own name.")
        found[name or row] = rows[row]
    return found or dict(rows)
