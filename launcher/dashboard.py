"""What a recipe's W&B workspace shows: the names of its metrics, from the recipe and the prompts that it names."""

from __future__ import annotations

from cpt_merge.core.progress import say
from cpt_merge.evaluation.evaluators.form import METRICS as FORM
from cpt_merge.evaluation.evaluators.instructions import CHECKS_STRICT
from cpt_merge.evaluation.evaluators.language import BITS, METRIC
from cpt_merge.evaluation.figures import figures_for
from cpt_merge.evaluation.suites import Setup, metrics_of_replies
from cpt_merge.evaluation.sweep.recommend import drawn_metrics
from cpt_merge.launcher.identity import IDS_FILE, group_name
from cpt_merge.launcher.preview import read_prompts
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.tracking.dashboard import Pipeline, ReplyMetric


def pipeline_of(recipe: Recipe) -> Pipeline:
    """The pipeline as the dashboard needs it. Prompts are read; a wrong one is a `UserError`."""
    metrics = [
        ReplyMetric(
            metric.name,
            f"{evaluator.capitalize()}: {metric.heading}",
            "share" if metric.share else "",
            languages,
        )
        for evaluator, metric, languages in metrics_of_replies(
            Setup(recipe.evaluation, recipe.corpus)
        )
    ]
    names = [BITS] * ("language" in recipe.evaluation.suites) + [metric.name for metric in metrics]
    if not (recipe.directory / IDS_FILE).is_file():
        say(
            f"dashboard: nothing was logged from {recipe.directory} yet; it shows what will be logged from there"
        )
    return Pipeline(
        group_name(recipe.name, recipe.directory), recipe.corpus.languages(), metrics, figures_for(names),
        previewed=_previewed(recipe), swept=_swept(recipe),
    )  # fmt: skip


def _previewed(recipe: Recipe) -> list[ReplyMetric]:
    """What is logged of a preview's replies: their form and, where prompts have them, the checks that they pass."""
    if recipe.training.preview.every is None:
        return []
    asked = read_prompts(recipe)
    everywhere = list(dict.fromkeys(one.language for one in asked))
    checked = list(dict.fromkeys(one.language for one in asked if one.turns[0].checks))
    of_form = [
        ReplyMetric(one.name, f"Preview: {one.heading}", "share", everywhere) for one in FORM
    ]
    of_checks = ReplyMetric(
        CHECKS_STRICT.name, f"Preview: {CHECKS_STRICT.meaning}", "share", checked
    )
    return [*of_form, of_checks] if checked else of_form


def _swept(recipe: Recipe) -> dict[str, str]:
    """What a sweep draws over the ratio, if the recipe has a section for it or the run was swept already."""
    if "sweep" not in recipe.model_fields_set and not (recipe.directory / "sweep").exists():
        return {}
    rule, suites = recipe.sweep.recommend, recipe.sweep.suites
    measured = recipe.evaluation.model_copy(update={"suites": suites})
    known = {
        one.name: one.heading for _, one, _ in metrics_of_replies(Setup(measured, recipe.corpus))
    }
    known |= {BITS: METRIC.heading} if "language" in suites else {}
    of_rule = {
        rule.quality,
        *rule.at_least,
        *rule.at_most,
    }  # a sweep that did not measure one of these would stop
    return {
        name: known.get(name, name).capitalize()
        for name in drawn_metrics(rule)
        if name in known or name in of_rule
    }
