"""The optional stages that train on conversations and on preferences; `stages.py` has the list.

What takes long to import is imported by the functions that need it, as in `cpt_stages.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt_merge.launcher.cpt_stages import EMBEDDINGS, MERGE, TOKENIZER, TRAINING, merge_files
from cpt_merge.launcher.stage import Output, Stage, StageContext

if TYPE_CHECKING:
    from cpt_merge.launcher.recipe import Recipe
    from cpt_merge.launcher.run import Run
    from cpt_merge.tracking import Tracker


def _render(section: str, context: StageContext, tracker: Tracker) -> dict[str, Any]:
    """Write the store of a section, next to the merged model's tokenizer, which it is made with."""
    from cpt_merge.data.conversations_run import run
    from cpt_merge.data.store import Store
    from cpt_merge.merge.finish import write_all_but_weights
    from cpt_merge.merge.plan import MergeInputs, plan

    paths, recipe = context.run, context.run.recipe
    config, tokenizer = recipe.further[section], paths.chat_tokenizer(context.stage.name)
    tokenizer.mkdir(parents=True, exist_ok=True)
    extend = recipe.training.extend
    models = MergeInputs(paths.resized, paths.base, paths.chat, paths.tokenizer, extend=extend)
    write_all_but_weights(plan(recipe.merge, models), tokenizer)
    store = paths.folder(context.stage.name) / "store"
    results = run(config, config.length(recipe.training), tokenizer, store, tracker)
    config.check_batch(recipe.training, Store.open(store).info.sources)  # before the training
    return results


def _render_config(section: str, recipe: Recipe) -> Mapping[str, Any]:
    config = recipe.further[section]
    sequences = {"sequence_length": config.length(recipe.training)}
    last = recipe.training.contexts[-1]
    extended: dict[str, Any] = {}
    if last.rope:  # the tokenizer's longest text
        extended = {"rope": last.rope.model_dump(), "reach": last.length}
    conversations = config.identity() | sequences | extended
    return {"conversations": conversations, "token_map": recipe.merge.token_map}


def _render_inputs(section: str, run: Run) -> dict[str, str]:
    return {**run.pair_inputs(), **run.text_inputs(run.recipe.further[section].sources)}


# Both come before the training, so that bad records are found before days of work.
CONVERSATIONS = Stage(
    name="conversations",
    command="conversations",
    help="Render conversations in the chat model's template, and tokenise them into a store.",
    config=partial(_render_config, "finetune"),
    inputs={"tokenizer": TOKENIZER, "model": EMBEDDINGS},
    reads=partial(_render_inputs, "finetune"),
    run=partial(_render, "finetune"),
    marker="store/store.json",
    output=Output("store", "conversations"),
    resumable=True,
)

PAIRS = replace(
    CONVERSATIONS,
    name="pairs",
    command="pairs",
    help="Render pairs of a preferred and a rejected reply, and tokenise them into a store.",
    config=partial(_render_config, "dpo"),
    reads=partial(_render_inputs, "dpo"),
    run=partial(_render, "dpo"),
    output=Output("store", "pairs"),
)


