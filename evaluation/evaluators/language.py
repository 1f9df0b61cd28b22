"""Held-out bits per byte: a loss that is comparable across tokenizers.

    bits per byte = sum over documents of  sum_i -log2 p(x_i | x_w .. x_{i-1})
                    / sum over documents of UTF-8 bytes

x_1 .. x_n are a document's tokens in the model's own tokenizer, without special tokens. x_0 is bos
(or eos, if the tokenizer has no bos), which is given and not predicted. Windows of `context` tokens
follow each other, and each token is predicted once: w = context * floor((i - 1) / context), so the
first token of a window sees one token and the last one sees `context`. This is lm-eval's
`loglikelihood_rolling`. The end of the document is not predicted, since it depends on how the text
was cut.

The window is counted in tokens, so longer tokens let the model see more text. That is part of a
tokenizer's quality, and matters only for documents longer than the window.

Training has validation bits per byte, which differ (`training/callbacks/evaluate.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.evaluation.chunked_logits import token_losses
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Exchange
from cpt_merge.evaluation.evaluators.evaluator import (
    Evaluator,
    Findings,
    Measurement,
    Metric,
    NotRun,
    Subject,
)
from cpt_merge.evaluation.models import DEFAULT_CONTEXT, LanguageModel, batches_by_length

BITS = "bits_per_byte"
METRIC = Metric(BITS, "bits/byte", "held-out bits per byte", rising=False, share=False)
DAMAGED = NotRun(BITS, "the model's probabilities are not finite: its weights are damaged")


@dataclass(frozen=True)
class DocumentBits:
    """What one document costs a model."""

    bits: float
    bytes: int
    tokens: int
    unknown: int  # unk tokens


@dataclass(frozen=True)
class Window:
    """Input tokens, and the token to predict at each place."""

    document: int
    inputs: list[int]
    targets: list[int]


class LanguageEvaluator(Evaluator):
    """Bits per byte of held-out text in each language. It needs text and no replies."""

    name = "language"
    metrics = (METRIC,)

    def __init__(self, config: EvaluationConfig, documents: Mapping[str, list[str]]) -> None:
        super().__init__()
        self._config, self._documents = config, documents

    @property
    def asked(self) -> Any:
        """The documents, and how much of them is seen at once."""
        return {"documents": self._documents, "context": self._config.context}

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """The metric in each language; the amounts of text are details under `text`."""
        measurements, text, damaged = [], {}, False
        for language, texts in self._documents.items():
            label = f"{subject.model.name}: bits per byte, {language}"
            found = measure_documents(subject.model, texts, self._config, subject.ranks, label)
            parts = {unit: (one.bits, float(one.bytes)) for unit, one in enumerate(found)}
            if all(math.isfinite(document.bits) for document in found):
                measurements.append(Measurement(METRIC, language, parts))
            else:
                damaged = True
            tokens, unknown = (
                sum(getattr(one, name) for one in found) for name in ("tokens", "unknown")
            )
            text[language] = {
                "documents": len(found),
                "bytes": sum(document.bytes for document in found),
                "tokens": tokens,
                "unknown_tokens": unknown,
            }
            if unknown:
                token = subject.model.tokenizer.unk_token
                say(
                    f"{label}: {unknown / tokens:.1%} of the tokens are {token}, which stands for "
                    "any text, so the value is too low to be compared"
                )
        return Findings(measurements, not_run=[DAMAGED] * damaged, details={"text": text})


def measure_documents(
    model: LanguageModel,
    documents: Sequence[str],
    config: EvaluationConfig,
    ranks: Ranks,
    label: str,
) -> list[DocumentBits]:
    """The cost of every document, on every process.

    Raises `UserError` if the tokenizer has neither bos nor eos.
    """
    first, context = _first_token(model), config.context or DEFAULT_CONTEXT
    tokens = [model.encode(text) for text in documents]
    windows = [
        window
        for place, ids in enumerate(tokens)
        for window in cut_windows(place, ids, first, context)
    ]
    at_once = max(1, config.batch_size * DEFAULT_CONTEXT // max(context, DEFAULT_CONTEXT))
    batches = batches_by_length([len(window.inputs) for window in windows], at_once)
    measured = ranks.map(
        label, lambda batch: window_bits(model, [windows[place] for place in batch]), batches
    )
    bits = [0.0] * len(windows)
    for batch, values in zip(batches, measured, strict=True):
        for place, value in zip(batch, values, strict=True):
            bits[place] = value
    totals = [0.0] * len(documents)
    for window, value in zip(windows, bits, strict=True):  # always added in the same order
        totals[window.document] += value
    unk = model.tokenizer.unk_token_id
    return [
        DocumentBits(total, len(text.encode()), len(ids), ids.count(unk))
        for total, text, ids in zip(totals, documents, tokens, strict=True)
    ]


def _first_token(model: LanguageModel) -> int:
    """x_0: bos, or eos if the tokenizer has no bos."""
    for token in (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        f"model {model.name}: its tokenizer has neither bos nor eos, so the first token of a "
        "document has no context; set one of them."
    )


def cut_windows(document: int, tokens: list[int], first: int, context: int) -> list[Window]:
    """The windows of one document; every token is predicted once."""
    given = [first, *tokens[:-1]]
    return [
        Window(document, given[start : start + context], tokens[start : start + context])
        for start in range(0, len(tokens), context)
    ]


@torch.inference_mode()
def window_bits(model: LanguageModel, windows: Sequence[Window]) -> list[float]:
    """The sum of -log2 p over each window's targets."""
    longest = max(len(window.inputs) for window in windows)
    # padding on the right: causal attention never sees it
    lengths = [len(window.inputs) for window in windows]
    inputs = [window.inputs + [0] * (longest - len(window.inputs)) for window in windows]
    mask = [[1] * length + [0] * (longest - length) for length in lengths]
    nats = token_losses(
        model.loaded,
        torch.tensor(inputs, device=model.device),
        torch.tensor(mask, device=model.device),
        torch.tensor([one for window in windows for one in window.targets], device=model.device),
    )
    return [
        float(of_window.double().sum()) / math.log(2) for of_window in torch.split(nats, lengths)
    ]
