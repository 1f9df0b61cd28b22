"""Texts to documents of token ids, as fast as a tokenizer allows.

`LibraryEncoder` asks the tokenizers library for whole texts. Where the definition of a tokenizer
proves that a shortcut gives the same ids, the shortcut is used: `ByteLevelEncoder` for byte-level
BPE, `WordEncoder` for SentencePiece BPE. One text of every block is compared with the library.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cpt_merge.checkpoint.tokenizer_backend import TokenizerBackend
from cpt_merge.core.errors import UserError
from cpt_merge.data.byte_level_encoder import ByteLevelEncoder
from cpt_merge.data.encoders import LibraryEncoder, Shortcut, TextEncoder, WordEncoder
from cpt_merge.data.long_texts import LONGEST, cut
from cpt_merge.data.store import Integers, TokenizerInfo, Tokens, tokenizer_fingerprint


@dataclass(frozen=True)
class VerifiedEncoder:
    """A shortcut that is compared with the library on one text of every block."""

    shortcut: Shortcut
    library: LibraryEncoder

    def encode(self, texts: list[str]) -> list[bytes]:
        """See `TextEncoder`. Raises `UserError` if the shortcut is not exact."""
        short = [text for text in texts if len(text) <= LONGEST]
        encoded = self.shortcut.encode(short)
        if short:
            compared = min(range(len(short)), key=lambda number: len(short[number]))
            self._compare(short[compared], encoded[compared])
        if len(short) == len(texts):
            return encoded
        of_short = iter(encoded)
        return [
            next(of_short) if len(text) <= LONGEST else self._encode_long(text) for text in texts
        ]

    def _encode_long(self, text: str) -> bytes:
        parts = cut(text, self.shortcut.border)
        self._compare(parts[0], self.shortcut.encode([parts[0]])[0])
        return self.shortcut.encode_parts(parts)

    def _compare(self, text: str, encoded: bytes) -> None:
        if self.library.encode([text])[0] != encoded:
            raise UserError(
                f"the shortcut to the tokens of {text[:80]!r} is wrong; report this bug."
            )


def text_encoder(backend: Tokenizer, dtype: str) -> TextEncoder:
    """The fastest encoder that is exact for a tokenizer."""
    library, definition = LibraryEncoder(backend, dtype), json.loads(backend.to_str())
    shortcut = ByteLevelEncoder.of(definition, library) or WordEncoder.of(definition, library)
    return VerifiedEncoder(shortcut, library) if shortcut else library


@dataclass(frozen=True)
class DocumentEncoder:
    """A tokenizer that turns texts into documents: `[prefix] tokens [eos]`.

    The name of a special token in a text, such as `</s>`, is ordinary text.
    """

    info: TokenizerInfo
    tokenizer: TokenizerBackend

    @staticmethod
    def read(directory: Path) -> DocumentEncoder:
        """Raises `UserError` for a tokenizer without eos or without a fast implementation."""
        tokenizer = TokenizerBackend.read(directory)
        rows = max(tokenizer.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        dtype = "uint16" if rows <= 2**16 else "uint32"
        return DocumentEncoder(
            TokenizerInfo(tokenizer_fingerprint(directory), rows, dtype), tokenizer
        )

    @cached_property
    def texts(self) -> TextEncoder:
        """Encodes the texts proper."""
        return text_encoder(self.tokenizer.tokenizer, self.info.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return DocumentEncoder, (self.info, self.tokenizer)

    def __call__(self, texts: list[str]) -> tuple[Tokens, Integers]:
        """(the documents' tokens one after the other, how many each has)."""
        dtype = np.dtype(self.info.dtype)
        eos = self.tokenizer.eos
        front = eos if self.tokenizer.prefix is None else self.tokenizer.prefix
        prefix, end = (dtype.type(token).tobytes() for token in (front, eos))
        documents = [prefix + ids + end for ids in self.texts.encode(texts)]
        lengths = np.fromiter(map(len, documents), np.int64, len(documents)) // dtype.itemsize
        return np.frombuffer(b"".join(documents), dtype), lengths

    def beginning(self, document: Tokens, tokens: int) -> str:
        """The text of a document's first tokens."""
        text: str = self.tokenizer.tokenizer.decode(document[1:-1][:tokens].tolist())
        return text.rstrip("\ufffd")  # a character that was cut
