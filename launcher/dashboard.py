"""What a recipe's W&B workspace contains: the names of its metrics, from the recipe and prompts."""

from __future__ import annotations

from cpt_merge.core.progress import say
from cpt_merge.evaluation.evaluators.form import METRICS as FORM
from cpt_merge.evaluation.evaluators.instructions import CHECKS_STRICT
from cpt_merge.evaluation.evaluators.language import BITS, METRIC
from cpt_merge.evaluation.evaluators.thoughts import ThoughtsEvaluator
from cpt_merge.evaluation.figures import figures_for
from cpt_merge.evaluation.suites import Setup, metrics_of_replies
from cpt_merge.evaluation.sweep.recommend import drawn_metrics
from cpt_merge.launcher.identity import IDS_FILE, group_name
from cpt_merge.launcher.preview import read_prompts
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.run import Run
from cpt_merge.tracking.workspace import Pipeline, ReplyMetric


def pipeline_of(recipe: Recipe) -> Pipeline:
    """The pipeline as the dashboard needs it. Reads the prompts; `UserError` if they are wrong."""
    found = metrics_of_replies(Setup(recipe.evaluation, recipe.corpus))
    metrics = [
        ReplyMetric(
            one.name,
            f"{evaluator.capitalize()}: {one.heading}",
            "share" if one.share else "",
            languages,
        )
        for evaluator, one, languages in found
        if evaluator != ThoughtsEvaluator.name  # only some models have them, nor is there a chart
    ]
    names = [BITS] * ("language" in recipe.evaluation.suites) + [metric.name for metric in metrics]
    if not (recipe.directory / IDS_FILE).is_file():
        say(f"dashboard: {recipe.directory} has logged nothing yet; its next runs will be shown")
    return Pipeline(
        group_name(recipe.name, recipe.directory),
        recipe.corpus.languages(),
        metrics,
        figures_for(names),
        ["base", "chat", *Run(recipe).made_models()],
        previewed=_previewed(recipe),
        swept=_swept(recipe),
    )


def _previewed(recipe: Recipe) -> list[ReplyMetric]:
    """What a preview logs of its replies: their form and, if prompts have them, the checks."""
    if recipe.training.preview.every is None:
        return []
    asked = read_prompts(recipe)
    languages = list(dict.fromkeys(one.language for one in asked))
    checked = list(dict.fromkeys(one.language for one in asked if one.turns[0].checks))
    texts = [(one.name, one.heading, languages) for one in FORM]
    texts += [(CHECKS_STRICT.name, CHECKS_STRICT.meaning, checked)] * bool(checked)
    return [ReplyMetric(name, f"Preview: {text}", "share", of) for name, text, of in texts]


def _swept(recipe: Recipe) -> dict[str, str]:
    """What a sweep draws over the ratio; empty if the recipe has no sweep and there was none."""
    if "sweep" not in recipe.model_fields_set and not (recipe.directory / "sweep").exists():
        return {}
    rule, suites = recipe.sweep.recommend, recipe.sweep.suites
    setup = Setup(recipe.evaluation.model_copy(update={"suites": suites}), recipe.corpus)
    titles = {one.name: one.heading for _, one, _ in metrics_of_replies(setup)}
    titles |= {BITS: METRIC.heading} if "language" in suites else {}
    # a sweep that did not measure a metric of the rule would stop
    of_rule = {rule.quality, *rule.at_least, *rule.at_most}
    drawn = [name for name in drawn_metrics(rule) if name in titles or name in of_rule]
    return {name: titles.get(name, name).capitalize() for name in drawn}
