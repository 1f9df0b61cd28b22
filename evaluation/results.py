"""What an evaluation found, and the figures made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.bits_per_byte import DocumentBits
from evaluation.facets import Facets
from evaluation.generate import Reply
from evaluation.intervals import Estimate, mean, ratio
from evaluation.prompts import Prompt

FACETS = ("chat", "stopped", "in_language", "keeps_format", "repetition")
BITS = "bits_per_byte"

Scores = dict[str, dict[str, dict[str, Estimate]]]  # model -> language -> figure


@dataclass(frozen=True)
class Sample:
    """A prompt, a reply, and what was found of it."""

    prompt: Prompt
    reply: Reply
    facets: Facets


@dataclass(frozen=True)
class ModelResult:
    """Everything measured of one model."""

    name: str
    documents: dict[str, list[DocumentBits]]  # by language
    samples: list[Sample]
    tokens_per_second: float  # of generation; 0 where no prompts were given


def score(results: Sequence[ModelResult], seed: int) -> Scores:
    """Every figure of every model and language, with its interval."""
    return {result.name: _score_model(result, seed) for result in results}


def _score_model(result: ModelResult, seed: int) -> dict[str, dict[str, Estimate]]:
    figures: dict[str, dict[str, Estimate]] = {}
    for language, documents in result.documents.items():
        bits, sizes = [document.bits for document in documents], [float(document.bytes) for document in documents]
        figures.setdefault(language, {})[BITS] = ratio(bits, sizes, seed)
    for language in dict.fromkeys(sample.prompt.language for sample in result.samples):
        values = [sample.facets.values() for sample in result.samples if sample.prompt.language == language]
        for facet in FACETS:
            figures.setdefault(language, {})[facet] = mean([value[facet] for value in values], seed)
    return figures


def languages_with(scores: Scores, figure: str) -> list[str]:
    """The languages that a figure was measured in, in order."""
    return list(
        dict.fromkeys(language for model in scores.values() for language, found in model.items() if figure in found)
    )
