r"""Tokens of words that were met before: an exact shortcut for SentencePiece BPE whose pieces never join over spaces.

A tokenizer library looks at every character of every text again; but most words of a text were in the text before it.
So texts are cut in front of spaces, and only words that are new are tokenised. That gives the same tokens if no token
reaches over such a cut, which is so if there is no pre-tokenizer (spaces become U+2581) and no piece has U+2581 behind
another character.

A cut has a word character or ASCII punctuation in front of it.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

MEMO_WORDS = 2**18  # that are remembered, for each process
LONG_WORDS = (
    8.0  # characters for each space above which whole texts are tokenised: Chinese has few spaces
)
NEW_WORDS = 0.25  # share of new words above which they are

# spaces and what follows up to the next space, and on over spaces that are no cut
WORD = re.compile(r" *[^ ]+(?:(?<![\w!-~]) +[^ ]*)*| +")

_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREFIX = {"type": "Prepend", "prepend": "▁"}  # of the text, so no part of a word's tokens


class TextEncoder(Protocol):
    """Turns texts into the bytes of their token ids, without special tokens; names of special tokens are text."""

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text, as integers of the dtype that the encoder was made for."""


@dataclass(frozen=True)
class LibraryEncoder:
    """A tokenizer of the library."""

    backend: Tokenizer
    dtype: str

    def encode(self, texts: list[str]) -> list[bytes]:
        """See `TextEncoder`."""
        self.backend.encode_special_tokens = True  # no part of what is pickled
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        code = {2: "H", 4: "I"}[
            np.dtype(self.dtype).itemsize
        ]  # for a few ids an array is faster than numpy
        return [array(code, encoding.ids).tobytes() for encoding in encodings]


class WordEncoder:
    """Turns texts into the bytes of their token ids."""

    def __init__(self, library: LibraryEncoder, of_words: LibraryEncoder, lead: str) -> None:
        self.library, self.of_words, self._lead = library, of_words, lead
        self._memo: dict[str, bytes] = {}

    @staticmethod
    def of(definition: Mapping[str, Any], library: LibraryEncoder) -> WordEncoder | None:
        """None where a tokenizer.json is not known to give no token that reaches from a word over a space."""
        if not never_joins_over_spaces(definition):
            return None
        if _PREFIX not in _steps(definition["normalizer"], "normalizers"):
            return WordEncoder(library, library, "")
        without = Tokenizer.from_str(json.dumps({**definition, "normalizer": _SPACE}))
        return WordEncoder(library, LibraryEncoder(without, library.dtype), " ")

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text."""
        spaces, characters = sum(text.count(" ") for text in texts), sum(map(len, texts))
        if characters > LONG_WORDS * spaces:
            return self.library.encode(texts)
        words = [WORD.findall(self._lead + text) for text in texts]
        new = list(set().union(*words) - self._memo.keys())
        if len(new) > NEW_WORDS * sum(map(len, words)):
            return self.library.encode(texts)
        if len(self._memo) + len(new) > MEMO_WORDS:
            self._memo.clear()
            new = list(set().union(*words))
        self._memo.update(zip(new, self.of_words.encode(new), strict=True))
        return [b"".join(map(self._memo.__getitem__, of_text)) for of_text in words]


def never_joins_over_spaces(definition: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is known to give no token that reaches from a word over a space."""
    model, normalizers = definition["model"], _steps(definition["normalizer"], "normalizers")
    if (
        model["type"] != "BPE"
        or model["dropout"]
        or not all(token["special"] for token in definition["added_tokens"])
    ):
        return False
    if normalizers not in ([_SPACE], [_PREFIX, _SPACE]) or definition["pre_tokenizer"]:
        return False
    return "▁" in model["vocab"] and not any("▁" in piece.lstrip("▁") for piece in model["vocab"])


def _steps(step: Mapping[str, Any] | None, name: str) -> list[Any]:
    """A sequence's steps, or the one step, or none."""
    if step is None:
        return []
    return list(step[name]) if step["type"] == "Sequence" else [step]
