"""The tokenizers of a merge meet: the output's tokens, the chat format, and every vector's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint.reader import Checkpoint
from checkpoint.token_changes import TokenChanges
from checkpoint.tokenizer import TokenizerFiles
from checkpoint.vocabulary import MAP_FILE, VocabularyMap
from core.errors import UserError
from core.progress import say
from merge.align import (
    RowAlignment,
    add_constituents,
    align_by_position,
    align_rows,
    check_map,
    check_nothing_is_lost,
    check_rows,
)
from merge.chat_format import ChatFormat, read_format
from merge.config import MergeConfig
from merge.rules import vocabulary_rows
from merge.tokens import output_tokens
from merge.vectors import Vector


@dataclass(frozen=True)
class Meeting:
    """How the tokenizer changes (None where rows meet by position), the chat format, and each vector's rows."""

    changes: TokenChanges | None
    format: ChatFormat
    rows: list[RowAlignment]


@dataclass(frozen=True)
class Tokenizers:
    """A vector's two tokenizers."""

    base: TokenizerFiles
    chat: TokenizerFiles


def meet(config: MergeConfig, cpt: Checkpoint, tokenizer: Path, sources: Sequence[Vector]) -> Meeting:
    """Align every vector with CPT by their tokenizers. Raises `UserError` naming what cannot be aligned."""
    extended = TokenizerFiles.read(tokenizer)
    pairs = [pair for pair in map(_tokenizers, sources) if pair is not None]
    if extended is None or len(pairs) < len(sources):
        format = read_format(sources[0].base_directory, sources[0].chat_directory, None, None, None)
        return Meeting(None, format, _by_position(cpt, sources))
    map_of_rows = VocabularyMap.load(tokenizer) if (tokenizer / MAP_FILE).is_file() else None
    check_rows(extended, vocabulary_rows(cpt))
    tokens = output_tokens(extended, pairs[0].base, pairs[0].chat, vocabulary_rows(cpt), config.token_map)
    check_map(map_of_rows, tokens, pairs[0].chat)
    if config.new_rows == "constituents" and map_of_rows is None:
        raise UserError(
            f"{tokenizer} holds no vocabulary map, which merge.new_rows: constituents needs; set new_rows: keep."
        )
    found = []
    for number, (source, pair) in enumerate(zip(sources, pairs, strict=True)):
        _check_tokenizers(source, pair)
        check_nothing_is_lost(extended.directory, tokens, pair.base, pair.chat, number == 0)
        rows = align_rows(tokens, pair.base, pair.chat, map_of_rows, number == 0)
        if config.new_rows == "constituents" and map_of_rows is not None:
            add_constituents(rows, map_of_rows, tokens, pair.base, pair.chat)
        found.append(rows)
    format = read_format(sources[0].base_directory, sources[0].chat_directory, pairs[0].base, pairs[0].chat, tokens)
    return Meeting(tokens.changes, format, found)


def _tokenizers(source: Vector) -> Tokenizers | None:
    base, chat = TokenizerFiles.read(source.base_directory), TokenizerFiles.read(source.chat_directory)
    return Tokenizers(base, chat) if base and chat else None


def _check_tokenizers(source: Vector, tokenizers: Tokenizers) -> None:
    rows = {label: vocabulary_rows(model) for label, model in source.models.items()}
    if "base" in rows:
        check_rows(tokenizers.base, rows["base"])
    check_rows(tokenizers.chat, rows["chat"] if "chat" in rows else rows["vector"])


def _by_position(cpt: Checkpoint, sources: Sequence[Vector]) -> list[RowAlignment]:
    """Raises `UserError` where the numbers of rows differ."""
    rows = {"cpt": vocabulary_rows(cpt)}
    for source in sources:
        rows |= {label: vocabulary_rows(model) for label, model in source.models.items()}
    if len(set(rows.values())) > 1:
        *others, last = (f"{count} ({label})" for label, count in rows.items())
        raise UserError(
            f"the embeddings have {', '.join(others)} and {last} rows, which only each model's tokenizer can match; "
            "put it beside the weights where it is missing."
        )
    say(f"merge: a directory has no tokenizer; the {rows['cpt']} rows of the models are taken as equal")
    return [align_by_position(rows["cpt"]) for _ in sources]
