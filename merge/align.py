"""Which row of base and chat belongs to which row of the output: rows meet by token string, never by position (law 2).

For each vector, every row of the output is treated in one of these ways:

    shared       the token is in CPT, base and chat: the tensor's rule applies
    new          only CPT has it: kept as trained, or given the mean vector of its constituents (`new_rows`)
    chat         part of the chat format: taken from the chat model, whatever rule and ratio
    unmatched    base has it and chat does not, an added token that nobody uses: kept
    padding      no token: kept; rows beyond CPT's hold the mean of CPT's rows

Part of the chat format are the tokens that the chat tokenizer adds to the base's, and the added tokens that its
template or its stop ids name, unless they are the base's own bos, eos, unk or pad. The base may have them too
(<|eot_id|> of Llama 3), but has not trained them: their difference is no vector, and CPT's row no place to start from.
(The authors' code pastes the base's rows there and scales them.) The format is that of the first vector's chat model:
a further vector leaves these rows as they are.

Anything else that cannot be aligned is an error that names the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles
from cpt_merge.checkpoint.vocabulary_map import VocabularyMap
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.merge.tokens import OutputTokens

Rows = NDArray[np.int64]


class Role(IntEnum):
    """How a row of the output is treated."""

    PADDING = 0
    SHARED = 1
    NEW = 2
    CHAT = 3
    UNMATCHED = 4


@dataclass(frozen=True)
class RowPairs:
    """Rows that belong together: `base[i]` and `chat[i]` are one token's."""

    base: Rows
    chat: Rows


@dataclass(frozen=True)
class RowAlignment:
    """For every output row its role and its rows in base and chat (-1: none).

    `constituents` holds, for those new rows that get a vector, the rows whose mean vector it is.
    """

    role: NDArray[np.uint8]
    base: Rows
    chat: Rows
    constituents: dict[int, RowPairs] = field(default_factory=dict)
    chat_tokens: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    @cached_property
    def has_vector(self) -> NDArray[np.bool_]:
        """Which rows the vector has a part in."""
        found: NDArray[np.bool_] = self.role == Role.SHARED
        found[list(self.constituents)] = True
        return found

    @property
    def rows(self) -> int:
        """Rows of the output."""
        return len(self.role)

    def counts(self) -> dict[str, int]:
        """Role -> number of rows."""
        return {role.name.lower(): int((self.role == role).sum()) for role in Role}


def align_by_position(rows: int) -> RowAlignment:
    """All rows shared, as they lie: for models without tokenizers and with equally many rows."""
    everything = np.arange(rows)
    return RowAlignment(np.full(rows, Role.SHARED, np.uint8), everything, everything)


def align_rows(
    output: OutputTokens,
    base: TokenizerFiles,
    chat: TokenizerFiles,
    map: VocabularyMap | None,
    first: bool = True,
) -> RowAlignment:
    """Align one vector by token string. `first` says that its chat model's format is the output's."""
    of_format = format_tokens(base, chat)
    if first and map:
        of_format |= {token.token for token in map.chat}
    rows = np.fromiter(output.ids.values(), np.int64, len(output.ids))
    in_base, in_chat = _rows_of(output, base), _rows_of(output, chat)
    role = np.where(in_base < 0, Role.NEW, np.where(in_chat < 0, Role.UNMATCHED, Role.SHARED))
    alignment = RowAlignment(
        np.full(output.rows, Role.PADDING, np.uint8), np.full(output.rows, -1), np.full(output.rows, -1)
    )  # fmt: skip
    alignment.role[rows], alignment.base[rows], alignment.chat[rows] = role, in_base, in_chat
    format_rows = sorted(output.ids[token] for token in of_format if token in output.ids)
    alignment.role[format_rows] = Role.CHAT if first else Role.UNMATCHED
    if first:
        alignment.chat_tokens.extend(output.tokens[row] for row in format_rows)
    alignment.unmatched.extend(
        output.tokens[row] for row in np.flatnonzero(alignment.role == Role.UNMATCHED).tolist()
    )
    return alignment


def _rows_of(output: OutputTokens, tokenizer: TokenizerFiles) -> Rows:
    """For each token of the output, in its order, the tokenizer's id, or -1."""
    return np.fromiter(
        (tokenizer.ids.get(token, -1) for token in output.ids), np.int64, len(output.ids)
    )


def format_tokens(base: TokenizerFiles, chat: TokenizerFiles) -> set[str]:
    """The tokens whose rows come from the chat model."""
    beyond_base = {token for token in chat.added if token not in base.ids}
    untrained = {token for token in chat.format_tokens() if token not in base.roles.values()}
    return beyond_base | untrained


