"""Byte-level BPE (GPT-2, LLaMA-3, Qwen, SmolLM): the model reads UTF-8 bytes, each as one printable
letter.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from cpt_merge.core.byte_alphabet import BYTES, LETTERS, to_bytes
from cpt_merge.tokenizer_ext.families.tokenizer_json import Content, build, merges_of
from cpt_merge.tokenizer_ext.learn.scripts import Scripts
from cpt_merge.tokenizer_ext.learn.word_counts import Splitter, Words

SPACE = LETTERS[0x20]
_UNDECODED = re.compile("[\udc80-\udcff]")  # bytes of incomplete characters ("surrogateescape")


@dataclass(frozen=True)
class PreTokens:
    """The pre-tokens of a text with a character of the scripts, in the byte alphabet."""

    normalizer: Normalizer | None
    pre_tokenizer: PreTokenizer
    scripts: Scripts

    def __call__(self, text: str) -> list[str]:
        """Those of one document."""
        letters = self.scripts.letter
        if not letters.search(text):
            return []
        normal = self.normalizer.normalize_str(text) if self.normalizer else text
        pre_tokens = self.pre_tokenizer.pre_tokenize_str(normal)
        return [word for word, (start, end) in pre_tokens if letters.search(normal, start, end)]


class ByteLevelBpe:
    """A base whose pre-tokenizer writes bytes as letters."""

    name = "byte-level BPE"

    def __init__(self, content: Content) -> None:
        self._content = content
        self._tokenizer = build(content)

    def splitter(self, scripts: Scripts) -> Splitter:
        """The tokenizer's own pre-tokens with a character of the script."""
        return PreTokens(self._tokenizer.normalizer, self._tokenizer.pre_tokenizer, scripts)

    def admits(self, scripts: Scripts, max_length: int) -> Callable[[str], bool]:
        """Whole characters of the script or the beginning of one, but no end of a character before
        another.

        A leading space is admitted even for scripts without spaces, because the base's merges join
        it to the first byte.
        """

        @cache
        def admitted(piece: str) -> bool:
            spelt = to_bytes(piece.removeprefix(SPACE))
            try:
                text = spelt.decode()
            except UnicodeDecodeError:
                return begins_only(spelt, scripts)
            return len(text) <= max_length and scripts.spell(text)

        return admitted

    def needed_characters(
        self, words: Words, coverage: float, vocabulary: Collection[str]
    ) -> dict[str, int]:
        """None: bytes spell every character."""
        return {}

    def is_one_word(self, text: str) -> bool:
        """Whether it is normalized and one pre-token."""
        normalizer = self._tokenizer.normalizer
        normal = normalizer.normalize_str(text) if normalizer else text
        return normal == text and len(self._tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1

    def spells(self, piece: str) -> bool:
        """Always true: every piece is made of bytes."""
        return True

    def settled(self) -> int:
        """All of the base's merges."""
        return len(merges_of(self._content))

    def written(self, text: str) -> str:
        """One letter per byte."""
        return "".join(map(LETTERS.__getitem__, text.encode()))

    def spelt(self, piece: str) -> bytes:
        """One byte per letter; the UTF-8 of a special token."""
        return (
            bytes(BYTES[letter] for letter in piece)
            if set(piece) <= BYTES.keys()
            else piece.encode()
        )

    def readable(self, piece: str) -> str:
        """The text of the bytes; special tokens unchanged."""
        try:
            spelt = to_bytes(piece)
        except KeyError:
            return piece
        return _UNDECODED.sub(
            lambda found: f"<{ord(found[0]) - 0xDC00:02X}>",
            spelt.decode("utf-8", "surrogateescape"),
        )

    def write_model(self, content: Content, pieces: dict[str, int], rows: int, out: Path) -> None:
        """Nothing: there is only `tokenizer.json`."""


def begins_only(spelt: bytes, scripts: Scripts) -> bool:
    """Whether every assigned character whose UTF-8 begins with these bytes belongs to the scripts.

    A beginning that is shared with other scripts (`E3 80`: Han's 々 and CJK punctuation) would
    change their text.
    """
    lead = spelt[0]
    length = (
        2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if 0xF0 <= lead < 0xF5 else 0
    )
    missing = length - len(spelt)
    if missing <= 0:
        return False
    characters = [spelt + rest for rest in _continuations(missing)]
    decoded = "".join(character.decode("utf-8", "ignore") for character in characters)
    unassigned = ("Cn", "Cs", "Co")
    return scripts.spell(
        "".join(letter for letter in decoded if unicodedata.category(letter) not in unassigned)
    )


def _continuations(count: int) -> list[bytes]:
    if count == 0:
        return [b""]
    return [
        bytes([byte]) + rest for byte in range(0x80, 0xC0) for rest in _continuations(count - 1)
    ]
