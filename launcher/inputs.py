"""What would stop a late stage, found before the first one: for `run`, `plan` and the preflight."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from cpt_merge.checkpoint.loaded_tokenizer import check_loads
from cpt_merge.checkpoint.reader import check_complete, read_json
from cpt_merge.checkpoint.token_ids import FAST_FILE
from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import is_here
from cpt_merge.data.check import check_budget, check_text
from cpt_merge.data.mixture import mixture
from cpt_merge.data.order import HORIZON
from cpt_merge.launcher.fetch import check_cache
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.start import accelerate_config
from cpt_merge.merge import merge_report
from cpt_merge.merge.ancestry import pair_warnings
from cpt_merge.merge.fit import open_fitting
from cpt_merge.tokenizer_ext.base_tokenizer import check_pair, read_tokenizer
from cpt_merge.tokenizer_ext.embeddings.resize import check_resizable
from cpt_merge.tokenizer_ext.families.tokenizer_json import build


def check_inputs(recipe: Recipe, download: bool = True) -> None:
    """Raise `UserError` for a pair that does not fit, missing lists or prompts, text that cannot be
    read, or numbers that are impossible.

    Models on the hub are downloaded, or else checked only if the hub's cache has them.
    """
    check_numbers(recipe)
    check_cache(recipe)
    check_text(recipe.corpus)
    files = {f"evaluation.{name}": path for name, path in recipe.evaluation.files().items()}
    lists = recipe.tokenizer.pieces_from.items()
    for name, path in {
        **files,
        **{f"tokenizer.pieces_from.{tag}": path for tag, path in lists},
    }.items():
        if not Path(path).expanduser().exists():
            raise UserError(f"{name} = {path} does not exist; correct it or leave it out.")
    if "knowledge" in recipe.evaluation.suites:
        recipe.evaluation.knowledge.check_installed()
    accelerate_config(recipe)
    models = [recipe.models.base, recipe.models.chat, *recipe.evaluation.models.values()]
    if download or all(map(is_here, models)):
        _check_models(Run(recipe))


def _check_models(run: Run) -> None:
    from cpt_merge.training.model.build import check_trainable

    for model in (run.base, run.chat):
        check_complete(model)  # the evaluation loads both with transformers
    check_budget(run.recipe.corpus, run.recipe.training.tokens, _tokenizer_of_base(run))
    models = open_fitting({"base": run.base, "chat": run.chat})
    check_trainable(run.base, run.recipe.training)
    if models["base"].config.get("model_type") == models["chat"].config.get("model_type"):
        check_trainable(run.chat, run.recipe.training)  # the evaluation builds the same class
    for model in (run.base, run.chat):
        check_loads(model)
    if run.recipe.tokenizer.languages():
        check_resizable(models["base"])
        check_pair(run.base, run.chat)
    else:
        for tokenizer in map(TokenizerFiles.read, (run.base, run.chat)):
            if tokenizer is not None:
                tokenizer.require_listed()
    if not run.recipe.merge.interpolates:
        merge_report.warn(pair_warnings(run.base, run.chat))
    run.further_models()
    if run.recipe.training.preview.every is not None:
        from cpt_merge.launcher.preview import check_previewed

        tokenizer = TokenizerFiles.read(run.chat)
        check_previewed(run.chat, tokenizer.chat_template if tokenizer else None)


def _tokenizer_of_base(run: Run) -> Tokenizer:
    """The base's tokenizer, which may be of any kind if it is not extended."""
    fast = run.base / FAST_FILE
    if run.recipe.tokenizer.languages() or not fast.is_file():
        content, _ = read_tokenizer(run.base)
        return build(content)
    TokenizerFiles.read(run.base)  # raises for a damaged one
    return build(read_json(fast))


def check_numbers(recipe: Recipe) -> None:
    """Raise `UserError` for numbers of a recipe that contradict each other; nothing is read."""
    training, sources = recipe.training, recipe.corpus.sources
    counted = recipe.tokenizer.max_characters
    for language, size in recipe.tokenizer.new_pieces.items():
        if size > counted:
            raise UserError(
                f"tokenizer.new_pieces.{language} = {size:,} asks for more pieces than characters "
                f"are counted (tokenizer.max_characters = {counted:,}); lower it."
            )
    sequences = training.steps * training.global_batch_size
    if sequences > HORIZON:
        raise UserError(
            f"training.tokens = {training.tokens:,} takes {sequences:,} sequences, and a run has "
            f"at most {HORIZON:,}; lower it."
        )
    if training.phases:
        from cpt_merge.training.phases import phases_of

        phases_of(training)
    if recipe.evaluation.baseline is not None:
        from cpt_merge.evaluation.compare import choose_baseline

        models = ["base", "chat", "cpt", "merged", *recipe.evaluation.models]
        choose_baseline(models, recipe.evaluation.baseline)
    if all(source.epochs is None for source in sources):  # else known when the text is tokenised
        mixture(recipe.corpus, [None] * len(sources), training.tokens)
