"""What would stop a late stage, found before the first one: for `run`, `plan` and the preflight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from cpt_merge.checkpoint.loaded import refuse_image_layers
from cpt_merge.checkpoint.reader import Checkpoint, check_complete, read_json
from cpt_merge.checkpoint.token_ids import FAST_FILE
from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles
from cpt_merge.core.artifact import check_writable
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import is_here, model_directory
from cpt_merge.data.check import check_budget, check_text
from cpt_merge.data.mixture import SourceShare
from cpt_merge.data.order import HORIZON
from cpt_merge.launcher.accelerate_file import accelerate_config
from cpt_merge.launcher.fetch import check_cache
from cpt_merge.launcher.heavy_checks import heavy_checks
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.sizes import check_disk, read_shape
from cpt_merge.launcher.stage import is_up_to_date
from cpt_merge.launcher.stages import MERGE, TRAINING
from cpt_merge.launcher.start_model import check_start
from cpt_merge.merge import merge_report
from cpt_merge.merge.ancestry import pair_warnings
from cpt_merge.merge.fit import open_fitting
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.merge.plan import plan as plan_merge
from cpt_merge.tokenizer_ext.base_tokenizer import check_pair, read_tokenizer
from cpt_merge.tokenizer_ext.embeddings.resize import check_resizable
from cpt_merge.tokenizer_ext.families.tokenizer_json import build
from cpt_merge.training.stretches import phase_bounds, stretches_of, whole_run


def check_inputs(recipe: Recipe, download: bool = True) -> None:
    """Raise `UserError` for a pair that does not fit or cannot be trained, missing lists or
    prompts, text that cannot be read, numbers that are impossible, or a folder, a disk, a package
    or a key that the run lacks.

    Nothing is written. Models on the hub are downloaded, or else checked only if the hub's cache
    has them. Without `download`, training may run on another machine with other GPUs.
    """
    check_numbers(recipe)
    accelerate_config(recipe)
    check_cache(recipe)
    _check_files(recipe)
    check_writable(recipe.directory, "the run's folder")
    _check_tracking(recipe)
    recipe.evaluation.check_lm_eval()
    recipe.evaluation.check_vllm()
    recipe.evaluation.check_keys()
    if download or all(map(is_here, recipe.named_models.values())):
        run = Run(recipe)
        _require_models(run)
        with heavy_checks(run, here=download):
            check_text(recipe.corpus, download)
            _check_models(run)
    else:
        check_text(recipe.corpus, download)


def _check_files(recipe: Recipe) -> None:
    lists = recipe.tokenizer.pieces_from.items()
    vectors = enumerate(recipe.merge.vectors)
    named = {
        **{f"evaluation.{name}": path for name, path in recipe.evaluation.files().items()},
        **{f"tokenizer.pieces_from.{tag}": path for tag, path in lists},
        **{f"merge.vectors.{n}.vector": one.vector for n, one in vectors if one.vector},
    }
    for name, path in named.items():
        if not Path(path).expanduser().exists():
            raise UserError(f"{name} = {path} does not exist; correct it or leave it out.")


def _check_tracking(recipe: Recipe) -> None:
    if recipe.tracking.mode == "online":
        from cpt_merge.tracking.sinks.wandb import check_key  # takes a second to import

        check_key(recipe.tracking)


def _require_models(run: Run) -> None:
    """Find all models, downloading those of the hub. Raises `UserError` for one that is missing."""
    for model in (run.base, run.chat):
        check_complete(model)  # the evaluation loads both with transformers
    for name in run.recipe.named_models.values():
        model_directory(name)


def _check_models(run: Run) -> None:
    recipe = run.recipe
    models = open_fitting({"base": run.base, "chat": run.chat})
    if not is_up_to_date(run, TRAINING):
        refuse_image_layers(Checkpoint.open(run.start).config, run.start)
    check_start(run)
    recipe.training.check_positions(Checkpoint.open(run.start).config)
    base, chat = _require_tokenizer(run.base, "base"), _require_tokenizer(run.chat, "chat")
    check_budget(recipe.corpus, partial(_shares, recipe), _tokenizer_of_base(run))
    if recipe.tokenizer.languages():
        check_resizable(models["base"])
        check_pair(run.base, run.chat)
    else:
        for tokenizer in (base, chat):
            tokenizer.require_listed()
        trains_new = any(phase.train == "new_rows" for phase in recipe.training.phases)
        if trains_new and chat.ids.keys() <= base.ids.keys():
            raise UserError(
                "training.phases names new_rows but there will be none; set tokenizer.new_pieces, "
                "or remove that phase."
            )
    if not recipe.merge.interpolates:
        merge_report.warn(pair_warnings(run.base, run.chat))
    if not is_up_to_date(run, MERGE):
        # the base in place of the model that will be trained from it
        stand_in = MergeInputs(run.base, run.base, run.chat, text_only=recipe.models.text_only)
        plan_merge(recipe.merge, stand_in)
    for section in recipe.further:
        read_shape(recipe, section)  # raises for its length and its adapters
    if not is_up_to_date(run, TRAINING):
        check_disk(run, read_shape(recipe))
    if recipe.training.preview.every is not None:
        from cpt_merge.launcher.preview import check_previewed

        check_previewed(run.chat, chat.chat_template)


def _require_tokenizer(model: Path, name: str) -> TokenizerFiles:
    """The tokenizer of a model of the pair. Raises `UserError` if it has none."""
    found = TokenizerFiles.read(model)
    if found is None:
        raise UserError(
            f"models.{name} = {model} has no tokenizer (tokenizer.json or tokenizer.model); copy "
            "the model's tokenizer into it."
        )
    return found


def _tokenizer_of_base(run: Run) -> Tokenizer:
    """The base's tokenizer, which may be of any kind if it is not extended."""
    fast = run.base / FAST_FILE
    if run.recipe.tokenizer.languages() or not fast.is_file():
        content, _ = read_tokenizer(run.base)
        return build(content)
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
    phase_bounds(training)  # raises for a phase without a step
    models = [*Run(recipe).made_models(), *recipe.evaluation.models]
    models = ["base", "chat", *models]
    recipe.evaluation.check_models(models)
    if recipe.evaluation.baseline is not None:
        from cpt_merge.evaluation.compare import choose_baseline

        choose_baseline(models, recipe.evaluation.baseline)
    if all(source.epochs is None for source in sources):  # else known when the text is tokenised
        _shares(recipe, [None] * len(sources))


def _shares(recipe: Recipe, sizes: Sequence[int | None]) -> list[SourceShare]:
    """What a run reads of sources of these sizes. Raises `UserError` for impossible amounts."""
    return whole_run(stretches_of(recipe.training, recipe.corpus, sizes))
