r"""Byte-level BPE by tiktoken: the ids of the tokenizers library in a fraction of its time.

tiktoken merges the neighbours whose joined bytes have the lowest rank; the tokenizers library merges the pair that
comes first in its list. Both give the same if a token's rank is the place of its merge, and only tokens have a rank
that their own bytes are merged to. For let x and y be neighbours that together are such a token t, but no listed pair:
the merges of t's bytes alone, which do lead to t, join at some point two pieces across the border between x and y. Both
pieces stood there in the text as well, at the same point, and would have been joined, so that there were no x and y.

The two know different versions of Unicode. So texts with a character about which they may not agree (`is_settled`), and
texts with a run that tiktoken's regular expressions cannot take, are left to the tokenizers library.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer, models

from cpt_merge.core.byte_alphabet import BYTES, LETTERS, to_bytes
from cpt_merge.data.encoders import LibraryEncoder

NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
RUN = re.compile(r"\s{100000}|\S{100000}")  # tiktoken's expressions give up at a million
_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3, QWEN = (_START + numbers + _END for numbers in (r"\p{N}{1,3}", r"\p{N}"))
_MARKED = r"\p{Lt}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}{_MARKED}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}{_MARKED}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's between digits, each of which stands alone (SmolLM): for it, the text ends in front of a digit
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


@dataclass
class ByteLevelEncoder:
    """Turns texts into the bytes of their token ids."""

    pattern: str
    ranks: dict[bytes, int]  # of every token that merges lead to; a byte's come first
    ids: Any  # array: rank -> id
    library: LibraryEncoder
    settled: set[str] = field(default_factory=set)  # of the characters met so far
    unsettled: set[str] = field(default_factory=set)

    @staticmethod
    def of(definition: Mapping[str, Any], library: LibraryEncoder) -> ByteLevelEncoder | None:
        """None where a tokenizer.json is not known to be reproduced exactly."""
        model, pattern = definition["model"], pattern_of(definition)
        if pattern is None or not _is_plain(model):
            return None
        merged = _merged(model)
        letters = [
            LETTERS[byte]
            for byte in range(256)
            if byte not in NEVER_IN_UTF8 or LETTERS[byte] in model["vocab"]
        ]
        if merged is None or not all(letter in model["vocab"] for letter in letters):
            return None
        proper = _proper(model, merged, library.backend)
        if model["ignore_merges"] and not _are_cut(
            model["vocab"].keys() - {*proper, *letters}, library.backend
        ):
            return None
        pieces = [*letters, *proper]
        ids = np.array([model["vocab"][piece] for piece in pieces], library.dtype)
        return ByteLevelEncoder(
            pattern, {to_bytes(piece): rank for rank, piece in enumerate(pieces)}, ids, library
        )

    @cached_property
    def _tiktoken(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            "", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={}
        )

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text."""
        for character in set().union(*texts) - self.settled - self.unsettled:
            (self.settled if is_settled(character) else self.unsettled).add(character)
        left = [number for number, text in enumerate(texts) if self._is_left(text)]
        by_library = dict(
            zip(left, self.library.encode([texts[number] for number in left]), strict=True)
        )
        return [
            by_library[number] if number in by_library else self._encode(text)
            for number, text in enumerate(texts)
        ]

    def _encode(self, text: str) -> bytes:
        normalizer = self.library.backend.normalizer  # NFC, or none
        if normalizer is not None and not unicodedata.is_normalized("NFC", text):
            text = normalizer.normalize_str(text)
        encoded: bytes = self.ids[self._tiktoken.encode_to_numpy(text)].tobytes()
        return encoded

    def _is_left(self, text: str) -> bool:
        return not self.unsettled.isdisjoint(text) or (
            len(text) >= 100_000 and RUN.search(text) is not None
        )


def is_settled(character: str) -> bool:
    """Whether every version of Unicode from 3.2 on takes a character for a letter, a digit, a space or something else.

    A symbol that is new is no letter, digit or space, and neither is a character that a version does not know.
    """
    category = unicodedata.category(character)
    return category[0] in "SP" or category == unicodedata.ucd_3_2_0.category(character) not in (
        "Cn",
        "Cs",
    )


def pattern_of(definition: Mapping[str, Any]) -> str | None:
    """The regular expression that cuts texts into words, where it is known that both libraries cut alike."""
    steps = list(_flat(definition["pre_tokenizer"], "pretokenizers"))
    normalizers = list(_flat(definition["normalizer"], "normalizers"))
    plain = all(step["type"] == "NFC" for step in normalizers) and all(
        token["special"] for token in definition["added_tokens"]
    )
    if not plain or not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    match [*steps[:-1], steps[-1]["use_regex"]]:
        case [True]:
            return GPT_2
        case [{"type": "Digits", "individual_digits": True}, True]:
            return DIGITS
        case [
            {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": regex}},
            False,
        ]:
            return regex if regex in (LLAMA_3, QWEN, TEKKEN) else None
    return None


def _is_plain(model: Mapping[str, Any]) -> bool:
    extras = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    return model["type"] == "BPE" and not any(model.get(name) for name in extras)


def _merged(model: Mapping[str, Any]) -> list[str] | None:
    """The products of the merges in order; None if one comes twice with others in between (it has no one rank)."""
    adjacent = ["".join(pair) for pair in model["merges"]]
    products = list(dict.fromkeys(adjacent))
    changes = sum(
        product != before for before, product in zip(["", *adjacent], adjacent, strict=False)
    )
    return products if changes == len(products) else None


def _proper(model: Mapping[str, Any], products: list[str], backend: Tokenizer) -> list[str]:
    """The products that their own bytes are merged to; the others are never met but as whole words."""
    merging = backend.model
    if model["ignore_merges"]:
        merging = models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]])
    return [product for product in products if len(merging.tokenize(product)) == 1]


def _are_cut(pieces: Iterable[str], backend: Tokenizer) -> bool:
    """Whether every one of the pieces is cut into several words, so that none is ever looked up as a whole."""
    return all(
        not BYTES.keys() >= set(piece)
        or len(backend.pre_tokenizer.pre_tokenize_str(to_bytes(piece).decode(errors="replace"))) > 1
        for piece in pieces
    )


def _flat(step: Mapping[str, Any] | None, name: str) -> Iterable[Mapping[str, Any]]:
    """The steps of a sequence, however nested."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step[name]:
            yield from _flat(inner, name)
    else:
        yield step
