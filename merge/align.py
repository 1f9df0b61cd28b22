"""Which row of base and chat belongs to which row of the output: rows meet by token string, never by position (law 2).

Every row of the output (the CPT model's vocabulary) is treated in one of these ways:

    shared       the token is in all three: the tensor's rule applies
    new          only CPT has it: kept as trained, or given the mean vector of its constituents (`new_rows`)
    chat         part of the chat format: taken from the chat model, whatever rule and ratio
    unmatched    base has it and chat does not, an added token that nobody uses: kept
    padding      no token: kept

Part of the chat format are the tokens that the chat tokenizer adds to the base's, and the added tokens that its
template or its stop ids name, unless they are the base's own bos, eos, unk or pad. The base may have them too
(<|eot_id|> of Llama 3), but has not trained them: their difference is no vector, and CPT's row no place to start from.
(The authors' code pastes the base's rows there and scales them.)

Anything else that cannot be aligned is an error that names the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from checkpoint.tokenizer import TokenizerFiles
from checkpoint.vocabulary import VocabularyMap
from core.errors import UserError

Rows = NDArray[np.int64]


class Role(IntEnum):
    """How a row of the output is treated."""

    PADDING = 0
    SHARED = 1
    NEW = 2
    CHAT = 3
    UNMATCHED = 4


@dataclass(frozen=True)
class RowCounts:
    """Rows of the three embedding matrices."""

    cpt: int
    base: int
    chat: int


@dataclass(frozen=True)
class RowAlignment:
    """For every output row its role and its rows in base and chat (-1: none).

    `constituents` holds, for those new rows that get a vector, the rows whose mean it is: (base rows, chat rows).
    """

    role: NDArray[np.uint8]
    base: Rows
    chat: Rows
    constituents: dict[int, tuple[Rows, Rows]] = field(default_factory=dict)
    chat_tokens: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows of the output."""
        return len(self.role)

    def counts(self) -> dict[str, int]:
        """Role -> number of rows."""
        return {role.name.lower(): int((self.role == role).sum()) for role in Role}


@dataclass(frozen=True)
class Vocabularies:
    """The three tokenizers, and the map that made the extended one (None where it was made elsewhere)."""

    cpt: TokenizerFiles
    base: TokenizerFiles
    chat: TokenizerFiles
    map: VocabularyMap | None = None


def align_by_position(rows: RowCounts) -> RowAlignment:
    """All rows shared, as they lie: for models without tokenizers and with equally many rows."""
    everything = np.arange(rows.cpt)
    return RowAlignment(np.full(rows.cpt, Role.SHARED, np.uint8), everything, everything)


def align_rows(vocabularies: Vocabularies, rows: RowCounts, new_rows: str) -> RowAlignment:
    """Align by token string. Raises `UserError` naming what cannot be aligned."""
    cpt, base, chat = vocabularies.cpt, vocabularies.base, vocabularies.chat
    _check_ids(cpt, rows.cpt)
    _check_ids(base, rows.base)
    _check_ids(chat, rows.chat)
    _check_nothing_is_lost(vocabularies)
    alignment = RowAlignment(
        np.full(rows.cpt, Role.PADDING, np.uint8), np.full(rows.cpt, -1), np.full(rows.cpt, -1)
    )  # fmt: skip
    chat_format = _chat_format(vocabularies)
    for token, row in cpt.ids.items():
        alignment.base[row] = base.ids.get(token, -1)
        alignment.chat[row] = chat.ids.get(token, -1)
        alignment.role[row] = _role(token, chat_format, base, chat)
    alignment.chat_tokens.extend(sorted(chat_format, key=lambda token: cpt.ids[token]))
    alignment.unmatched.extend(cpt.tokens[row] for row in np.flatnonzero(alignment.role == Role.UNMATCHED).tolist())
    if new_rows == "constituents":
        alignment.constituents.update(_constituents(vocabularies, alignment))
    return alignment


def _role(token: str, chat_format: set[str], base: TokenizerFiles, chat: TokenizerFiles) -> Role:
    if token in chat_format:
        return Role.CHAT
    if token not in base.ids:
        return Role.NEW
    return Role.SHARED if token in chat.ids else Role.UNMATCHED


def _chat_format(vocabularies: Vocabularies) -> set[str]:
    """The tokens whose rows come from the chat model."""
    base, chat = vocabularies.base, vocabularies.chat
    beyond_base = {token for token in chat.added if token not in base.ids}
    of_the_map = {token.token for token in vocabularies.map.chat} if vocabularies.map else set()
    untrained = {token for token in chat.format_tokens() if token not in base.roles.values()}
    return beyond_base | of_the_map | untrained


def _check_ids(tokenizer: TokenizerFiles, rows: int) -> None:
    beyond = [token for token, number in tokenizer.ids.items() if number >= rows]
    if beyond:
        raise UserError(
            f"{tokenizer.directory} has {rows} embedding rows but {_named(beyond)} beyond them; "
            "use the tokenizer that belongs to the weights."
        )


def _check_nothing_is_lost(vocabularies: Vocabularies) -> None:
    cpt, base, chat = vocabularies.cpt, vocabularies.base, vocabularies.chat
    lost = [token for token in base.ids if token not in cpt.ids]
    if lost:
        raise UserError(f"{cpt.directory} lacks {_named(lost)} of the base; extend the base's own tokenizer.")
    lost = [token for token in chat.ids if token not in cpt.ids]
    if lost:
        raise UserError(
            f"{cpt.directory} lacks {_named(lost)} of {chat.directory}; "
            "make the tokenizer again with this chat model in the recipe."
        )
    lost = [token for token in base.ids if token not in chat.ids and token not in base.added]
    if lost:
        raise UserError(
            f"{chat.directory} lacks {_named(lost)} of {base.directory}; give the base that chat was trained from."
        )
    for token in vocabularies.map.chat if vocabularies.map else []:
        if chat.ids.get(token.token) != token.chat_id or cpt.ids.get(token.token) != token.id:
            raise UserError(
                f"the vocabulary map has {token.token!r} at {token.chat_id}, {chat.directory} has it elsewhere; "
                "make the tokenizer again with this chat model."
            )


def _constituents(vocabularies: Vocabularies, alignment: RowAlignment) -> dict[int, tuple[Rows, Rows]]:
    """New row -> the rows of its constituents in base and chat."""
    if vocabularies.map is None:
        raise UserError(
            f"{vocabularies.cpt.directory} holds no vocabulary map, which merge.new_rows: constituents needs; "
            "set new_rows: keep."
        )
    found: dict[int, tuple[Rows, Rows]] = {}
    for piece in vocabularies.map.new:
        base_rows = np.array(piece.constituents, dtype=np.int64)
        tokens = [vocabularies.base.tokens[row] for row in piece.constituents]
        chat_rows = np.array([vocabularies.chat.ids.get(token, -1) for token in tokens], dtype=np.int64)
        if alignment.role[piece.id] == Role.NEW and len(base_rows) and (chat_rows >= 0).all():
            found[piece.id] = (base_rows, chat_rows)
    return found


def _named(tokens: Iterable[str]) -> str:
    """`3 tokens ('a', 'b', 'c')`, at most five of them named."""
    tokens = list(tokens)
    shown = ", ".join(repr(token) for token in tokens[:5]) + (", ..." if len(tokens) > 5 else "")
    return f"{len(tokens)} token{'s' if len(tokens) > 1 else ''} ({shown})"
