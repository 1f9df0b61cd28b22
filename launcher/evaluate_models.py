"""`cpt-merge evaluate-models`: an evaluation of any models, without a recipe."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import fingerprint, make_writable, stage_key
from cpt_merge.core.config import Section, apply_override, key, parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import model_directory
from cpt_merge.core.languages import find_language
from cpt_merge.core.progress import say
from cpt_merge.core.world import find_world
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.tracking import TrackingConfig


class _EvaluationSettings(Section):
    """The sections of a recipe that an evaluation without one may set."""

    evaluation: EvaluationConfig = key(EvaluationConfig(suites=["form"]), "evaluation")
    tracking: TrackingConfig = key(TrackingConfig(mode="disabled"), "tracking")


def evaluate(
    models: Sequence[str], out: Path, settings: Sequence[str], suites: str | None = None,
    text: Sequence[str] = (), template: str | None = None,
) -> None:  # fmt: skip
    """Evaluate models (`NAME=DIR`) and write `out`; `text` are `TAG=FILE`. Raises `UserError`."""
    given = _settings(settings, suites)
    if given.evaluation.models:
        raise UserError("evaluation.models is for a recipe; name these models with --model too.")
    directories = {name: model_directory(path) for name, path in _pairs("--model", models).items()}
    texts = {find_language(tag).tag: path for tag, path in _pairs("--text", text).items()}
    for tag, path in texts.items():
        if not Path(path).expanduser().exists() and not set(path) & set("*?["):
            raise UserError(f"--text {tag}={path} does not exist; give a file of text.")
    template_of = model_directory(template) if template else None
    from cpt_merge.evaluation.kept import input_files
    from cpt_merge.evaluation.run import run
    from cpt_merge.launcher.execute import closing_on_error
    from cpt_merge.launcher.identity import open_tracker

    with _removed_on_failure(out):
        if find_world().is_main:
            make_writable(out, "--out")
            if (out / "results.json").exists():
                say(f"evaluation: {out} holds an earlier evaluation, which this one replaces")
        config = {
            "models": {name: str(path) for name, path in directories.items()}, **given.model_dump()
        }  # fmt: skip
        inputs = {name: fingerprint(path) for name, path in directories.items()}
        inputs |= input_files(given.evaluation, texts)
        inputs["template"] = fingerprint(template_of) if template_of else ""
        tracker = open_tracker(
            given.tracking, "evaluation", out.resolve().name, out, out / "log",
            stage_key("evaluation", config, inputs), config,
        )  # fmt: skip
        with closing_on_error(tracker, "evaluation"):
            run(given.evaluation, directories, texts, template_of, out, tracker)
        tracker.finish()
    say(f"evaluation: done -> {out}")


@contextmanager
def _removed_on_failure(out: Path) -> Iterator[None]:
    """If the block creates `out` and fails before a model is measured, `out` is removed again."""
    from cpt_merge.evaluation.kept import kept_folder

    is_new = find_world().is_main and not out.exists()
    try:
        yield
    except BaseException:
        if is_new and not (out / "results.json").exists() and not kept_folder(out).exists():
            shutil.rmtree(out, ignore_errors=True)
        raise


def _settings(words: Sequence[str], suites: str | None) -> _EvaluationSettings:
    values: dict[str, Any] = {"evaluation": {}, "tracking": {"mode": "disabled"}}
    for word in words:
        apply_override(values, word)
    if suites is not None and "suites" in values["evaluation"]:
        raise UserError("--suite and evaluation.suites say the same; leave out one.")
    if suites is not None:
        values["evaluation"]["suites"] = [name.strip() for name in suites.split(",")]
    return parse_section(_EvaluationSettings, values, "the evaluation's settings")


def _pairs(option: str, words: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words, by name."""
    found: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not (separator and name and value) or "/" in name:
            raise UserError(f"{option} {word} is not of the form NAME=VALUE.")
        if name in found:
            raise UserError(f"{option} names {name} twice; give each its own name.")
        found[name] = value
    return found
