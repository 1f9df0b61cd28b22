"""Replies from a model in this process, generated in batches of prompts of similar length.

Batches are formed before they are divided over the processes, so no reply depends on the number of
processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Reply
from cpt_merge.evaluation.generate.engine import TURN_SEEDS, Engine, Prompt
from cpt_merge.evaluation.generate.reader import LimitsReached, ReplyReader
from cpt_merge.evaluation.models import LanguageModel, batches_by_length


class TransformersEngine(Engine):
    """Generates by the `generate` of transformers."""

    def start(self) -> None:
        """Load the weights."""
        if self.ranks.works:
            _ = self.model.loaded

    def reply(
        self,
        prompts: Sequence[Prompt],
        reader: ReplyReader,
        config: EvaluationConfig,
        turn: int,
        label: str,
    ) -> list[Reply]:
        """See `Engine.reply`."""
        batches = batches_by_length([len(one.ids) for one in prompts], config.batch_size)

        def answer(batch: list[int]) -> list[Reply]:
            asked = [prompts[place] for place in batch]
            return reply_batch(self.model, reader, asked, config, turn * TURN_SEEDS + batch[0])

        replies: dict[int, Reply] = {}
        for batch, found in zip(batches, self.ranks.map(label, answer, batches), strict=True):
            replies.update(zip(batch, found, strict=True))
        return [replies[place] for place in range(len(prompts))]


@torch.inference_mode()
def reply_batch(
    model: LanguageModel,
    reader: ReplyReader,
    asked: Sequence[Prompt],
    config: EvaluationConfig,
    seed: int,
) -> list[Reply]:
    """Reply to prompts, padded on the left.

    `seed` distinguishes batches when replies are sampled.
    """
    longest = max(len(one.ids) for one in asked)
    padding = [longest - len(one.ids) for one in asked]
    inputs = [[0] * pad + one.ids for pad, one in zip(padding, asked, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
    torch.manual_seed(config.seed * 1_000_003 + seed)
    settings = generation_settings(config, reader.stop_ids, max(one.room for one in asked))
    limits = LimitsReached(reader, longest, [one.begun for one in asked])
    with _without_own_settings(model.loaded):
        output = model.loaded.generate(
            input_ids=torch.tensor(inputs, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([limits]),
        )
    rows = output[:, longest:].tolist()
    return [reader.read(row[: one.room], one.begun) for row, one in zip(rows, asked, strict=True)]


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Replace the model's `generation_config`.

    `generate` would take whatever its caller does not set from there, such as `min_new_tokens`.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def generation_settings(
    config: EvaluationConfig, stop_ids: Sequence[int], new_tokens: int
) -> GenerationConfig:
    """The same settings for every model."""
    sampled = config.temperature > 0
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=sampled,
        **(sampling if sampled else {}),
        repetition_penalty=config.repetition_penalty,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=stop_ids[0] if stop_ids else None,
    )