def check_rows(tokenizer: TokenizerFiles, rows: int) -> None:
    """Raise `UserError` for a tokenizer with ids beyond its model's rows."""
    if max(tokenizer.ids.values(), default=-1) >= rows:
        beyond = [token for token, number in tokenizer.ids.items() if number >= rows]
        raise UserError(
            f"{tokenizer.directory} has {rows} embedding rows but {_named(beyond)} beyond them; "
            "use the tokenizer that belongs to the weights."
        )


def lost_tokens(
    cpt: Path, output: OutputTokens, base: TokenizerFiles, chat: TokenizerFiles, first: bool = True
) -> list[str]:
    """A sentence for each kind of token that has no counterpart. `cpt` is where CPT's tokenizer lies.

    The special tokens of a further vector's models are not needed: the format is the first's. They are said.
    """
    gone = set(output.changes.renamed.values())
    problems = []
    for tokenizer, advice in (
        (base, "extend the base's own tokenizer"),
        (chat, "make it with this chat model"),
    ):
        lost = _missing(tokenizer, output.ids.keys() | gone)
        if not first:
            lost = _without_added(lost, tokenizer)
        if lost:
            problems.append(f"{cpt} lacks {_named(lost)} of {tokenizer.directory}; {advice}")
    return problems + unshared_tokens(base, chat)


def unshared_tokens(base: TokenizerFiles, chat: TokenizerFiles) -> list[str]:
    """A sentence if the two vocabularies differ in more than added tokens."""
    lost = _missing(base, chat.ids.keys() | base.added) + _missing(
        chat, base.ids.keys() | chat.added
    )
    if not lost:
        return []
    return [
        f"{chat.directory} and {base.directory} do not share {_named(lost)}; give the base of this chat model"
    ]


def _missing(tokenizer: TokenizerFiles, known: Set[str]) -> list[str]:
    """The tokens that are not known, by their ids."""
    return sorted(tokenizer.ids.keys() - known, key=lambda token: tokenizer.ids[token])


def _without_added(tokens: list[str], tokenizer: TokenizerFiles) -> list[str]:
    special = [token for token in tokens if token in tokenizer.added]
    if special:
        say(
            f"merge: {_named(special)} of {tokenizer.directory} are not in the output, whose format is another's"
        )
    return [token for token in tokens if token not in tokenizer.added]


def check_map(map: VocabularyMap | None, output: OutputTokens, chat: TokenizerFiles) -> None:
    """Raise `UserError` if the map of the extended tokenizer was made with another chat model."""
    if map is None:
        return
    for token in map.chat:
        if chat.ids.get(token.token) != token.chat_id or output.ids.get(token.token) != token.id:
            raise UserError(
                f"the vocabulary map has {token.token!r} at {token.chat_id}, {chat.directory} has it elsewhere; "
                "make the tokenizer again with this chat model."
            )
    if map.rows > output.rows:
        raise UserError(
            f"the vocabulary map has {map.rows} rows, the model {output.rows}; use the map of this model."
        )
    for piece in map.new:
        if not all(number in output.tokens for number in piece.constituents):
            raise UserError(
                f"the vocabulary map spells {piece.piece!r} by ids {piece.constituents}, which have no tokens; "
                "use the map that was written with this tokenizer."
            )
        if output.ids.get(piece.piece) != piece.id:
            raise UserError(
                f"the vocabulary map has {piece.piece!r} at {piece.id}, the tokenizer beside it has it elsewhere; "
                "use the map that was written with this tokenizer."
            )


def add_constituents(
    alignment: RowAlignment,
    map: VocabularyMap,
    output: OutputTokens,
    base: TokenizerFiles,
    chat: TokenizerFiles,
) -> None:
    """Find for each new row the rows of its constituents in base and chat. Old ids are the base's (law 1)."""
    left_out = 0
    for piece in map.new:
        tokens = [output.tokens[row] for row in piece.constituents]
        pairs = [(base.ids.get(token, -1), chat.ids.get(token, -1)) for token in tokens]
        if alignment.role[piece.id] == Role.NEW and pairs and min(min(pair) for pair in pairs) >= 0:
            rows = np.array(pairs, dtype=np.int64)
            alignment.constituents[piece.id] = RowPairs(rows[:, 0], rows[:, 1])
        elif alignment.role[piece.id] == Role.NEW:
            left_out += 1
    if left_out:
        say(
            f"merge: {left_out} new pieces have constituents that {chat.directory} lacks; they are kept as trained"
        )


def _named(tokens: Iterable[str]) -> str:
    """`3 tokens ('a', 'b', 'c')`, at most five of them named."""
    tokens = list(tokens)
    shown = ", ".join(repr(token) for token in tokens[:5]) + (", ..." if len(tokens) > 5 else "")
    return f"{len(tokens)} token{'s' if len(tokens) > 1 else ''} ({shown})"
