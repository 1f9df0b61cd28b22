"""Bits per byte of held-out text: a loss that can be compared across tokenizers (law 10).

    bits per byte = sum over documents of  sum_i -log2 p(x_i | x_w .. x_{i-1})   /   sum over documents of UTF-8 bytes

x_1 .. x_n are a document's tokens in the model's own tokenizer, without special tokens; x_0 is bos
(eos where a tokenizer has no bos), which is given and not predicted. Windows of `context` tokens
follow each other without overlap of what is predicted: w = context * floor((i - 1) / context), so
the first token of a window sees one token and the last sees `context`. That is lm-eval's
`loglikelihood_rolling`. The end of the document is not predicted: whether a text ends is a matter
of how it was cut.

The window is counted in tokens, so a tokenizer with longer pieces sees more text in it. That is
part of what it is good for; it matters for documents longer than the context only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
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
from cpt_merge.evaluation.generate.batching import batches_by_length
from cpt_merge.evaluation.models import LoadedModel

BITS = "bits_per_byte"
METRIC = Metric(BITS, "bits/byte", "bits per byte of held-out text", rising=False, share=False)


@dataclass(frozen=True)
class DocumentBits:
    """What one document costs a model."""

    bits: float
    bytes: int
    tokens: int
    unknown: int  # tokens that stand for what the tokenizer does not know


@dataclass(frozen=True)
class Window:
    """Tokens given and, for each place, the token to predict."""

    document: int
    inputs: list[int]
    targets: list[int]


class LanguageEvaluator(Evaluator):
    """Bits per byte of held-out text in each language. Needs text, and no replies."""

    name = "language"
    metrics = (METRIC,)

    def __init__(self, config: EvaluationConfig, documents: Mapping[str, list[str]]) -> None:
        self._config, self._documents = config, documents

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """The metric in each language; what it rests on goes into results.json as `text`."""
        measured, text, not_run = [], {}, dict[NotRun, None]()
        for language, texts in self._documents.items():
            label = f"{subject.loaded.name}: bits per byte, {language}"
            found = measure_documents(subject.loaded, texts, self._config, subject.ranks, label)
            parts = {
                unit: (document.bits, float(document.bytes)) for unit, document in enumerate(found)
            }
            if all(math.isfinite(document.bits) for document in found):
                measured.append(Measurement(METRIC, language, parts))
            else:
                not_run[
                    NotRun(
                        BITS, "the model's probabilities are not finite: its weights are damaged"
                    )
                ] = None
            text[language] = {
                "documents": len(found),
                "bytes": sum(document.bytes for document in found),
                "tokens": sum(document.tokens for document in found),
                "unknown_tokens": sum(document.unknown for document in found),
            }
            if unknown := sum(document.unknown for document in found):
                share = unknown / sum(document.tokens for document in found)
                token = subject.loaded.tokenizer.unk_token
                say(
                    f"{label}: {share:.1%} of the tokens are {token}, whatever they stand for: too low to be compared"
                )
        return Findings(measured, not_run=list(not_run), details={"text": text})


def measure_documents(
    loaded: LoadedModel,
    documents: Sequence[str],
    config: EvaluationConfig,
    ranks: Ranks,
    label: str,
) -> list[DocumentBits]:
    """The cost of every document, on every process.

    Raises `UserError` if the tokenizer has neither bos nor eos.
    """
    first = first_token(loaded)
    tokens = [loaded.encode(text) for text in documents]
    windows = [
        window
        for place, ids in enumerate(tokens)
        for window in cut_windows(place, ids, first, config.context)
    ]
    batches = batches_by_length([len(window.inputs) for window in windows], config.batch_size)
    bits = [0.0] * len(windows)
    measured = ranks.map(
        label, lambda batch: window_bits(loaded, [windows[place] for place in batch]), batches
    )
    for batch, values in zip(batches, measured, strict=True):
        for place, value in zip(batch, values, strict=True):
            bits[place] = value
    totals = [0.0] * len(documents)
    for window, value in zip(windows, bits, strict=True):
        totals[window.document] += value
    sizes = [len(text.encode()) for text in documents]
    unknown = [ids.count(loaded.tokenizer.unk_token_id) for ids in tokens]
    return [
        DocumentBits(*parts) for parts in zip(totals, sizes, map(len, tokens), unknown, strict=True)
    ]


def first_token(loaded: LoadedModel) -> int:
    """x_0: bos, or eos where the tokenizer has no bos."""
    for token in (loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        f"model {loaded.name}: its tokenizer has neither bos nor eos, so the first token has no context."
    )


def cut_windows(document: int, tokens: list[int], first: int, context: int) -> list[Window]:
    """The windows of one document: every token is predicted once."""
    given = [first, *tokens[:-1]]
    return [
        Window(document, given[start : start + context], tokens[start : start + context])
        for start in range(0, len(tokens), context)
    ]


@torch.inference_mode()
def window_bits(loaded: LoadedModel, windows: Sequence[Window]) -> list[float]:
    """-log2 p of each window's targets, summed."""
    longest = max(len(window.inputs) for window in windows)
    # on the right, where causal attention never looks back at it
    inputs = torch.tensor(
        [window.inputs + [0] * (longest - len(window.inputs)) for window in windows]
    )
    mask = torch.tensor(
        [[1] * len(window.inputs) + [0] * (longest - len(window.inputs)) for window in windows]
    )
    logits = loaded.model(
        input_ids=inputs.to(loaded.device), attention_mask=mask.to(loaded.device)
    ).logits
    bits = []
    for row, window in zip(
        logits, windows, strict=True
    ):  # by row: float32 logits of a whole batch may not fit
        targets = torch.tensor(window.targets, device=loaded.device)
        nats = F.cross_entropy(row[: len(window.targets)].float(), targets, reduction="none")
        bits.append(float(nats.double().sum()) / math.log(2))
    return bits
