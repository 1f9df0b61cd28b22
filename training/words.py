r"""Tokens of words that were met before: an exact shortcut for tokenizers that never join what a space parts.

A tokenizer library looks at every character of every text again; but most words of a text were in the text before it.
So texts are cut in front of spaces, and only words that are new are tokenised. That gives the same tokens if no token
reaches over such a cut, which is so, and is looked up in the tokenizer's definition,

- in SentencePiece BPE (spaces become U+2581, and no pre-tokenizer): if no piece has U+2581 behind another character;
- in byte-level BPE: if the pre-tokenizer's pattern lets no space follow what is none, as those of GPT-2, Llama 3,
  Qwen and SmolLM do.

A cut has a word character or ASCII punctuation in front of it, about which no two libraries have two opinions.
"""

from __future__ import annotations

import json
import re
from array import array
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from core.errors import UserError

MEMO_WORDS = 2**18  # that are remembered, for each process
LONG_WORDS = 8.0  # characters for each space above which whole texts are tokenised: Chinese has few spaces
NEW_WORDS = 0.25  # share of new words above which they are

# spaces and what follows up to the next space, and on over spaces that are no cut
WORD = re.compile(r" *[^ ]+(?:(?<![\w!-~]) +[^ ]*)*| +")

_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {_START + numbers + _END for numbers in (r"\p{N}{1,3}", r"\p{N}")}  # of Llama 3 and of Qwen
_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREFIX = {"type": "Prepend", "prepend": "▁"}  # of the text, so no part of a word's tokens


class Words:
    """Turns texts into the bytes of their token ids (of `dtype`), without special tokens."""

    def __init__(self, backend: Tokenizer, dtype: str) -> None:
        self.backend, self.dtype = backend, dtype
        definition = json.loads(backend.to_str())
        self.is_exact = never_joins_over_spaces(definition)
        self._of_words, self._lead = backend, ""
        if self.is_exact and _PREFIX in _steps(definition["normalizer"], "normalizers"):
            self._of_words, self._lead = Tokenizer.from_str(json.dumps({**definition, "normalizer": _SPACE})), " "
        self._memo: dict[str, bytes] = {}

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text. Raises `UserError` if the shortcut is not exact after all."""
        spaces, characters = sum(text.count(" ") for text in texts), sum(map(len, texts))
        if not self.is_exact or characters > LONG_WORDS * spaces:
            return self._encode(texts)
        words = [WORD.findall(self._lead + text) for text in texts]
        new = list(set().union(*words) - self._memo.keys())
        if len(new) > NEW_WORDS * sum(map(len, words)):
            return self._encode(texts)
        if len(self._memo) + len(new) > MEMO_WORDS:
            self._memo.clear()
            new = list(set().union(*words))
        self._memo.update(zip(new, self._encode(new, self._of_words), strict=True))
        encoded = [b"".join(map(self._memo.__getitem__, of_text)) for of_text in words]
        shortest = min(range(len(texts)), key=lambda number: len(texts[number]))
        if self._encode([texts[shortest]])[0] != encoded[shortest]:
            raise UserError(f"the words of {texts[shortest][:80]!r} have other tokens than the text; report this bug.")
        return encoded

    def _encode(self, texts: list[str], backend: Tokenizer | None = None) -> list[bytes]:
        backend = backend or self.backend
        backend.encode_special_tokens = True  # no part of what is pickled
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        code = {2: "H", 4: "I"}[np.dtype(self.dtype).itemsize]  # for a few ids an array is faster than numpy
        return [array(code, encoding.ids).tobytes() for encoding in encodings]


def never_joins_over_spaces(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is known to give no token that reaches from a word over a space."""
    model, normalizers = definition["model"], _steps(definition["normalizer"], "normalizers")
    pre_tokenizers = _steps(definition["pre_tokenizer"], "pretokenizers")
    if model["type"] != "BPE" or model["dropout"] or not all(token["special"] for token in definition["added_tokens"]):
        return False
    if normalizers in ([_SPACE], [_PREFIX, _SPACE]) and not pre_tokenizers:
        return "▁" in model["vocab"] and not any("▁" in piece.lstrip("▁") for piece in model["vocab"])
    return all(step["type"] == "NFC" for step in normalizers) and _is_byte_level(pre_tokenizers)


def _is_byte_level(pre_tokenizers: list[dict[str, Any]]) -> bool:
    if not pre_tokenizers or pre_tokenizers[-1]["type"] != "ByteLevel" or pre_tokenizers[-1]["add_prefix_space"]:
        return False
    before = pre_tokenizers[:-1]
    by_pattern = len(before) == 1 and _is_known_split(before[0])
    only_digits = all(step["type"] == "Digits" for step in before)
    return by_pattern or (only_digits and bool(pre_tokenizers[-1]["use_regex"]))


def _is_known_split(step: dict[str, Any]) -> bool:
    return (
        step["type"] == "Split"
        and step["pattern"].get("Regex") in _PATTERNS
        and step["behavior"] == "Isolated"
        and not step["invert"]
    )


def _steps(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """A sequence's steps, or the one step, or none."""
    if step is None:
        return []
    return list(step[name]) if step["type"] == "Sequence" else [step]
