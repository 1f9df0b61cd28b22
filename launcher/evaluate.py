"""`cpt-merge evaluate`: the stage of a recipe, or an evaluation of any model directories without one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import fingerprint, make_writable, stage_key
from cpt_merge.core.config import Section, apply_override, key, parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.core.models import model_directory
from cpt_merge.core.progress import say
from cpt_merge.core.world import find_world
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.tracking import TrackingConfig

MANY = ("--models", "--text")  # options that take all NAME=VALUE words behind them
PAIR = re.compile(r"(?!(?:evaluation|tracking)\.)[\w.-]+=.+")  # and no override


class Settings(Section):
    """The sections of a recipe that an evaluation without one may set."""

    evaluation: EvaluationConfig = key(EvaluationConfig(suites=["form"]), "evaluation")
    tracking: TrackingConfig = key(TrackingConfig(mode="disabled"), "tracking")


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line. `words` are `[RECIPE] [section.key=value ...]`."""

    words: list[str]
    models: list[str] = field(default_factory=list)
    suite: str | None = None
    text: list[str] = field(default_factory=list)
    template: str | None = None
    out: Path | None = None

    @property
    def recipe(self) -> Path | None:
        """The recipe, if one was given."""
        return Path(self.words[0]) if self.words and "=" not in self.words[0] else None

    @property
    def overrides(self) -> list[str]:
        """What is left of the words."""
        return self.words[int(self.recipe is not None) :]


def one_value_each(arguments: Sequence[str]) -> list[str]:
    """`--models a=A b=B` as `--models a=A --models b=B`; everything else as it is."""
    found: list[str] = []
    option = ""
    for argument in arguments:
        if option and PAIR.fullmatch(argument) and found[-1] != option:
            found.append(option)
        elif not (option and found[-1] == option):
            option = argument if argument in MANY else ""
        found.append(argument)
    return found


def evaluate(request: Request) -> None:
    """Do what was asked for. Raises `UserError`."""
    if request.recipe is None:
        _evaluate_directories(request)
        return
    given = {
        name: getattr(request, name) for name in ("models", "suite", "text", "template", "out")
    }
    extra = [f"--{name}" for name, value in given.items() if value]
    if extra:
        raise UserError(
            f"{', '.join(extra)} and a recipe say the same; leave out one (the recipe's suites: evaluation.suites)."
        )
    from cpt_merge.launcher.execute import run_stage
    from cpt_merge.launcher.run import Run
    from cpt_merge.launcher.stages import EVALUATION

    run_stage(Run.load(request.recipe, request.overrides), EVALUATION)


def _evaluate_directories(request: Request) -> None:
    if not request.models or request.out is None:
        raise UserError("give a RECIPE, or --models NAME=DIR ... and --out DIR.")
    settings = _settings(request)
    if settings.evaluation.models:
        raise UserError("evaluation.models is for a recipe; name these models with --models too.")
    models = {
        name: model_directory(path) for name, path in _pairs("--models", request.models).items()
    }
    text = {find_language(tag).tag: path for tag, path in _pairs("--text", request.text).items()}
    for tag, path in text.items():
        if not Path(path).expanduser().exists() and not any(
            character in path for character in "*?["
        ):
            raise UserError(f"--text {tag}={path} does not exist; give a file of text.")
    template = model_directory(request.template) if request.template else None
    from cpt_merge.evaluation.kept import input_files
    from cpt_merge.evaluation.run import run
    from cpt_merge.launcher.execute import closing_on_error
    from cpt_merge.launcher.identity import open_tracker

    out = request.out
    if find_world().is_main:
        make_writable(out, "--out")
        if (out / "results.json").exists():
            say(f"evaluation: {out} holds an earlier evaluation, which this one replaces")
    recorded = {
        "models": {name: str(path) for name, path in models.items()},
        **settings.model_dump(),
    }
    inputs = {name: fingerprint(path) for name, path in models.items()} | input_files(
        settings.evaluation, text
    )
    inputs["template"] = fingerprint(template) if template else ""
    the_key = stage_key("evaluation", recorded, inputs)
    name = out.resolve().name
    tracker = open_tracker(
        settings.tracking, "evaluation", name, out, out / "log", the_key, recorded
    )
    with closing_on_error(tracker, "evaluation"):
        run(settings.evaluation, models, text, template, out, tracker)
    tracker.finish()
    say(f"evaluation: done -> {out}")


def _settings(request: Request) -> Settings:
    values: dict[str, Any] = {"evaluation": {}, "tracking": {"mode": "disabled"}}
    for override in request.overrides:
        apply_override(values, override)
    if request.suite is not None and "suites" in values["evaluation"]:
        raise UserError("--suite and evaluation.suites say the same; leave out one.")
    if request.suite is not None:
        values["evaluation"]["suites"] = [name.strip() for name in request.suite.split(",")]
    return parse_section(Settings, values, "the evaluation's settings")


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