def _format(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.merge.config import format_alone
    from cpt_merge.merge.plan import MergeInputs

    paths = context.run
    inputs = MergeInputs(paths.cpt, paths.base, paths.chat, paths.tokenizer)
    config = format_alone(paths.recipe.merge)
    return merge_files(context, tracker, config, inputs, paths.formatted)


# With rows of the chat model, since base and CPT have not trained these tokens.
FORMAT = Stage(
    name="format",
    command="format",
    help="Give CPT the chat model's format, without its vector: tokens, their rows, template.",
    config=lambda r: r.merge.model_dump(include={"token_map", "dtype", "shard_size"}),
    inputs={"cpt": TRAINING, "tokenizer": TOKENIZER},
    reads=lambda run: run.pair_inputs(),
    run=_format,
    marker="model/config.json",
    output=Output("model", "formatted"),
    spread="nodes",
    resumable=True,
)


def _notes(run: Run) -> tuple[str, ...]:
    """What the card of a merged model tells of the model that gets the vector."""
    from cpt_merge.launcher.lineage import notes_on_training

    tuned = "What is called cpt here is CPT after fine-tuning on conversations, as in `finetune`."
    return (*notes_on_training(run), tuned)


def _train_further(
    context: StageContext,
    tracker: Tracker,
    start: Path,
    data: Stage,
    beta: float | None = None,
    merge_into: Path | None = None,
) -> dict[str, Any]:
    """Train `start` on the store of a data stage, as the section of this stage says.

    With `merge_into`, the vector is added to the result, and to what the preview asks. With `beta`,
    replies are compared.
    """
    from cpt_merge.data.pairs import Preference
    from cpt_merge.data.store import Store
    from cpt_merge.launcher.further_card import write_card
    from cpt_merge.launcher.hook import post_training_hook
    from cpt_merge.launcher.preview import preview_of
    from cpt_merge.launcher.start import use_backend
    from cpt_merge.merge.plan import MergeInputs
    from cpt_merge.training.inputs import TrainingInputs
    from cpt_merge.training.run import run

    paths, recipe = context.run, context.run.recipe
    use_backend(recipe)
    section = recipe.further[context.stage.name]
    store, tokenizer = paths.folder(data.name) / "store", paths.chat_tokenizer(data.name)
    tokens, shares = section.reading(Store.open(store).info.sources)
    preference = Preference(beta, context.folder / "reference") if beta else None
    inputs = TrainingInputs(
        start, tokenizer, store, context.key, shares=shares, preference=preference
    )
    notes = _notes(paths)
    models = MergeInputs(start, paths.base, paths.chat, tokenizer, has_format=True, notes=notes)
    hook = None
    if merge_into:
        hook = post_training_hook(context, FINETUNE_MERGE, models, merge_into)
    preview = preview_of(recipe, models, adds_vector=merge_into is not None)
    config = section.training_config(recipe.training, tokens)
    name = Path(context.stage.marker).parent.name
    results = run(config, inputs, context.folder, tracker, hook, preview, name)
    if context.world.is_main:
        write_card(context.stage.name, start, store, results, context.folder / name)
    return results


def _finetune(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    paths = context.run
    return _train_further(
        context, tracker, paths.formatted, CONVERSATIONS, merge_into=paths.tuned_merged
    )


FINETUNE = Stage(
    name="finetune",
    command="finetune",
    help="Fine-tuning on conversations: of CPT, with the post-training hook, or of the merged "
    "model.",
    config=lambda r: r.further["finetune"].settings(r.training),
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


def _finetune_merged(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    return _train_further(context, tracker, context.run.merged, CONVERSATIONS)


FINETUNE_AFTER_MERGE = replace(
    FINETUNE, inputs={"model": MERGE, "data": CONVERSATIONS}, run=_finetune_merged
)


def _finetune_merge(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.merge.plan import MergeInputs

    paths, notes = context.run, _notes(context.run)
    tokenizer = paths.chat_tokenizer(CONVERSATIONS.name)
    inputs = MergeInputs(
        paths.tuned, paths.base, paths.chat, tokenizer, has_format=True, notes=notes
    )
    return merge_files(context, tracker, paths.recipe.merge, inputs, paths.tuned_merged)


FINETUNE_MERGE = replace(
    MERGE,
    name="finetune_merge",
    command="finetune-merge",
    help="Add the chat vector to the fine-tuned model, from files.",
    inputs={"cpt": FINETUNE, "tokenizer": CONVERSATIONS},
    run=_finetune_merge,
    output=Output("model", "tuned_merged"),
)


def _dpo(context: StageContext, tracker: Tracker) -> dict[str, Any]:
    recipe = context.run.recipe
    assert recipe.dpo
    return _train_further(context, tracker, context.run.before_dpo, PAIRS, recipe.dpo.beta)


DPO = Stage(
    name="dpo",
    command="dpo",
    help="Direct preference optimisation of the chat model that the stages before have made.",
    config=lambda r: r.further["dpo"].settings(r.training),
    inputs={"model": MERGE, "data": PAIRS},  # `stages.pipeline` has the model of other recipes
    reads=lambda run: {},
    run=_dpo,
    marker="aligned/config.json",
    output=Output("model", "aligned"),
    spread="tasks",
    module="cpt_merge.finetune.dpo",
    resumable=True,
    precious=True,
)
