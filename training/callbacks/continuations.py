"""Greedy continuations: of held-out text, to read beside the loss, and of chat prompts (`training/preview.py`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cpt_merge.core.progress import say
from cpt_merge.data.store import Store

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
        lengths = (
            np.diff(documents.starts) - 1
        )  # without eos: what ends with it has nothing to be continued
        for number in np.flatnonzero(lengths > tokens)[: count - len(prompts)]:
            first = documents.starts[number]
            prompts.append(
                Prompt(source.language, documents.tokens[first : first + tokens].tolist())
            )
    for language, prompts in found.items():
        if len(prompts) < count:
            say(
                f"{language}: {len(prompts)} of {count} held-out documents to continue are longer than {tokens} tokens"
            )
    return [prompt for prompts in found.values() for prompt in prompts]


@torch.no_grad()
def continue_greedily(
    logits_of: Callable[[Tensor, Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: Collection[int],
    agree: Callable[[Tensor], Tensor],
) -> list[list[int]]:
    """The `new_tokens` most likely next tokens of each prompt, one by one, up to and with the first of `ends`.

    `logits_of(ids, last)` gives the logits [rows, vocabulary] after place `last[row]` of input ids [rows, length],
    int64 on the CPU. Rows are padded on the right, where causal attention never looks. All processes call this with
    the same prompts; `agree` makes the first one's choice everybody's, since logits that differ in the last bit would
    let processes part, and wait for each other forever.
    """
    if not prompts:
        return []
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros((len(prompts), int(lengths.max()) + new_tokens), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(list(prompt))
    rows, going_on = torch.arange(len(prompts)), torch.ones(len(prompts), dtype=torch.bool)
    for number in range(new_tokens):
        last = lengths + number - 1
        following = agree(logits_of(ids[:, : int(last.max()) + 1], last).argmax(dim=-1).cpu())
        ids[rows, last + 1] = following
        going_on &= ~torch.isin(following, torch.tensor(list(ends), dtype=torch.int64))
        if not going_on.any():
            break
    continued = [
        row[length : length + number + 1]
        for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)
    ]
    return [_until(row, ends) for row in continued]


def _until(tokens: list[int], ends: Collection[int]) -> list[int]:
    """Up to and with the first of `ends`."""
    place = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: place + 1]


def continuation_rows(
    step: int,
    prompts: Sequence[Prompt],
    continuations: Sequence[list[int]],
    decode: Callable[[list[int]], str],
) -> list[list[str | float]]:
    """Rows of a table with `COLUMNS`."""
    pairs = zip(prompts, continuations, strict=True)
    return [
        [step, prompt.language, decode(prompt.ids), decode(following)]
        for prompt, following in pairs
    ]
