"""The sweep: merge every ratio in memory and measure it; then search, draw and recommend."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import stage_key, write_json_lines
from cpt_merge.core.distributed import Ranks, joined
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.evaluation.compare import metrics_by_evaluator, summarise
from cpt_merge.evaluation.config import MERGED, EvaluationConfig
from cpt_merge.evaluation.evaluators.evaluator import Evaluator, Subject
from cpt_merge.evaluation.evaluators.judge import COMPARISON
from cpt_merge.evaluation.evaluators.language import BITS
from cpt_merge.evaluation.generate.config import TRANSFORMERS
from cpt_merge.evaluation.generate.transformers import TransformersEngine
from cpt_merge.evaluation.heldout import Text, languages_of
from cpt_merge.evaluation.models import shared_context
from cpt_merge.evaluation.outputs import judges_took, sample_rows
from cpt_merge.evaluation.run import measure
from cpt_merge.evaluation.suites import Setup, check_judges, make_evaluators, metrics_of_replies
from cpt_merge.evaluation.sweep import search
from cpt_merge.evaluation.sweep.config import SweepConfig
from cpt_merge.evaluation.sweep.model import MergedModel
from cpt_merge.evaluation.sweep.outputs import SweepResult, report, show_progress
from cpt_merge.evaluation.sweep.points import EVERYTHING, KeptPoints, Point, merge_config, name_of
from cpt_merge.evaluation.sweep.recommend import rate, recommend
from cpt_merge.evaluation.tables import show_judges, show_left_out
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.plan import MergeInputs, plan
from cpt_merge.merge.vectors import check_base
from cpt_merge.tracking import Tracker


@dataclass(frozen=True)
class SweepInputs:
    """What a sweep reads. `languages` are the new ones; `fingerprints` identify all inputs."""

    merge: MergeInputs
    text: Text
    languages: Sequence[str]
    fingerprints: Mapping[str, str]
    trained_on: int | None = None  # length of the sequences of continued pretraining


def run(
    config: SweepConfig,
    evaluation: EvaluationConfig,
    merge: MergeConfig,
    inputs: SweepInputs,
    out: Path,
    tracker: Tracker,
) -> dict[str, Any]:
    """Measure the chat model at every ratio, and write results.json, curves.png and samples.

    Any number of processes may call this together. Points in `out` with the same inputs and
    settings are not measured again. Returns the numbers for a summary. Raises `UserError`, also for
    a rule that names an unknown metric.
    """
    if config.search.trials:
        search.check_installed()
    sweep = Sweep.prepare(config, evaluation, merge, inputs, out)
    with joined() as ranks:
        found = sweep.measure_all(ranks, tracker)
        if ranks.is_main:
            report(found, out, tracker, final=True)
    return found.summary()


def _metrics_of_one_model(setup: Setup) -> dict[str, list[str]]:
    """The metrics of one model alone with their languages; comparisons need two models."""
    metrics = metrics_of_replies(setup)
    bits = {BITS: languages_of(setup.text)} if "language" in setup.config.suites else {}
    return bits | {
        metric.name: asked for _, metric, asked in metrics if not metric.name.startswith(COMPARISON)
    }


def _check_rule(
    config: SweepConfig, metrics: Mapping[str, Sequence[str]], new: Sequence[str]
) -> None:
    """Raise `UserError` if a metric of the rule is not measured in any of the new languages."""
    rule = config.recommend
    for name in (rule.quality, *rule.at_least, *rule.at_most):
        if name not in metrics:
            raise UserError(
                f"sweep.recommend names {name}, which sweep.suites {', '.join(config.suites)} do "
                f"not measure; they measure {', '.join(metrics)}."
            )
        if not set(new) & set(metrics[name]):
            measured = ", ".join(metrics[name]) or "no language"
            raise UserError(
                f"sweep.recommend names {name}, which is measured in {measured} only; choose "
                f"another metric, or give prompts in {' or '.join(new)}."
            )


@dataclass
class Sweep:
    """A sweep that is ready to start."""

    config: SweepConfig
    evaluation: EvaluationConfig  # the settings for the points
    merge: MergeConfig
    inputs: SweepInputs
    evaluators: Sequence[Evaluator]
    out: Path

    @staticmethod
    def prepare(
        config: SweepConfig,
        evaluation: EvaluationConfig,
        merge: MergeConfig,
        inputs: SweepInputs,
        out: Path,
    ) -> Sweep:
        """Check what can be checked before a model is loaded."""
        evaluation.check_keys()
        context = shared_context({"cpt": inputs.merge.cpt}, evaluation.context, inputs.trained_on)
        changes: dict[str, Any] = {"suites": config.suites, "context": context, "models": {}}
        if config.max_prompts is not None:
            changes["max_prompts"] = config.max_prompts
        if evaluation.engine_for(MERGED) != TRANSFORMERS:
            say("sweep: transformers generates the replies, since no server has the merged weights")
        measured = evaluation.model_copy(update=changes)
        setup = Setup(measured, inputs.text)
        evaluators = make_evaluators(setup)
        if not measured.lm_eval_tasks:  # its metrics are not known before it has run
            _check_rule(config, _metrics_of_one_model(setup), inputs.languages)
        check_judges(setup, evaluators)
        return Sweep(config, measured, merge, inputs, evaluators, out)

    def measure_all(self, ranks: Ranks, tracker: Tracker) -> SweepResult:
        """Measure all points, on every process."""
        the_plan = plan(self.merge, self.inputs.merge)
        for vector in the_plan.vectors:
            check_base(vector.source)
        model = MergedModel(the_plan, ranks.world.local_rank, self.evaluation)
        kept = ranks.broadcast(lambda: KeptPoints(self.out).read())
        found = SweepResult(self.config, self.inputs.languages, self.evaluators, [])

        def take(ratios: dict[str, float]) -> None:
            point = self._point(ratios, model, kept, ranks)
            kept[point.key] = point  # the search may suggest it again
            at_zero = found.rated[0].point if found.rated else point
            found.rated.append(rate(point, self.config.recommend, self.inputs.languages, at_zero))
            if ranks.is_main:
                report(found, self.out, tracker, final=False)
                show_progress(found)

        kinds = [kind for kind in self.config.search.kinds if kind in model.kinds]
        if self.config.search.trials and not kinds:
            named = ", ".join(self.config.search.kinds)
            raise UserError(f"sweep.search.kinds are {named}, which the model lacks; name others.")
        earlier = [
            point.ratio
            for point in kept.values()
            if point.ratio is not None and self._identify(point.ratios)[1] == point.key
        ]  # a sweep adds to the one before it, if the settings are the same
        for ratio in sorted({0.0, *self.config.ratios, *earlier}, key=lambda one: (one != 0, one)):
            take({EVERYTHING: ratio})  # 0 first: the others are compared with it
        for number in range(self.config.search.trials):
            take(search.suggest(self.config.search, kinds, found.rated, number))
        found.recommendation = recommend(found.rated, self.config.recommend)
        return found

    def _identify(self, ratios: dict[str, float]) -> tuple[MergeConfig, str]:
        """The merge at these ratios, and the key of its point."""
        config = merge_config(self.merge, ratios, self.config.per_layer)
        settings = {"merge": config.model_dump(), "evaluation": self.evaluation.model_dump()}
        return config, stage_key("sweep point", settings, self.inputs.fingerprints)

    def _point(
        self, ratios: dict[str, float], model: MergedModel, kept: Mapping[str, Point], ranks: Ranks
    ) -> Point:
        """The point of these ratios: kept from before, or measured and kept now."""
        config, key = self._identify(ratios)
        if key in kept:
            say(f"sweep: {name_of(ratios)} is already measured")
            return kept[key]
        merge_seconds = model.merge(config)
        started = time.monotonic()
        subject = Subject(TransformersEngine(model.model, ranks), None, model.template)
        result = measure(subject, self.evaluation, self.evaluators)
        metrics = metrics_by_evaluator(self.evaluators)
        results = summarise([result], metrics, None, self.evaluation.seed)
        seconds, took = time.monotonic() - started, judges_took(results)
        left_out = result.details.get("not_scored", {})
        scores = results.scores[result.name]
        point = Point(key, ratios, scores, merge_seconds, seconds, took, left_out)
        if ranks.is_main:
            folder = self.out / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            rows = ({**row, "ratios": ratios} for row in sample_rows(results))
            write_json_lines(folder / f"{key}.jsonl", rows)
            show_left_out(results)
            show_judges(took)
            if not results.failed:
                KeptPoints(self.out).add(point)
        if results.failed:
            raise UserError(
                f"{results.failed[0]}; fix that and run the same command, which continues at ratio "
                f"{name_of(ratios)}."
            )
        return point
