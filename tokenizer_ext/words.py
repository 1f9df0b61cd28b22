"""Counted words, held compactly: a Counter of them takes five times the memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SEPARATOR = "\n"  # in no word: runs of a script have no line break, and in the byte alphabet it is another letter
WORDS_IN_A_BLOCK = 1_024


@dataclass(frozen=True)
class Words:
    """Distinct words and how often each occurs, in blocks: the words joined by SEPARATOR, and their frequencies."""

    blocks: list[tuple[str, NDArray[np.int32]]]

    @staticmethod
    def of(counts: Counter[str]) -> Words:
        """Take over `counts`, which is empty afterwards."""
        blocks = []
        while counts:
            taken = [counts.popitem() for _ in range(min(WORDS_IN_A_BLOCK, len(counts)))]
            blocks.append(
                (
                    SEPARATOR.join(word for word, _ in taken),
                    np.array([count for _, count in taken], np.int32),
                )
            )
        return Words(blocks)

    def distinct(self) -> int:
        """How many different words there are."""
        return sum(len(frequencies) for _, frequencies in self.blocks)

    def characters(self) -> Counter[str]:
        """How often each character occurs in the text's words."""
        counts: Counter[str] = Counter()
        for text, frequencies in self.blocks:
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            found, which = np.unique(codes, return_inverse=True)
            sums = np.bincount(which, frequencies[np.cumsum(codes == ord(SEPARATOR))])
            counts.update(
                {
                    chr(code): int(total)
                    for code, total in zip(found.tolist(), sums.tolist(), strict=True)
                }
            )
        del counts[SEPARATOR]
        return counts
