"""The stages of the pipeline, in order. Everything that needs to know them reads this list.

The command line imports this module at its start, so what takes long to import is imported by the
functions that need it.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt_merge.core.artifact import fingerprint
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import model_directory, model_fingerprint
from cpt_merge.launcher.stage import Output, Stage, StageContext

if TYPE_CHECKING:
    from cpt_merge.data.sources import Corpus
    from cpt_merge.launcher.recipe import Recipe
    from cpt_merge.launcher.run import Run
    from cpt_merge.merge.config import MergeConfig
    from cpt_merge.merge.plan import MergeInputs
    from cpt_merge.tracking import Tracker


def _new_text(recipe: Recipe) -> Corpus:
    """The text in the new languages."""
    languages = recipe.new_languages
    sources = [source for source in recipe.corpus.sources if source.language in languages]
    return recipe.corpus.model_copy(update={"sources": sources})


def _vector_inputs(recipe: Recipe) -> dict[str, str]:
    """The fingerprints of further chat vectors."""
    return {
        f"vector {number} {name}": (
            fingerprint(Path(path).expanduser()) if name == "vector" else model_fingerprint(path)
        )
        for number, vector in enumerate(recipe.merge.vectors, start=2)
        for name, path in (("base", vector.base), ("chat", vector.chat), ("vector", vector.vector))
        if path is not None
    }


def _prompt_inputs(recipe: Recipe) -> dict[str, str]:
    """The fingerprints of the files that the evaluation asks from, and of the classifier."""
    files, classifier = recipe.evaluation.files(), recipe.evaluation.classifier
    found = {name: fingerprint(Path(path).expanduser()) for name, path in files.items()}
    return found | ({"classifier": model_fingerprint(classifier)} if classifier else {})


def _extend_tokenizer(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.checkpoint.reader import Checkpoint
    from cpt_merge.tokenizer_ext.extend import extend_tokenizer

    paths, recipe = context.run, context.run.recipe
    for model in (paths.base, paths.chat):
        Checkpoint.open(model)  # its weights are needed by later stages
    paths.tokenizer.mkdir(parents=True)
    return extend_tokenizer(
        recipe.tokenizer, paths.base, recipe.corpus, paths.tokenizer, paths.chat, tracker
    )


def _tokenizer_inputs(run: Run) -> dict[str, str]:
    lists = {
        f"list {path}": fingerprint(path) for path in run.recipe.tokenizer.pieces_from.values()
    }
    return {**run.pair_inputs(), **run.corpus_inputs(), **lists}


TOKENIZER = Stage(
    name="tokenizer",
    command="tokenizer",
    help="Extend the base's tokenizer with pieces of the new languages.",
    config=lambda r: {"tokenizer": r.tokenizer.model_dump(), "corpus": r.corpus.text()},
    inputs={},
    reads=_tokenizer_inputs,
    run=_extend_tokenizer,
    marker="tokenizer/vocabulary_map.json",
    output=Output("tokenizer", "tokenizer"),
)


def _initialise_rows(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.tokenizer_ext.embeddings.resize import resize_embeddings

    paths, recipe = context.run, context.run.recipe
    paths.resized.mkdir(parents=True)
    text = _new_text(recipe)
    return resize_embeddings(
        recipe.embeddings, paths.base, paths.tokenizer, paths.resized, text, tracker,
        recipe.models.text_only, paths.start if recipe.training.start else None,
    )  # fmt: skip


def _embeddings_config(recipe: Recipe) -> dict[str, Any]:
    text = {"corpus": _new_text(recipe).text()} if recipe.embeddings.needs_text else {}
    alone = {"text_only": True} if recipe.models.text_only else {}
    other = {"training.start": True} if recipe.training.start else {}  # `reads` has which one
    return {"embeddings": recipe.embeddings.model_dump(), **text, **alone, **other}


def _embeddings_inputs(run: Run) -> dict[str, str]:
    text = run.corpus_inputs() if run.recipe.embeddings.needs_text else {}
    named = run.recipe.training.start
    start = {"start": model_fingerprint(named)} if named else {}
    return {"base": model_fingerprint(run.recipe.models.base), **start, **text}


EMBEDDINGS = Stage(
    name="embeddings",
    command="embeddings",
    help="Resize embedding and head of the model to start from, and initialise the new rows.",
    config=_embeddings_config,
    inputs={"tokenizer": TOKENIZER},
    reads=_embeddings_inputs,
    run=_initialise_rows,
    marker="model/config.json",
    output=Output("model", "resized"),
)


def _tokenise(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.data.run import run

    paths, recipe = context.run, context.run.recipe
    return run(
        recipe.data, recipe.corpus, paths.tokenizer, paths.store, tracker, paths.base, paths.blocks
    )


DATA = Stage(
    name="data",
    command="data",
    help="Tokenise the text into the token store.",
    config=lambda r: {
        "data": r.data.identity(),
        "corpus": r.corpus.text(),
    },
    inputs={"tokenizer": TOKENIZER},
    reads=lambda run: run.corpus_inputs(),
    run=_tokenise,
    marker="store/store.json",
    output=Output("store", "store"),
    spread="nodes",
    resumable=True,
)


def _conversations(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.data.conversations_run import run
    from cpt_merge.merge.finish import write_all_but_weights
    from cpt_merge.merge.plan import MergeInputs, plan

    paths, recipe = context.run, context.run.recipe
    assert recipe.finetune
    inputs = MergeInputs(paths.resized, paths.base, paths.chat, paths.tokenizer)
    paths.chat_tokenizer.mkdir(parents=True, exist_ok=True)
    write_all_but_weights(plan(recipe.merge, inputs), paths.chat_tokenizer)
    length = recipe.finetune.length(recipe.training)
    return run(recipe.finetune, length, paths.chat_tokenizer, paths.conversations, tracker)


def _conversations_config(recipe: Recipe) -> dict[str, Any]:
    finetune = recipe.finetune
    assert finetune
    sequences = {"sequence_length": finetune.length(recipe.training)}
    return {"conversations": finetune.identity() | sequences, "token_map": recipe.merge.token_map}


def _conversations_inputs(run: Run) -> dict[str, str]:
    assert run.recipe.finetune
    return {**run.pair_inputs(), **run.text_inputs(run.recipe.finetune.sources)}


CONVERSATIONS = Stage(
    name="conversations",
    command="conversations",
    help="Render conversations in the chat model's template, and tokenise them into a store.",
    config=_conversations_config,
    inputs={"tokenizer": TOKENIZER, "model": EMBEDDINGS},
    reads=_conversations_inputs,
    run=_conversations,
    marker="store/store.json",
    output=Output("store", "conversations"),
    resumable=True,
)


def _train(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.launcher.hook import post_training_hook
    from cpt_merge.launcher.lineage import notes_on_training
    from cpt_merge.launcher.preview import preview_of
    from cpt_merge.launcher.start import use_backend
    from cpt_merge.merge.plan import MergeInputs
    from cpt_merge.training.inputs import TrainingInputs
    from cpt_merge.training.run import run

    paths, recipe = context.run, context.run.recipe
    use_backend(recipe)
    inputs = TrainingInputs(
        paths.resized, paths.tokenizer, paths.store, context.key, paths.base, recipe.corpus
    )
    notes = notes_on_training(paths)
    models = MergeInputs(paths.resized, paths.base, paths.chat, paths.tokenizer, notes=notes)
    hook = post_training_hook(context, MERGE, models, paths.merged)
    preview = preview_of(recipe, models)
    return run(recipe.training, inputs, context.folder, tracker, hook, preview)


TRAINING = Stage(
    name="training",
    command="train",
    help="Continual pretraining, with the post-training hook that adds the chat vector.",
    config=lambda r: {**r.training.identity(), "mixture": r.corpus.amounts()},
    inputs={"model": EMBEDDINGS, "data": DATA},
    reads=lambda run: {},
    run=_train,
    marker="cpt/config.json",
    output=Output("model", "cpt"),
    spread="tasks",
    module="cpt_merge.training",
    resumable=True,
    precious=True,
    grows=True,
)


def _merge(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.launcher.lineage import notes_on_training
    from cpt_merge.merge.plan import MergeInputs

    paths = context.run
    notes = notes_on_training(paths)
    inputs = MergeInputs(paths.cpt, paths.base, paths.chat, paths.tokenizer, notes=notes)
    return _merge_files(context, tracker, paths.recipe.merge, inputs, paths.merged)


def _merge_files(
    context: StageContext, tracker: Tracker, config: MergeConfig, inputs: MergeInputs, out: Path
) -> dict[str, Any]:
    from cpt_merge.merge.files import keep_freed_memory, merge_directories
    from cpt_merge.merge.merge_report import made_in_memory

    if context.world.is_main and made_in_memory(out):
        shutil.rmtree(out)  # by a hook that ended before the stage was recorded
    keep_freed_memory()
    return merge_directories(config, inputs, out, tracker)


MERGE = Stage(
    name="merge",
    command="merge",
    help="Add the chat vector to the trained model, from files.",
    config=lambda r: r.merge.model_dump(),
    inputs={"cpt": TRAINING, "tokenizer": TOKENIZER},
    reads=lambda run: {**run.pair_inputs(), **_vector_inputs(run.recipe)},
    run=_merge,
    marker="chat/config.json",
    output=Output("model", "merged"),
    spread="nodes",
    resumable=True,
)


def _format(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.merge.config import format_alone
    from cpt_merge.merge.plan import MergeInputs

    paths = context.run
    inputs = MergeInputs(paths.cpt, paths.base, paths.chat, paths.tokenizer)
    config = format_alone(paths.recipe.merge)
    return _merge_files(context, tracker, config, inputs, paths.formatted)


# With rows of the chat model, since base and CPT have not trained these tokens.
FORMAT = Stage(
    name="format",
    command="format",
    help="Give CPT the chat model's format, without its vector: tokens, their rows, template.",
    config=lambda r: {"token_map": r.merge.token_map},
    inputs={"cpt": TRAINING, "tokenizer": TOKENIZER},
    reads=lambda run: run.pair_inputs(),
    run=_format,
    marker="model/config.json",
    output=Output("model", "formatted"),
    spread="nodes",
    resumable=True,
)


def _finetune(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.data.store import Store
    from cpt_merge.launcher.hook import post_training_hook
    from cpt_merge.launcher.lineage import notes_on_training
    from cpt_merge.launcher.preview import preview_of
    from cpt_merge.launcher.start import use_backend
    from cpt_merge.merge.plan import MergeInputs
    from cpt_merge.training.inputs import TrainingInputs
    from cpt_merge.training.run import run

    paths, recipe = context.run, context.run.recipe
    finetune = recipe.finetune
    assert finetune
    use_backend(recipe)
    tokens, shares = finetune.reading(Store.open(paths.conversations).info.sources)
    config = finetune.training_config(recipe.training, tokens)
    merges = finetune.after == "training"
    start = paths.formatted if merges else paths.merged
    inputs = TrainingInputs(
        start, paths.chat_tokenizer, paths.conversations, context.key, shares=shares
    )
    models = MergeInputs(
        start, paths.base, paths.chat, paths.chat_tokenizer,
        has_format=True, notes=notes_on_training(paths),
    )  # fmt: skip
    hook = None
    if merges:
        hook = post_training_hook(context, FINETUNE_MERGE, models, paths.tuned_merged)
    preview = preview_of(recipe, models, adds_vector=merges)
    return run(config, inputs, context.folder, tracker, hook, preview, paths.tuned.name)


def _finetune_config(recipe: Recipe) -> dict[str, Any]:
    assert recipe.finetune
    return recipe.finetune.settings(recipe.training)


FINETUNE = Stage(
    name="finetune",
    command="finetune",
    help="Fine-tuning on conversations, with the post-training hook, if it is before the merge.",
    config=_finetune_config,
    inputs={"model": FORMAT, "data": CONVERSATIONS},
    reads=lambda run: {},
    run=_finetune,
    marker="tuned/config.json",
    output=Output("model", "tuned"),
    spread="tasks",
    module="cpt_merge.finetune",
    resumable=True,
    precious=True,
)

FINETUNE_AFTER_MERGE = replace(
    FINETUNE,
    help="Fine-tuning of the merged model on conversations.",
    inputs={"model": MERGE, "data": CONVERSATIONS},
)


def _finetune_merge(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.launcher.lineage import notes_on_training
    from cpt_merge.merge.plan import MergeInputs

    paths = context.run
    inputs = MergeInputs(
        paths.tuned, paths.base, paths.chat, paths.chat_tokenizer,
        has_format=True, notes=notes_on_training(paths),
    )  # fmt: skip
    return _merge_files(context, tracker, paths.recipe.merge, inputs, paths.tuned_merged)


FINETUNE_MERGE = replace(
    MERGE,
    name="finetune_merge",
    command="finetune-merge",
    help="Add the chat vector to the fine-tuned model, from files.",
    inputs={"cpt": FINETUNE, "tokenizer": CONVERSATIONS},
    run=_finetune_merge,
    output=Output("model", "tuned_merged"),
)


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

# By what is fine-tuned. Conversations come before the training, which takes days.
PIPELINES: dict[str | None, tuple[Stage, ...]] = {
    None: (TOKENIZER, EMBEDDINGS, DATA, TRAINING, MERGE, EVALUATION),
    "training": (
        TOKENIZER, EMBEDDINGS, DATA, CONVERSATIONS, TRAINING, MERGE, FORMAT, FINETUNE,
        FINETUNE_MERGE,
        replace(
            EVALUATION,
            inputs={**EVALUATION.inputs, "tuned": FINETUNE, "tuned_merged": FINETUNE_MERGE},
        ),
    ),
    "merge": (
        TOKENIZER, EMBEDDINGS, DATA, CONVERSATIONS, TRAINING, MERGE, FINETUNE_AFTER_MERGE,
        replace(EVALUATION, inputs={**EVALUATION.inputs, "tuned": FINETUNE_AFTER_MERGE}),
    ),
}  # fmt: skip
STAGE_NAMES = tuple(stage.name for stage in PIPELINES["training"])  # every one that a run may have


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a recipe's run, in order."""
    return PIPELINES[recipe.finetune.after if recipe.finetune else None]


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

    Raises `UserError` for a stage of fine-tuning if the recipe has none.
    """
    for stage in (*stages_of(recipe), SWEEP):
        if name in (stage.name, stage.command):
            return stage
    sets = "after: training" if recipe.finetune else "the section `finetune`"
    raise UserError(f"the recipe of {recipe.name} has no stage {name}, which needs {sets}.")
