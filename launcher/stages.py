"""The stages of a run, in order. Everything that needs to know them reads this list.

The command line imports this module at its start, so what takes long to import is imported by the
functions that need it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt_merge.core.artifact import fingerprint
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import model_directory, model_fingerprint
from cpt_merge.launcher.chat_stages import (
    CONVERSATIONS,
    DPO,
    FINETUNE,
    FINETUNE_AFTER_MERGE,
    FINETUNE_MERGE,
    FORMAT,
    PAIRS,
)
from cpt_merge.launcher.cpt_stages import DATA, EMBEDDINGS, MERGE, TOKENIZER, TRAINING
from cpt_merge.launcher.stage import Stage, StageContext

if TYPE_CHECKING:
    from cpt_merge.launcher.recipe import Recipe
    from cpt_merge.launcher.run import Run
    from cpt_merge.tracking import Tracker

__all__ = [
    "CONVERSATIONS", "DATA", "DPO", "EMBEDDINGS", "EVALUATION", "FINETUNE", "FINETUNE_MERGE",
    "FORMAT", "MERGE", "PAIRS", "STAGE_NAMES", "SWEEP", "TOKENIZER", "TRAINING", "find_stage",
    "pipeline", "stages_of",
]  # fmt: skip


def _prompt_inputs(recipe: Recipe) -> dict[str, str]:
    """The fingerprints of the files that the evaluation asks from, and of the classifier."""
    files, classifier = recipe.evaluation.files(), recipe.evaluation.classifier
    found = {name: fingerprint(Path(path).expanduser()) for name, path in files.items()}
    return found | ({"classifier": model_fingerprint(classifier)} if classifier else {})


def _evaluate(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.evaluation.run import run

    paths, recipe = context.run, context.run.recipe
    models = {**paths.own_models(), **paths.further_models()}
    return run(
        recipe.evaluation, models, recipe.corpus, paths.chat, context.folder, tracker,
        recipe.training.sequence_length,
    )  # fmt: skip


def _evaluation_inputs(run: Run) -> dict[str, str]:
    evaluation = run.recipe.evaluation
    further = {f"model {name}": model_fingerprint(path) for name, path in evaluation.models.items()}
    return {**run.pair_inputs(), **_prompt_inputs(run.recipe), **run.corpus_inputs(), **further}


def _nothing_failed(results: Path) -> bool:
    from cpt_merge.evaluation.outputs import is_complete

    return is_complete(results)


EVALUATION = Stage(
    name="evaluation",
    command="evaluate",
    help="Evaluate base, chat, CPT and merged model: bits per byte, form of replies, chat, "
    "knowledge, safety.",
    config=lambda r: {"evaluation": r.evaluation.model_dump(), "corpus": r.corpus.text()},
    inputs={"cpt": TRAINING, "merged": MERGE},
    reads=_evaluation_inputs,
    run=_evaluate,
    marker="results.json",
    is_complete=_nothing_failed,
    spread="tasks",
    module="cpt_merge.evaluation",
)

# What the recipe fine-tunes -> the stages that it adds after the merge.
_TUNING: dict[str | None, tuple[Stage, ...]] = {
    None: (),
    "training": (FORMAT, FINETUNE, FINETUNE_MERGE),
    "merge": (FINETUNE_AFTER_MERGE,),
}


def pipeline(after: str | None, dpo: bool) -> tuple[Stage, ...]:
    """The stages of a run in order, by what it fine-tunes and whether it compares replies."""
    tuning, data = _TUNING[after], (CONVERSATIONS,) * (after is not None) + (PAIRS,) * dpo
    aligning: tuple[Stage, ...] = ()
    if dpo:
        made = {"model": (MERGE, *tuning)[-1]}
        aligning = (replace(DPO, inputs={**DPO.inputs, **made}),)
    measured = {
        stage.output.attribute: stage
        for stage in (*tuning, *aligning)
        if stage.output and stage is not FORMAT
    }
    evaluation = replace(EVALUATION, inputs={**EVALUATION.inputs, **measured})
    return (
        TOKENIZER, EMBEDDINGS, DATA, *data, TRAINING, MERGE, *tuning, *aligning, evaluation,
    )  # fmt: skip


STAGE_NAMES = tuple(stage.name for stage in pipeline("training", dpo=True))  # all there can be


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a recipe's run, in order."""
    return pipeline(recipe.finetune.after if recipe.finetune else None, recipe.dpo is not None)


def _sweep(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.evaluation.sweep.run import SweepInputs, run
    from cpt_merge.merge.plan import MergeInputs

    paths, recipe = context.run, context.run.recipe
    merge = MergeInputs(_swept(paths), paths.base, paths.chat, paths.tokenizer)
    trained_on = recipe.training.sequence_length
    inputs = SweepInputs(merge, recipe.corpus, recipe.new_languages, context.inputs, trained_on)
    settings = recipe.sweep, recipe.evaluation, recipe.merge
    return run(*settings, inputs, context.folder, tracker)


def _swept(run: Run) -> Path:
    return model_directory(run.recipe.sweep.cpt) if run.recipe.sweep.cpt else run.cpt


def _sweep_inputs(run: Run) -> dict[str, str]:
    swept = run.recipe.sweep.cpt
    other = {"cpt": model_fingerprint(swept)} if swept else {}
    return {**other, **MERGE.reads(run), **_prompt_inputs(run.recipe), **run.corpus_inputs()}


# Not part of the pipeline: it may follow the training at any time. It keeps each point by a key.
SWEEP = Stage(
    name="sweep",
    command="sweep",
    help="Try ratios of the chat vector on the trained model, in memory: measure each, draw the "
    "curves, recommend one.",
    config=lambda r: {
        name: getattr(r, name).model_dump() for name in ("sweep", "evaluation", "merge")
    },
    inputs=MERGE.inputs,
    reads=_sweep_inputs,
    run=_sweep,
    marker="results.json",
    spread="tasks",
    module="cpt_merge.evaluation.sweep",
    accumulates=True,
)


def find_stage(recipe: Recipe, name: str) -> Stage:
    """A stage of a recipe's run, or the sweep, by its name or its command.

    Raises `UserError` for a stage that the recipe does not ask for.
    """
    for stage in (*stages_of(recipe), SWEEP):
        if name in (stage.name, stage.command):
            return stage
    sets = "the section `finetune`"
    if name in (PAIRS.name, DPO.name):
        sets = "the section `dpo`"
    elif recipe.finetune:
        sets = "after: training"
    raise UserError(f"the recipe of {recipe.name} has no stage {name}, which needs {sets}.")
