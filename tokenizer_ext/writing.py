"""The rows of an extended vocabulary, and the files of an extended tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.vocabulary_map import ChatToken, NewPiece, VocabularyMap
from cpt_merge.core.artifact import write_json, write_text
from cpt_merge.tokenizer_ext.base_tokenizer import FAST_FILE, ROLES, SETTINGS_FILE, Base
from cpt_merge.tokenizer_ext.families.tokenizer_json import (
    AddedToken,
    add_tokens,
    build_model,
    extend_model,
    look_up_whole_words,
)

SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"

# Not for PreTrainedTokenizerFast: tokenizer.json contains it already, or it belongs to another
# class.
DROPPED_SETTINGS = {
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "auto_map",
    "backend", "is_local", "legacy", "name_or_path", "sp_model_kwargs", "tokenizer_file",
    "use_default_system_prompt", "vocab_size",
}  # fmt: skip


@dataclass(frozen=True)
class RowLayout:
    """All rows beyond the base's, and names for rows of the base without a token."""

    rows: int
    pieces: dict[str, int]  # new piece -> id, the first merged first
    added: list[AddedToken]  # the chat model's tokens and reserved ones, by id
    chat: list[ChatToken]
    padding: list[int]


def lay_out(
    base: Base, chat_tokens: Sequence[AddedToken], pieces: Sequence[str], multiple: int
) -> RowLayout:
    """Assign a row to every token.

    The base's rows stay, including rows without a token: those get reserved names, because
    `tokenizers` gives a token that is added later the id equal to the number of tokens, which would
    collide if there were gaps. A token of the chat model keeps its id unless the base uses that id.
    New pieces take the free rows beyond the base's. The number of rows is rounded up to `multiple`,
    and rows left over are reserved.
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
    named = {*base.ids, *ids, *(token.content for token in placed)}
    names = (name for name in map("<|reserved_{}|>".format, count()) if name not in named)
    reserved = [AddedToken(id_, next(names)) for id_ in unnamed]
    chat_ids = {token.content: token.id for token in chat_tokens}
    return RowLayout(
        rows=rows,
        pieces=ids,
        added=sorted([*placed, *reserved], key=lambda token: token.id),
        chat=[
            ChatToken(token.id, token.content, chat_ids[token.content])
            for token in placed
            if token.id >= base.rows
        ],
        padding=sorted({*base.rowless.values(), *(id_ for id_ in unnamed if id_ >= base.rows)}),
    )


def map_rows(base: Base, layout: RowLayout) -> VocabularyMap:
    """The map from rows to the base's tokens, for the embeddings and the merge.

    A piece's constituents come from the base's merges alone, because the whole tokenizer would add
    the dummy prefix `▁`, which is no part of the piece.
    """
    spelling = build_model(base.content)
    constituents = spelling.encode_batch(list(layout.pieces), add_special_tokens=False)
    new = [
        NewPiece(id_, piece, encoding.ids)
        for (piece, id_), encoding in zip(layout.pieces.items(), constituents, strict=True)
    ]
    return VocabularyMap(base.rows, layout.rows, new, layout.chat, layout.padding)


def write_tokenizer(base: Base, layout: RowLayout, out: Path) -> None:
    """Write the files of the extended tokenizer, and `vocabulary_map.json`, into `out`."""
    content = extend_model(base.content, layout.pieces, base.family.settled())
    content = look_up_whole_words(add_tokens(content, layout.added))
    write_text(out / FAST_FILE, json.dumps(content, ensure_ascii=False, indent=1))
    base.family.write_model(content, layout.pieces, layout.rows, out)
    settings = extended_settings(base)
    write_json(out / SETTINGS_FILE, settings)
    write_json(out / SPECIAL_TOKENS_FILE, _special_tokens(settings))
    if (base.directory / TEMPLATE_FILE).is_file():
        shutil.copyfile(base.directory / TEMPLATE_FILE, out / TEMPLATE_FILE)
    map_rows(base, layout).save(out)


def extended_settings(base: Base) -> dict[str, Any]:
    """A `tokenizer_config.json` with which transformers 4.57 and 5 read the same tokenizer.

    `PreTrainedTokenizerFast` takes `tokenizer.json` as it is; the `LlamaTokenizer` of transformers
    5 rebuilds it and loses one leading space. By default, 4.57 cleans up spaces, which would break
    the round trip.
    """
    kept = {name: value for name, value in base.settings.items() if name not in DROPPED_SETTINGS}
    return {
        "clean_up_tokenization_spaces": False,
        **kept,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _special_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """For loaders that read the tokens of the roles from a file of their own."""
    names = [*(f"{role}_token" for role in ROLES), "additional_special_tokens"]
    return {name: settings[name] for name in names if settings.get(name)}
