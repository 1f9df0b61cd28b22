"""Greedy continuations of held-out text, to read beside the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.progress import say
from training.store import Store

COLUMNS = ("step", "language", "prompt", "continuation")


@dataclass(frozen=True)
class Prompt:
    """The beginning of a held-out document, its prefix token included."""

    language: str
    ids: list[int]


def prompts_from(store: Store, count: int, tokens: int) -> list[Prompt]:
    """The first `tokens` tokens of the first `count` held-out documents of each language that are longer than that.

    A line says where there are fewer. Languages and documents come in the order of the store, the same everywhere.
    """
    found: dict[str, list[Prompt]] = {source.language: [] for source in store.info.sources}
    for source in store.info.sources:
        documents, prompts = store.documents(source, "heldout"), found[source.language]
        lengths = np.diff(documents.starts) - 1  # without eos: what ends with it has nothing to be continued
        for number in np.flatnonzero(lengths > tokens)[: count - len(prompts)]:
            first = documents.starts[number]
            prompts.append(Prompt(source.language, documents.tokens[first : first + tokens].tolist()))
    for language, prompts in found.items():
        if len(prompts) < count:
            say(f"{language}: {len(prompts)} of {count} held-out documents to continue are longer than {tokens} tokens")
    return [prompt for prompts in found.values() for prompt in prompts]


@torch.no_grad()
def continue_greedily(
    logits_of: Callable[[Tensor], Tensor], prompts: Sequence[Sequence[int]], new_tokens: int, end: int
) -> list[list[int]]:
    """The `new_tokens` most likely next tokens of each prompt, one by one, up to and with the first `end`.

    `logits_of` gives the logits [rows, vocabulary] after the last of input ids [rows, length], int64 on the CPU. Rows
    of equal length are taken together, so nothing is padded. All processes call this with the same prompts, and call
    `logits_of` equally often, `new_tokens` times for each length: whether a row has ended is not asked before, since
    processes whose logits differ in the last bit would part there and wait for each other forever.
    """
    continuations: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):
        places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([list(prompts[place]) for place in places], dtype=torch.int64)
        for _ in range(new_tokens):
            following = logits_of(ids).argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, following.to(ids.device)], dim=1)
        for place, row in zip(places, ids[:, length:].tolist(), strict=True):
            continuations[place] = row[: row.index(end) + 1] if end in row else row
    return continuations


def continuation_rows(
    step: int, prompts: Sequence[Prompt], continuations: Sequence[list[int]], decode: Callable[[list[int]], str]
) -> list[list[str | float]]:
    """Rows of a table with `COLUMNS`."""
    pairs = zip(prompts, continuations, strict=True)
    return [[step, prompt.language, decode(prompt.ids), decode(following)] for prompt, following in pairs]
