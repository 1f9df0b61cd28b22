"""Greedy continuations of held-out text, for people to read; the preview continues chat prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from cpt_merge.core.artifact import read_json_lines, write_json_lines
from cpt_merge.core.progress import say
from cpt_merge.data.store import Store
from cpt_merge.tracking import Cell
from cpt_merge.training.callbacks.callback import PeriodicCallback, TrainerView

PROMPT_TOKENS, NEW_TOKENS = 16, 32
COLUMNS = ("step", "language", "prompt", "continuation")


@dataclass(frozen=True)
class Prompt:
    """The beginning of a held-out document, its prefix token included."""

    language: str
    ids: list[int]


def prompts_from(store: Store, count: int, tokens: int) -> list[Prompt]:
    """The first `tokens` tokens of the first `count` longer held-out documents of each language.

    A line says where there are fewer. Languages and documents come in the order of the store, the
    same everywhere.
    """
    found: dict[str, list[Prompt]] = {source.language: [] for source in store.info.sources}
    for source in store.info.sources:
        documents, prompts = store.documents(source, "heldout"), found[source.language]
        lengths = np.diff(documents.starts) - 1  # without eos, which ends a document
        for number in np.flatnonzero(lengths > tokens)[: count - len(prompts)]:
            first = documents.starts[number]
            prompts.append(
                Prompt(source.language, documents.tokens[first : first + tokens].tolist())
            )
    for language, prompts in found.items():
        if len(prompts) < count:
            say(
                f"{language}: {len(prompts)} of {count} held-out documents to continue "
                f"are longer than {tokens} tokens"
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
    """The most likely next tokens of each prompt: `new_tokens`, or up to and with one of `ends`.

    `logits_of(ids, last)` gives the logits [prompts, vocabulary] after place `last[i]` of input ids
    [prompts, length], int64 on the CPU. Rows are padded on the right, where causal attention never
    looks. All processes call this with the same prompts; `agree` makes the first one's choice
    everybody's, since logits that differ in the last bit would let processes part, and wait for
    each other forever.
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


class Continuations(PeriodicCallback):
    """Continues the beginnings of held-out documents, and shows them as a table that grows."""

    name = "continuations"

    @property
    def every(self) -> int:
        """See `PeriodicCallback`."""
        return self.trainer.config.evaluate_every

    def attach(self, trainer: TrainerView) -> None:
        """See `Callback`."""
        super().attach(trainer)
        store, count = trainer.sequences.store, trainer.config.continuations
        self.prompts = prompts_from(store, count, PROMPT_TOKENS)
        self.tokenizer = AutoTokenizer.from_pretrained(
            trainer.inputs.tokenizer, trust_remote_code=False
        )
        self.shown: list[Sequence[Cell]] = []

    @property
    def _table(self) -> Path:
        return self.trainer.out / "continuations.jsonl"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Callback`. The table continues from the rows that the checkpoint knows of."""
        super().load_state_dict(state)
        if self.trainer.parallel.is_main:
            rows = read_json_lines(self._table)
            self.shown = [row for row in rows if row[0] <= self.done_at]

    def look(self) -> bool:
        """See `PeriodicCallback`."""
        trainer = self.trainer
        continued = continue_greedily(
            trainer.backend.logits,
            [prompt.ids for prompt in self.prompts],
            NEW_TOKENS,
            {self.tokenizer.eos_token_id} - {None},
            trainer.parallel.broadcast_tensor,
        )
        if trainer.parallel.is_main and self.prompts:
            self.shown += continuation_rows(
                trainer.state.step, self.prompts, continued, self.tokenizer.decode
            )
            write_json_lines(self._table, self.shown)
            trainer.tracker.table("train/continuations", COLUMNS, self.shown)
        return True
