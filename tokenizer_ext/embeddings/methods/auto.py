"""`ends` for pieces whose constituents the base can know, `constituents` for pieces that it spells
in bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import regex

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.checkpoint.reader import read_json
from cpt_merge.checkpoint.vocabulary_map import NewPiece
from cpt_merge.core.byte_alphabet import BYTES
from cpt_merge.tokenizer_ext.base_tokenizer import has_byte_level
from cpt_merge.tokenizer_ext.embeddings.methods.ends import SHARES
from cpt_merge.tokenizer_ext.embeddings.methods.method import NewRows
from cpt_merge.tokenizer_ext.embeddings.methods.spelling import Spelling, spelt_rows

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_LETTER = regex.compile(r"[\p{L}\p{M}\p{N}]")


def auto(task: NewRows) -> Iterator[Float32]:
    """Choose for each piece: `ends` if one of its constituents holds a whole letter, else
    `constituents`.

    The first and last byte of a character say little about what precedes or follows the piece.
    Where the base never met the script, the rows of its bytes are untrained besides, so that their
    mean would be far too short.
    """
    leaning, plain = Spelling(SHARES[task.use]), Spelling(norm=task.old.mean_norm)

    def spelling_of(piece: NewPiece) -> Spelling:
        return plain if task.letterless.issuperset(piece.constituents) else leaning

    for row in spelt_rows(task, spelling_of):
        yield row[None]


def letterless_tokens(tokenizer: Path, ids: Collection[int]) -> frozenset[int]:
    """Which of the ids in `tokenizer.json` hold no whole letter: bytes, parts of characters,
    spaces, punctuation.
    """
    if not ids:
        return frozenset()
    content = read_json(tokenizer / "tokenizer.json")
    names = {id_: token for token, id_ in content["model"]["vocab"].items()}
    byte_level = has_byte_level(content.get("pre_tokenizer"))
    return frozenset(
        id_ for id_ in ids if not _LETTER.search(_text(names.get(id_, ""), byte_level))
    )


def _text(token: str, byte_level: bool) -> str:
    """The whole characters of a token."""
    if not byte_level:
        return _BYTE.sub("", token)
    return bytes(BYTES[letter] for letter in token if letter in BYTES).decode(errors="ignore")
