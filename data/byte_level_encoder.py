r"""Byte-level BPE with tiktoken: the ids of the tokenizers library in a fraction of the time.

tiktoken merges the neighbours whose joined bytes have the lowest rank; the tokenizers library
merges the pair that comes first in its list. Both give the same ids if the rank of a token is the
position of its merge, and only tokens have a rank to which their own bytes are merged. Proof: let x
and y be neighbours that together spell such a token t, without being a listed pair. The merges of
t's bytes alone lead to t, so at some point they join two pieces across the border between x and y.
The same two pieces stood in the text at the same point and would have been joined, so x and y
cannot exist.

Long texts are cut in front of a space or mark between two letters: every pattern ends a word there.

The two libraries know different versions of Unicode. Texts with a character about which they may
disagree (`is_settled`), and texts with a run that tiktoken's regular expressions cannot process,
are left to the tokenizers library.
"""

from __future__ import annotations

import itertools
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
_LETTER = "[A-Za-z가-힣一-鿿]"  # letters in every version of Unicode, also after normalisation
BORDER = re.compile(rf"(?<={_LETTER})(?=[ \n,.;:!?。，、；：！？]{_LETTER})")
RUN = re.compile(r"\s{100000}|\S{100000}")  # tiktoken fails at a million
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
# GPT-2's pattern between digits, which are words of their own (SmolLM): text ends before a digit
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


@dataclass
class ByteLevelEncoder:
    """Encodes texts with tiktoken."""

    pattern: str
    ranks: dict[bytes, int]  # of every token that merges lead to; bytes come first
    ids: Any  # array: rank -> id
    library: LibraryEncoder
    settled: set[str] = field(default_factory=set)  # of the characters seen so far
    unsettled: set[str] = field(default_factory=set)

    @staticmethod
    def of(definition: Mapping[str, Any], library: LibraryEncoder) -> ByteLevelEncoder | None:
        """None unless a tokenizer.json proves that tiktoken gives the same ids."""
        model, pattern = definition["model"], pattern_of(definition)
        if pattern is None or not _is_plain(model):
            return None
        merged = _merged(model)
        vocabulary = model["vocab"]
        needed = {LETTERS[byte] for byte in range(256) if byte not in NEVER_IN_UTF8}
        letters = [LETTERS[byte] for byte in range(256) if LETTERS[byte] in vocabulary]
        if merged is None or not needed <= vocabulary.keys():
            return None
        proper = _proper(model, merged, library.backend)
        pieces = [*letters, *proper]
        if model["ignore_merges"] and not _are_cut(
            vocabulary.keys() - set(pieces), library.backend
        ):
            return None
        ids = np.array([vocabulary[piece] for piece in pieces], library.dtype)
        ranks = {to_bytes(piece): rank for rank, piece in enumerate(pieces)}
        return ByteLevelEncoder(pattern, ranks, ids, library)

    @property
    def border(self) -> re.Pattern[str]:
        """See `Shortcut`."""
        return BORDER

    def encode_parts(self, parts: list[str]) -> bytes:
        """See `Shortcut`."""
        return b"".join(self.encode([part])[0] for part in parts)

    @cached_property
    def by_tiktoken(self) -> tiktoken.Encoding:
        """tiktoken's encoding, whose ids are positions in `ids`."""
        return tiktoken.Encoding(
            "", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={}
        )

    def encode(self, texts: list[str]) -> list[bytes]:
        """See `TextEncoder`."""
        for character in set().union(*texts) - self.settled - self.unsettled:
            (self.settled if is_settled(character) else self.unsettled).add(character)
        left = [self._is_left(text) for text in texts]
        by_library = iter(self.library.encode(list(itertools.compress(texts, left))))
        return [
            next(by_library) if is_left else self._encode(text)
            for text, is_left in zip(texts, left, strict=True)
        ]

    def _encode(self, text: str) -> bytes:
        normalizer = self.library.backend.normalizer  # NFC, or none
        if normalizer is not None and not unicodedata.is_normalized("NFC", text):
            text = normalizer.normalize_str(text)
        encoded: bytes = self.ids[self.by_tiktoken.encode_to_numpy(text)].tobytes()
        return encoded

    def _is_left(self, text: str) -> bool:
        is_long = len(text) >= 100_000 and RUN.search(text) is not None
        return is_long or not self.unsettled.isdisjoint(text)


def is_settled(character: str) -> bool:
    """Whether every version of Unicode from 3.2 on puts a character into the same class.

    The classes are letters, digits, spaces and others. New symbols are others, and so are
    characters that a version does not know.
    """
    category, earlier = (u.category(character) for u in (unicodedata, unicodedata.ucd_3_2_0))
    return category[0] in "SP" or (category == earlier and category not in ("Cn", "Cs"))


def pattern_of(definition: Mapping[str, Any]) -> str | None:
    """The regular expression that cuts texts into words, if both libraries cut alike."""
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
    """The products of the merges in order; None if one occurs in two places (it has no rank)."""
    runs = [product for product, _ in itertools.groupby(map("".join, model["merges"]))]
    return runs if len(set(runs)) == len(runs) else None


def _proper(model: Mapping[str, Any], products: list[str], backend: Tokenizer) -> list[str]:
    """The products to which their own bytes are merged; others occur only as whole words."""
    merging = backend.model
    if model["ignore_merges"]:
        merging = models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]])
    return [product for product in products if len(merging.tokenize(product)) == 1]


def _are_cut(pieces: Iterable[str], backend: Tokenizer) -> bool:
    """Whether every piece is cut into several words, so that none is looked up as a whole."""
    return all(
        not BYTES.keys() >= set(piece)
        or len(backend.pre_tokenizer.pre_tokenize_str(to_bytes(piece).decode(errors="replace"))) > 1
        for piece in pieces
    )


def _flat(step: Mapping[str, Any] | None, name: str) -> Iterable[Mapping[str, Any]]:
    """The steps of a sequence, at any depth."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step[name]:
            yield from _flat(inner, name)
    else:
        yield step
