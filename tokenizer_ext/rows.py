"""Which row of the extended matrix belongs to which token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from cpt_merge.checkpoint.vocabulary_map import ChatToken, NewPiece, VocabularyMap
from cpt_merge.tokenizer_ext.base import Base
from cpt_merge.tokenizer_ext.fast import AddedToken, build_model


@dataclass(frozen=True)
class Layout:
    """Every row from the base's last on, and names for the base's rows that had none."""

    rows: int
    pieces: dict[str, int]  # new piece -> id, the first merged first
    added: list[AddedToken]  # the chat model's tokens and reserved ones, by id
    chat: list[ChatToken]
    padding: list[int]


def lay_out(
    base: Base, chat_tokens: Sequence[AddedToken], pieces: Sequence[str], multiple: int
) -> Layout:
    """Give every token its row.

    The base's rows stay as they are, those without a token included: they get reserved names, as `tokenizers` gives a
    token that is added later the id that equals the number of tokens, so a hole would let it collide. A token of the
    chat model keeps its id unless the base uses it. New pieces take the free rows beyond the base's. The number of
    rows is rounded up to `multiple`, and what is left is reserved.
    """
    taken = set(base.ids.values())
    kept = [token for token in chat_tokens if token.id not in taken]
    displaced = [token for token in chat_tokens if token.id in taken]
    taken |= {token.id for token in kept}
    free = (id_ for id_ in count(base.rows) if id_ not in taken)
    ids = dict(zip(pieces, free, strict=False))
    placed = kept + [replace(token, id=next(free)) for token in displaced]
    taken |= {*ids.values(), *(token.id for token in placed)}
    rows = -(-max(base.rows, *(id_ + 1 for id_ in taken)) // multiple) * multiple
    unnamed = [id_ for id_ in range(rows) if id_ not in taken]
    names = _reserved_names({*base.ids, *ids, *(token.content for token in placed)})
    reserved = [AddedToken(id_, next(names)) for id_ in unnamed]
    chat_ids = {token.content: token.id for token in chat_tokens}
    return Layout(
        rows=rows,
        pieces=ids,
        added=sorted([*placed, *reserved], key=lambda token: token.id),
        chat=[
            ChatToken(token.id, token.content, chat_ids[token.content])
            for token in placed
            if token.id >= base.rows
        ],
        padding=[id_ for id_ in unnamed if id_ >= base.rows],
    )


def _reserved_names(existing: set[str]) -> Iterator[str]:
    return (name for name in map("<|reserved_{}|>".format, count()) if name not in existing)


def map_rows(base: Base, layout: Layout) -> VocabularyMap:
    """The map that the embedding rows and the merge read.

    A piece's constituents come from the base's merges alone. The whole tokenizer would put the dummy prefix `▁` among
    them, which is no part of the piece.
    """
    spelling = build_model(base.content)
    constituents = spelling.encode_batch(list(layout.pieces), add_special_tokens=False)
    new = [
        NewPiece(id_, piece, encoding.ids)
        for (piece, id_), encoding in zip(layout.pieces.items(), constituents, strict=True)
    ]
    return VocabularyMap(base.rows, layout.rows, new, layout.chat, layout.padding)
