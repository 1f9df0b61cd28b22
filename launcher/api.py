"""The calls of `import cpt_merge`, for notebooks and scripts; it imports them lazily.

Models are directories or hub ids. Errors that the user can fix are `UserError`s of one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt_merge.core.config import parse_section
from cpt_merge.core.hub import model_directory
from cpt_merge.data.sources import Corpus
from cpt_merge.launcher import recipe as recipes
from cpt_merge.merge.config import MergeConfig
from cpt_merge.tokenizer_ext import EmbeddingsConfig, TokenizerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cpt_merge.merge.plan import MergeInputs

Model = str | Path


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> recipes.Recipe:
    """Read a recipe and apply overrides `section.key=value`, as the command line does."""
    return recipes.load_recipe(Path(path), list(overrides))


def run_stage(recipe: str | Path, stage: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run one stage of a recipe, such as `"tokenizer"` or `"train"`, and return its results.

    It is skipped if it is finished, and continues if it was interrupted. The stages before it must
    be finished.
    """
    from cpt_merge.core.artifact import read_record
    from cpt_merge.launcher import execute
    from cpt_merge.launcher.run import Run
    from cpt_merge.launcher.stages import find_stage

    run = Run.load(Path(recipe), overrides)
    the_stage = find_stage(run.recipe, stage)
    execute.run_stage(run, the_stage)
    record = read_record(run.folder(the_stage.name))
    return record.results if record else {}


def extend_tokenizer(
    base: Model, text: Mapping[str, str | Path] | Corpus, out: str | Path, *,
    chat: Model | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Extend the tokenizer of `base` with pieces of new languages and write it to `out`.

        extend_tokenizer("base", {"ko": "ko.jsonl"}, "extended", new_pieces={"ko": 8000})

    `text` gives a text file by language. Tokens that only `chat` has keep their ids. `settings` are
    the keys of a recipe's `tokenizer` section. Returns numbers for a summary.
    """
    from cpt_merge.tokenizer_ext import extend

    config = parse_section(TokenizerConfig, settings, "the tokenizer's settings")
    chat_directory = model_directory(str(chat)) if chat else None
    directory = model_directory(str(base))
    return extend.extend_tokenizer(config, directory, _corpus(text), Path(out), chat_directory)


def resize_embeddings(
    base: Model, tokenizer: str | Path, out: str | Path, *,
    text: Mapping[str, str | Path] | Corpus | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write `base` with rows for the vocabulary of an extended tokenizer to `out`.

    Old rows stay as they are; new ones are initialised as `settings`, the keys of a recipe's
    `embeddings` section, say (`input="constituents"`). `text` in the new languages is needed for
    the method `focus`. Returns row counts and norms.
    """
    from cpt_merge.tokenizer_ext.embeddings import resize

    config = parse_section(EmbeddingsConfig, settings, "the embeddings' settings")
    corpus, directory = _corpus(text) if text else None, model_directory(str(base))
    return resize.resize_embeddings(config, directory, Path(tokenizer), Path(out), corpus)


def merge_models(
    cpt: Model, base: Model | None, chat: Model, out: str | Path, *,
    tokenizer: str | Path | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write `cpt + ratio * (chat - base)` to `out`, from files and with little memory.

        merge_models("cpt", "base", "chat", "merged", ratio=0.8)

    `tokenizer` is CPT's, if it is not in its directory. `settings` are the keys of a recipe's
    `merge` section; `base` may be None for the methods interpolate and slerp. Returns the numbers
    of merge_report.json.
    """
    from cpt_merge.launcher.whole_check import checking_whole
    from cpt_merge.merge.files import merge_directories

    config = parse_section(MergeConfig, settings, "the merge's settings")
    inputs = _merge_inputs(cpt, base, chat, tokenizer)
    with checking_whole(config, inputs) as check:
        return merge_directories(config, inputs, Path(out), check=check)


def merge_in_memory(
    cpt: Model,
    base: Model | None,
    chat: Model,
    *,
    tokenizer: str | Path | None = None,
    **settings: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`cpt + ratio * (chat - base)` as a transformers model and its tokenizer; writes no weights.

    Arguments as for `merge_models`, and the same bytes as a merge to files. The model is on the
    GPU if there is one.
    """
    from cpt_merge.evaluation.sweep.model import MergedModel
    from cpt_merge.merge.plan import plan

    config = parse_section(MergeConfig, settings, "the merge's settings")
    merged = MergedModel(plan(config, _merge_inputs(cpt, base, chat, tokenizer)), local_rank=0)
    merged.merge(config)
    return merged.model.loaded, merged.model.tokenizer


def _merge_inputs(
    cpt: Model, base: Model | None, chat: Model, tokenizer: str | Path | None
) -> MergeInputs:
    from cpt_merge.merge.plan import MergeInputs

    trained, asked = model_directory(str(cpt)), model_directory(str(chat))
    ancestor = model_directory(str(base)) if base else None
    return MergeInputs(trained, ancestor, asked, Path(tokenizer) if tokenizer else trained)


def _corpus(text: Mapping[str, str | Path] | Corpus) -> Corpus:
    if isinstance(text, Corpus):
        return text
    sources = [{"path": str(path), "language": language} for language, path in text.items()]
    return parse_section(Corpus, {"sources": sources}, "the text")
