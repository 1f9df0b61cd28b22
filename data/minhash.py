"""MinHash signatures, by which near-duplicate documents are found.

A document is the set of its shingles: all runs of five words, or of five letters in languages that
write no spaces between words. The similarity of two documents is the Jaccard index of their sets
(shared shingles / all shingles of both). The share of equal numbers in two signatures estimates it
without bias, with a standard deviation of at most sqrt(J (1 - J) / PERMUTATIONS) (Broder, 1997;
rensa's variant is Fast Similarity Sketching, arXiv 1704.04370).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from rensa import RMinHash

from cpt_merge.core.languages import find_language
from cpt_merge.data.parts import Signatures

SHINGLE = 5  # words or letters
PERMUTATIONS = 128  # numbers in a signature
SEED = 1
ALGORITHM: int = RMinHash.ALGORITHM_VERSION  # signatures of different ones cannot be compared

_WORD = re.compile(r"\w+")
_STRETCH = 1 << 20  # characters whose shingles are in memory at a time
_BATCH = 64  # documents; rensa starts threads for batches of 256


def signatures(texts: list[str], language: str) -> Signatures:
    """The signatures of documents in one language."""
    has_spaces = find_language(language).has_spaces
    found = np.empty((len(texts), PERMUTATIONS), np.uint32)
    for first in range(0, len(texts), _BATCH):
        batch = texts[first : first + _BATCH]
        if max(map(len, batch)) > _STRETCH:
            rows = [_of_long_text(text, has_spaces) for text in batch]
        else:
            sets = [shingles(text, has_spaces) for text in batch]
            rows = RMinHash.digest_matrix_from_token_sets(sets, PERMUTATIONS, SEED).to_rows()
        found[first : first + len(batch)] = rows
    return found


def shingles(text: str, has_spaces: bool) -> list[str]:
    """The shingles of a text without regard to case and punctuation; at least one."""
    words = _WORD.findall(text.casefold())
    if not words:
        return [text]
    if has_spaces:
        runs = list(map(" ".join, zip(*(words[start:] for start in range(SHINGLE)), strict=False)))
        return runs or [" ".join(words)]
    letters = "".join(words)
    last = max(1, len(letters) - SHINGLE + 1)
    return [letters[start : start + SHINGLE] for start in range(last)]


def _of_long_text(text: str, has_spaces: bool) -> list[int]:
    sketch = RMinHash(PERMUTATIONS, SEED)
    for stretch in _stretches(text):
        sketch.update(shingles(stretch, has_spaces))
    digest: list[int] = sketch.digest()
    return digest


def _stretches(text: str) -> Iterator[str]:
    return (text[start : start + _STRETCH] for start in range(0, len(text), _STRETCH))
