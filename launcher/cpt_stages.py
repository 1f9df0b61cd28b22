"""The stages from text to the merged model, in order; `stages.py` has the whole list.

The command line imports this module at its start, so what takes long to import is imported by the
functions that need it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt_merge.core.artifact import fingerprint
from cpt_merge.core.hub import model_fingerprint
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


def vector_inputs(recipe: Recipe) -> dict[str, str]:
    """The fingerprints of further chat vectors."""
    return {
        f"vector {number} {name}": (
            fingerprint(Path(path).expanduser()) if name == "vector" else model_fingerprint(path)
        )
        for number, vector in enumerate(recipe.merge.vectors, start=2)
        for name, path in (("base", vector.base), ("chat", vector.chat), ("vector", vector.vector))
        if path is not None
    }


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
    models = MergeInputs(
        paths.resized, paths.base, paths.chat, paths.tokenizer, notes=notes,
        extend=recipe.training.extend,
    )  # fmt: skip
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
    return merge_files(context, tracker, paths.recipe.merge, inputs, paths.merged)


def merge_files(
    context: StageContext, tracker: Tracker, config: MergeConfig, inputs: MergeInputs, out: Path
) -> dict[str, Any]:
    """Merge files into `out`, in place of what a hook left there unfinished."""
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
    reads=lambda run: {**run.pair_inputs(), **vector_inputs(run.recipe)},
    run=_merge,
    marker="chat/config.json",
    output=Output("model", "merged"),
    spread="nodes",
    resumable=True,
)
