"""The tokenizers of a merge meet: the output's tokens, the chat format, and every vector's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import vocabulary_rows
from cpt_merge.checkpoint.token_changes import TokenChanges
from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles
from cpt_merge.checkpoint.vocabulary_map import MAP_FILE, VocabularyMap
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.merge.align import (
    RowAlignment,
    add_constituents,
    align_by_position,
    align_rows,
    check_map,
    check_rows,
    lost_tokens,
)
from cpt_merge.merge.chat_format import ChatFormat, read_format
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.fit import RefusedError, collected
from cpt_merge.merge.tokens import output_tokens
from cpt_merge.merge.vectors import Vector


@dataclass(frozen=True)
class Meeting:
    """How the tokenizer changes, the chat format, and each vector's rows."""

    changes: TokenChanges
    format: ChatFormat
    rows: list[RowAlignment]


@dataclass(frozen=True)
class Tokenizers:
    """A vector's two tokenizers."""

    base: TokenizerFiles
    chat: TokenizerFiles


def meet(
    config: MergeConfig,
    models: Mapping[str, Checkpoint],
    tokenizer: Path,
    sources: Sequence[Vector],
) -> Meeting:
    """Align every vector with CPT by their tokenizers. `models` are all that are read, CPT among them as `cpt`.

    Raises `RefusedError` with everything that cannot be aligned.
    """
    all_rows = {label: vocabulary_rows(model) for label, model in models.items()}
    directories = [tokenizer]
    for source in sources:
        directories += [source.base_directory, source.chat_directory]
    files = [TokenizerFiles.read(directory) for directory in directories]
    whole = _all_or_none(files, directories, all_rows)
    if whole is None:
        return _by_position(config, all_rows["cpt"], sources)
    extended, *others = whole
    pairs = [Tokenizers(base, chat) for base, chat in zip(others[::2], others[1::2], strict=True)]
    map_of_rows = VocabularyMap.load(tokenizer) if (tokenizer / MAP_FILE).is_file() else None
    problems = [
        f"{tokenizer.directory} has {tokenizer.odd}; load it with transformers, look at its ids, and save it again"
        for tokenizer in whole
        if tokenizer.odd
    ]
    for source, pair in zip(sources, pairs, strict=True):
        _check_tokenizers(source, pair, problems)
    with collected(problems):
        check_rows(extended, all_rows["cpt"])
    tokens = output_tokens(
        extended, pairs[0].base, pairs[0].chat, all_rows["cpt"], config.token_map
    )
    with collected(problems):
        check_map(map_of_rows, tokens, pairs[0].chat)
    if config.new_rows == "constituents" and map_of_rows is None:
        problems.append(
            f"{tokenizer} holds no {MAP_FILE}, which new_rows: constituents needs; set new_rows: keep"
        )
    for number, pair in enumerate(pairs):
        problems += lost_tokens(extended.directory, tokens, pair.base, pair.chat, number == 0)
    if problems:
        raise RefusedError(problems)
    rows = [
        align_rows(tokens, pair.base, pair.chat, map_of_rows, pair is pairs[0]) for pair in pairs
    ]
    if config.new_rows == "constituents" and map_of_rows is not None:
        for alignment, pair in zip(rows, pairs, strict=True):
            add_constituents(alignment, map_of_rows, tokens, pair.base, pair.chat)
    return Meeting(tokens.changes, read_format(pairs[0].base, pairs[0].chat, tokens), rows)


def _all_or_none(
    files: list[TokenizerFiles | None], directories: list[Path], rows: dict[str, int]
) -> list[TokenizerFiles] | None:
    """All tokenizers, or None where there are none and all models have equally many rows.

    Raises `UserError` where rows cannot be told.
    """
    present = [tokenizer for tokenizer in files if tokenizer is not None]
    if len(present) == len(files):
        return present
    missing = [
        directory for directory, found in zip(directories, files, strict=True) if found is None
    ]
    named = ", ".join(str(directory) for directory in missing)
    if present or any((directory / "vocab.json").is_file() for directory in missing):
        raise UserError(
            f"no tokenizer.json or tokenizer.model in {named}, by which rows could meet; put it there "
            "(a vocab.json with merges.txt becomes one by AutoTokenizer and save_pretrained)."
        )
    if len(set(rows.values())) > 1:
        *others, last = (f"{count} ({label})" for label, count in rows.items())
        raise UserError(
            f"the embeddings have {', '.join(others)} and {last} rows, which only each model's tokenizer can match; "
            f"put it beside the weights ({named})."
        )
    say(f"merge: no tokenizer in {named}; the {rows['cpt']} rows of the models are taken as equal")
    return None


def _by_position(config: MergeConfig, count: int, sources: Sequence[Vector]) -> Meeting:
    """No directory has a tokenizer."""
    if config.token_map or config.new_rows == "constituents":
        raise UserError(
            "token_map and new_rows: constituents need tokenizers, and there are none; leave them out."
        )
    rows = align_by_position(count)
    format = read_format(
        TokenizerFiles(sources[0].base_directory, {}, frozenset()),
        TokenizerFiles(sources[0].chat_directory, {}, frozenset()),
        None,
    )
    return Meeting(TokenChanges(), format, [rows for _ in sources])


def _check_tokenizers(source: Vector, tokenizers: Tokenizers, problems: list[str]) -> None:
    rows = {label: vocabulary_rows(model) for label, model in source.models.items()}
    with collected(problems):
        check_rows(tokenizers.base, rows.get("base", len(tokenizers.base.ids)))
    with collected(problems):
        check_rows(tokenizers.chat, rows["chat"] if "chat" in rows else rows["vector"])
