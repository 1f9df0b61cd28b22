"""The tokenizers library, asked for whole texts."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer


class TextEncoder(Protocol):
    """Turns texts into the bytes of their token ids, without special tokens; names of special tokens are text."""

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text, as integers of the dtype that the encoder was made for."""


@dataclass(frozen=True)
class Library:
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
