"""Measures the steps that prepare text, on generated documents.

    python -m benchmarks.preparation [--documents 2000] [--clustered 2000000]

A document is 400 words (English, Korean) or 1,000 letters (Chinese) in 20 lines. Prints documents
per second of one process for each step, and time and memory of clustering so many signatures.
"""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Callable
from typing import get_args

import numpy as np
import typer

from cpt_merge.core.languages import find_language
from cpt_merge.data.minhash import signatures
from cpt_merge.data.near_duplicates import cluster_firsts
from cpt_merge.data.parts import Column
from cpt_merge.data.preparation.filters import Filtering, QualityFilter
from cpt_merge.data.preparation.notes import Notes
from cpt_merge.data.preparation.personal_data import PersonalData, Replacement
from cpt_merge.data.preparation.steps import Conversion, Preparation, Step

LETTERS = {
    "en": "abcdefghijklmnopqrstuvwxyz",
    "ko": "".join(map(chr, range(0xAC00, 0xAC00 + 2000))),
    "zh_tw": "".join(map(chr, range(0x4E00, 0x4E00 + 3000))),
}
LINES, ROUNDS = 20, 3


def main(documents: int = 2000, clustered: int = 2_000_000) -> None:
    """Print all results as JSON."""
    rates = {language: _rates(generated(language, documents), language) for language in LETTERS}
    print(json.dumps({"documents per second": rates, "clustering": cluster(clustered)}, indent=2))


def generated(language: str, documents: int) -> list[str]:
    """Documents of random words; a few words are frequent, as in real text."""
    generator = random.Random(language)
    has_spaces = find_language(language).has_spaces
    lengths = range(2, 9) if language == "en" else range(1, 4)
    words = [
        "".join(generator.choices(LETTERS[language], k=generator.choice(lengths)))
        for _ in range(20_000)
    ]
    frequency = [1 / rank for rank in range(1, len(words) + 1)]
    joined, end = (" ", ".") if has_spaces else ("", "。")
    of_line = 20 if has_spaces else 25
    return [
        "\n".join(
            joined.join(generator.choices(words, frequency, k=of_line)) + end for _ in range(LINES)
        )
        for _ in range(documents)
    ]


def _rates(texts: list[str], language: str) -> dict[str, int]:
    steps: dict[str, list[Step]] = {
        "nothing": [],
        "personal data, all kinds": [Replacement(get_args(PersonalData))],
        "filters": [Filtering(QualityFilter(language=language).thresholds())],
    }
    if language == "zh_tw":
        steps["convert: s2twp"] = [Conversion("s2twp")]
    rates = {}
    for name, some in steps.items():
        prepare = Preparation("NFC", some)
        rates[name] = _rate(lambda prepare=prepare: [prepare(one, Notes()) for one in texts], texts)  # type: ignore[misc]
    rates["near-duplicates: signatures"] = _rate(lambda: signatures(texts, language), texts)
    return rates


def _rate(work: Callable[[], object], texts: list[str]) -> int:
    """Documents per second of processor time, the best of some rounds."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return round(len(texts) / min(seconds))


def cluster(documents: int) -> dict[str, float]:
    """Seconds and bytes per document to cluster signatures, of which a tenth occurred before."""
    originals = documents * 9 // 10

    def column(number: int) -> Column:
        numbers = np.random.default_rng(number).integers(0, 2**32, originals, np.uint32)
        return np.concatenate([numbers, numbers[: documents - originals]])

    before, start = _peak(), time.perf_counter()
    firsts = cluster_firsts(column, documents, 0.8)
    seconds = time.perf_counter() - start
    left_out = int((firsts != np.arange(documents)).sum())
    return {
        "documents": documents,
        "left out": left_out,
        "seconds": round(seconds, 1),
        "bytes per document": round((_peak() - before) / documents),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    typer.run(main)
