"""Texts to token ids, as fast as a tokenizer allows.

`Library` asks the tokenizers library for whole texts. Two shortcuts give the same ids in less time, where the
tokenizer's definition says that they do: `ByteLevel` (byte-level BPE) and `Words` (SentencePiece BPE). Of every block
of texts one is compared with what the library says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from tokenizers import Tokenizer

from cpt_merge.core.errors import UserError
from cpt_merge.data.byte_level import ByteLevel
from cpt_merge.data.library import Library, TextEncoder
from cpt_merge.data.words import Words


@dataclass(frozen=True)
class Checked:
    """A shortcut, watched by the library."""

    shortcut: TextEncoder
    library: Library

    def encode(self, texts: list[str]) -> list[bytes]:
        """See `TextEncoder`. Raises `UserError` if the shortcut is not exact after all."""
        encoded = self.shortcut.encode(texts)
        shortest = min(range(len(texts)), key=lambda number: len(texts[number]))
        if self.library.encode([texts[shortest]])[0] != encoded[shortest]:
            raise UserError(
                f"the shortcut to the tokens of {texts[shortest][:80]!r} is wrong; report this bug."
            )
        return encoded


def text_encoder(backend: Tokenizer, dtype: str) -> TextEncoder:
    """The fastest encoder that is exact for a tokenizer."""
    library, definition = Library(backend, dtype), json.loads(backend.to_str())
    shortcut = ByteLevel.of(definition, library) or Words.of(definition, library)
    return Checked(shortcut, library) if shortcut else library
