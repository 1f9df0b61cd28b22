"""Replies, generated in batches of prompts of like length."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from evaluation.config import EvaluationConfig
from evaluation.division import Division, batches_by_length
from evaluation.models import LoadedModel


@dataclass(frozen=True)
class Reply:
    """What a model answered. Special tokens are left in the text; the one that ended it is not."""

    text: str
    stopped: bool  # by itself, not by max_new_tokens
    tokens: int  # generated, the end token included


@dataclass(frozen=True)
class Generation:
    """The replies to all prompts, and how fast they came."""

    replies: list[Reply]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, over all processes."""
        return sum(reply.tokens for reply in self.replies) / max(self.seconds, 1e-9)


def generate(
    loaded: LoadedModel, prompts: Sequence[str], ends: Sequence[str], config: EvaluationConfig, division: Division
) -> Generation:
    """Reply to rendered prompts, on every process. `ends` are the tokens that end a reply."""
    ids = [loaded.encode(prompt) for prompt in prompts]
    stop_ids = loaded.tokenizer.convert_tokens_to_ids(list(ends))
    batches = batches_by_length(list(map(len, ids)), config.batch_size)
    start = time.monotonic()
    answered = division.map(
        f"{loaded.name}: replies",
        lambda batch: reply_batch(loaded, [ids[place] for place in batch], stop_ids, config, seed=batch[0]),
        batches,
    )
    replies: list[Reply | None] = [None] * len(prompts)
    for batch, found in zip(batches, answered, strict=True):
        for place, reply in zip(batch, found, strict=True):
            replies[place] = reply
    return Generation([reply for reply in replies if reply], time.monotonic() - start)


@torch.inference_mode()
def reply_batch(
    loaded: LoadedModel, prompts: Sequence[list[int]], stop_ids: list[int], config: EvaluationConfig, seed: int
) -> list[Reply]:
    """Reply to prompts of token ids, padded on the left. `seed` tells batches apart when replies are sampled."""
    longest = max(map(len, prompts))
    inputs = torch.tensor([[stop_ids[0]] * (longest - len(ids)) + ids for ids in prompts], device=loaded.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=loaded.device)
    torch.manual_seed(config.seed * 1_000_003 + seed)
    settings = generation_settings(config, stop_ids)
    output = loaded.model.generate(input_ids=inputs, attention_mask=mask, generation_config=settings)
    return [_reply(loaded, row, set(stop_ids)) for row in output[:, longest:].tolist()]


def generation_settings(config: EvaluationConfig, stop_ids: list[int]) -> GenerationConfig:
    """Every setting spelt out: what is left open is taken from the model's `generation_config.json`."""
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=config.temperature > 0,
        temperature=config.temperature or 1.0,
        top_p=config.top_p,
        top_k=0,
        repetition_penalty=config.repetition_penalty,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
    )


def _reply(loaded: LoadedModel, ids: list[int], stop_ids: set[int]) -> Reply:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    text = loaded.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Reply(text.strip(), end is not None, len(ids) if end is None else end + 1)
