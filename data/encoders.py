"""Texts to token ids: the tokenizers library, and a shortcut that remembers words.

A tokenizer library looks at every character of every text, but most words of a text occurred
before. `WordEncoder` cuts texts in front of spaces and tokenises only new words. This is exact for
SentencePiece BPE if no token reaches across such a cut: there is no pre-tokenizer (spaces become
U+2581) and no piece has U+2581 after another character. A cut follows a word character or ASCII
punctuation. Long texts are also cut after a punctuation mark that is a piece and that no piece has
before another character.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

MEMO_WORDS = 2**18  # words that a process remembers
LONG_WORDS = 8.0  # characters per space, above which whole texts are tokenised (Chinese)
# The most characters in new words with which the memory saves time: a new word takes three times as
# long as within its text, and finding the words takes a third of the library's time.
NEW_CHARACTERS = 0.2
LONGEST_PAUSE = 32  # blocks

# spaces and what follows up to the next cut
WORD = re.compile(r" *[^ ]+(?:(?<![\w!-~]) +[^ ]*)*| +")

MARKS = "。！？，、；："
_BEFORE_SPACE = r"(?<=[\w!-~])(?= )"

_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREFIX = {"type": "Prepend", "prepend": "▁"}  # of the text, so no part of a word's tokens


class TextEncoder(Protocol):
    """Encodes texts without adding special tokens; names of special tokens are ordinary text."""

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text, as the bytes of integers of the encoder's dtype."""


class Shortcut(TextEncoder, Protocol):
    """An encoder that is proven to give the ids of the tokenizers library."""

    @property
    def border(self) -> re.Pattern[str]:
        """The places across which no token reaches."""

    def encode_parts(self, parts: list[str]) -> bytes:
        """The ids of the text that was cut at borders into `parts`."""


@dataclass(frozen=True)
class LibraryEncoder:
    """Encodes whole texts with the tokenizers library."""

    backend: Tokenizer
    dtype: str

    def encode(self, texts: list[str]) -> list[bytes]:
        """See `TextEncoder`."""
        self.backend.encode_special_tokens = True  # is lost when the tokenizer is pickled
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        # for few ids, array is faster than numpy
        code = {2: "H", 4: "I"}[np.dtype(self.dtype).itemsize]
        return [array(code, encoding.ids).tobytes() for encoding in encodings]


class WordEncoder:
    """Encodes texts word by word and remembers the words.

    After a block with many new words the library encodes the next ones: 1, 3, 7, ... blocks, as
    long as every try finds many.
    """

    def __init__(
        self, library: LibraryEncoder, of_words: LibraryEncoder, lead: str, border: re.Pattern[str]
    ) -> None:
        self.library, self.of_words, self._lead, self.border = library, of_words, lead, border
        self._memo: dict[str, bytes] = {}
        self._pause = self._paused = 0  # blocks that are, and were, left to the library

    @staticmethod
    def of(definition: Mapping[str, Any], library: LibraryEncoder) -> WordEncoder | None:
        """None unless a tokenizer.json proves that no token reaches across a cut."""
        if not never_joins_over_spaces(definition):
            return None
        border = re.compile(_BEFORE_SPACE + _after_marks(definition["model"]["vocab"]))
        if _PREFIX not in _steps(definition["normalizer"], "normalizers"):
            return WordEncoder(library, library, "", border)
        without = Tokenizer.from_str(json.dumps({**definition, "normalizer": _SPACE}))
        return WordEncoder(library, LibraryEncoder(without, library.dtype), " ", border)

    def encode(self, texts: list[str]) -> list[bytes]:
        """See `TextEncoder`."""
        spaces, characters = sum(text.count(" ") for text in texts), sum(map(len, texts))
        if characters > LONG_WORDS * spaces:
            return self.library.encode(texts)
        if self._paused < self._pause:
            self._paused += 1
            return self.library.encode(texts)
        words = [WORD.findall(self._lead + text) for text in texts]
        new = self._learn(set().union(*words))
        worthwhile = new <= NEW_CHARACTERS * characters
        self._pause = 0 if worthwhile else min(2 * self._pause + 1, LONGEST_PAUSE)
        self._paused = 0
        return [b"".join(map(self._memo.__getitem__, of_text)) for of_text in words]

    def _learn(self, words: set[str]) -> int:
        """Remember all words; the number of characters in new ones."""
        new = list(words - self._memo.keys())
        if len(self._memo) + len(new) > MEMO_WORDS:
            self._memo.clear()
            new = list(words)
        self._memo.update(zip(new, self.of_words.encode(new), strict=True))
        return sum(map(len, new))

    def encode_parts(self, parts: list[str]) -> bytes:
        """See `Shortcut`."""
        first, *others = parts
        encoded = self.library.encode([first])
        return b"".join([*encoded, *(self.of_words.encode([part])[0] for part in others)])


def _after_marks(pieces: Collection[str]) -> str:
    """An alternative of a border: after the marks that no piece has before another character."""
    ending = {mark for mark in MARKS if mark in pieces}
    ending -= {mark for mark in ending if any(mark in piece[:-1] for piece in pieces)}
    return f"|(?<=[{''.join(sorted(ending))}])" if ending else ""


def never_joins_over_spaces(definition: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json proves that no token reaches from a word across a space."""
    model, normalizers = definition["model"], _steps(definition["normalizer"], "normalizers")
    special = all(token["special"] for token in definition["added_tokens"])
    if model["type"] != "BPE" or model["dropout"] or not special:
        return False
    if normalizers not in ([_SPACE], [_PREFIX, _SPACE]) or definition["pre_tokenizer"]:
        return False
    return "▁" in model["vocab"] and not any("▁" in piece.lstrip("▁") for piece in model["vocab"])


def _steps(step: Mapping[str, Any] | None, name: str) -> list[Any]:
    """The steps of a sequence, or the single step, or nothing."""
    if step is None:
        return []
    return list(step[name]) if step["type"] == "Sequence" else [step]
