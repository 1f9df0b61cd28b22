"""The tokens of the merged model: CPT's, and those of the chat format that CPT's tokenizer lacks.

A token that only the chat model has gets its place in this order:

    token_map    what the recipe says: it becomes that token of CPT
    reserved     the chat model gave a reserved token of the base this name (same id, the old name gone): CPT's
                 reserved token gets it too
    appended     after all of CPT's tokens, in rows that no token uses or in new ones

Ids that CPT has never move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from cpt_merge.checkpoint.token_changes import TokenChanges
from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles
from cpt_merge.core.errors import UserError

ROW_MULTIPLE = (
    64  # new rows come in such numbers where CPT's did, so that tensor cores and shards divide
)


@dataclass(frozen=True)
class OutputTokens:
    """Token -> row of the output's matrices, how many rows these have, and how the tokenizer has to change."""

    ids: dict[str, int]
    rows: int
    changes: TokenChanges

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Row -> token."""
        return {number: token for token, number in self.ids.items()}


def output_tokens(
    cpt: TokenizerFiles,
    base: TokenizerFiles,
    chat: TokenizerFiles,
    cpt_rows: int,
    token_map: Mapping[str, str],
) -> OutputTokens:
    """The merged model's tokens. Raises `UserError` for a map that does not fit."""
    _check_map(token_map, cpt, chat)
    lacking = sorted(
        (token for token in chat.added if token not in cpt.ids), key=lambda token: chat.ids[token]
    )
    renamed = dict(token_map)
    for token in lacking:
        reserved = base.tokens.get(chat.ids[token])
        free = (
            reserved in base.added - chat.ids.keys()
            and reserved in cpt.added
            and reserved not in renamed.values()
        )
        if token not in renamed and reserved is not None and free:
            renamed[token] = reserved
    following = range(max(cpt.ids.values(), default=-1) + 1, 1 << 31)
    appended = dict(
        zip((token for token in lacking if token not in renamed), following, strict=False)
    )
    ids = {
        **cpt.ids,
        **{token: cpt.ids[reserved] for token, reserved in renamed.items()},
        **appended,
    }
    for reserved in renamed.values():
        del ids[reserved]
    return OutputTokens(
        ids, _rows(cpt_rows, max(ids.values(), default=-1) + 1), TokenChanges(appended, renamed)
    )


def _rows(cpt_rows: int, needed: int) -> int:
    if needed <= cpt_rows:
        return cpt_rows
    multiple = ROW_MULTIPLE if cpt_rows % ROW_MULTIPLE == 0 else 1
    return -(-needed // multiple) * multiple


def _check_map(token_map: Mapping[str, str], cpt: TokenizerFiles, chat: TokenizerFiles) -> None:
    for token, reserved in token_map.items():
        where = f"merge.token_map: {token!r}: {reserved!r}"
        if token not in chat.added:
            raise UserError(f"{where}: {chat.directory} has no such special token; correct it.")
        if token in cpt.ids:
            raise UserError(f"{where}: {cpt.directory} has {token!r} already; leave it out.")
        if reserved not in cpt.added:
            raise UserError(
                f"{where}: {cpt.directory} has no special token {reserved!r} to become it; correct it."
            )
    if len(set(token_map.values())) < len(token_map):
        raise UserError("merge.token_map gives one token of CPT to two of chat; correct it.")


def describe(changes: TokenChanges, cpt_rows: int, rows: int) -> list[str]:
    """A line for each kind of change."""
    lines = []
    if changes.renamed:
        pairs = ", ".join(f"{reserved} -> {token}" for token, reserved in changes.renamed.items())
        lines.append(f"reserved tokens take the chat model's names: {pairs}")
    if changes.appended:
        tokens = ", ".join(f"{token} at {number}" for token, number in changes.appended.items())
        lines.append(f"tokens of the chat format that CPT lacks: {tokens}")
    if rows > cpt_rows:
        lines.append(f"the matrices grow from {cpt_rows:,} to {rows:,} rows")
    return lines
