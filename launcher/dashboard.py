"""What a recipe's W&B workspace shows: the names of its metrics, from the recipe and the prompts that it names."""

from __future__ import annotations

from evaluation.facets.language import BITS
from evaluation.figures import pictures
from evaluation.suites import Setup, figures_of_replies
from launcher.pipeline import group_name
from launcher.recipe import Recipe
from tracking.dashboard import Figure, Pipeline


def pipeline_of(recipe: Recipe) -> Pipeline:
    """The pipeline as the dashboard needs it. Prompts are read; a wrong one is a `UserError`."""
    figures = [
        Figure(figure.name, f"{facet.capitalize()}: {figure.heading}", "share" if figure.share else "", languages)
        for facet, figure, languages in figures_of_replies(Setup(recipe.evaluation, recipe.corpus))
    ]
    names = [BITS] * ("language" in recipe.evaluation.suites) + [figure.name for figure in figures]
    return Pipeline(group_name(recipe), recipe.corpus.languages(), figures, pictures(names))
