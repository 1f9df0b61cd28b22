"""Writes text of any length that resembles a given text, to measure how learning scales with it.

A chain walks through the given text: after each character it continues at another place where the
same two characters occur. So two and three successive characters are as frequent as in the given
text, while longer runs are nearly all new, as in real text. Sometimes it jumps to a random place,
which makes pairs that the given text lacks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

LENGTH = 300  # characters per document
CHAINS = 400_000  # at the same time
JUMPS = 0.02  # share of the characters after which a chain jumps


def write_like(source: Path, size: int, out: Path, seed: int = 0) -> None:
    """Write about `size` bytes of text to `out`, one document of LENGTH characters per line."""
    text = np.frombuffer(
        source.read_text(encoding="utf-8").replace("\n", "。").encode("utf-32-le"), np.uint32
    )
    pairs = (text[:-1].astype(np.int64) << 32) | text[1:]
    order = np.argsort(pairs, kind="stable")
    starts = np.searchsorted(pairs[order], pairs, side="left")
    counts = np.searchsorted(pairs[order], pairs, side="right") - starts
    random = np.random.default_rng(seed)
    last = len(pairs) - 2
    bytes_per_character = len(source.read_bytes()) / len(text)
    missing = round(size / bytes_per_character / LENGTH)
    with open(out, "w", encoding="utf-8") as file:
        while missing > 0:
            chains = min(missing, CHAINS)
            place = random.integers(0, last, chains)
            characters = np.empty((chains, LENGTH), np.uint32)
            for step in range(LENGTH):
                chosen = (random.random(chains) * counts[place]).astype(np.int64)
                place = order[starts[place] + chosen] + 1
                jump = random.random(chains) < JUMPS
                place = np.where(jump, random.integers(0, last, chains), np.minimum(place, last))
                characters[:, step] = text[place + 1]
            file.writelines(row.tobytes().decode("utf-32-le") + "\n" for row in characters)
            missing -= chains
