"""Replies of a model in memory, generated in batches of prompts of similar length.

Conversations are answered turn by turn: all first turns together, then all second ones, and so on,
so that batches stay full. Batches are formed before they are divided over the processes, so no
reply depends on the number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import regex
import torch
from transformers import GenerationConfig

from cpt_merge.core.distributed import Ranks
from cpt_merge.core.progress import counted, say
from cpt_merge.evaluation.chat_template import ChatTemplate, render
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Conversation, Exchange, Message, Reply
from cpt_merge.evaluation.models import LoadedModel, batches_by_length

# white space at either end, including characters of no width
BLANK_ENDS = regex.compile(r"\A[\s\u200b\u2060\ufeff]+|[\s\u200b\u2060\ufeff]+\Z")
TURN_SEEDS = 10_007  # more than there are batches, so that two turns share no seed


@dataclass(frozen=True)
class Generation:
    """A model's replies to all conversations, and the time that they took."""

    exchanges: list[Exchange]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, over all processes."""
        tokens = sum(reply.tokens for exchange in self.exchanges for reply in exchange.replies)
        return tokens / max(self.seconds, 1e-9)


def converse(
    loaded: LoadedModel,
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    config: EvaluationConfig,
    ranks: Ranks,
) -> Generation:
    """Answer every turn of every conversation, on every process.

    The model sees its own earlier replies.
    """
    histories: list[list[Message]] = [[] for _ in conversations]
    replies: list[list[Reply]] = [[] for _ in conversations]
    start = time.monotonic()
    for turn in range(max((len(one.turns) for one in conversations), default=0)):
        places = [place for place, one in enumerate(conversations) if turn < len(one.turns)]
        for place in places:
            histories[place] += conversations[place].turns[turn].messages
        prompts = [
            render(loaded.tokenizer, template.template, histories[place]) for place in places
        ]
        found = generate(loaded, prompts, template.end_tokens, config, ranks, turn)
        for place, reply in zip(places, found, strict=True):
            replies[place].append(reply)
            histories[place].append({"role": "assistant", "content": reply.text})
    exchanges = [Exchange(*pair) for pair in zip(conversations, map(tuple, replies), strict=True)]
    return Generation(exchanges, time.monotonic() - start)


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    ends: Sequence[str],
    config: EvaluationConfig,
    ranks: Ranks,
    turn: int = 0,
) -> list[Reply]:
    """Reply to rendered prompts, on every process. `ends` are the tokens that end a reply.

    A prompt that fills the model's positions gets an empty reply that did not stop.
    """
    ids = [loaded.encode(prompt) for prompt in prompts]
    room = [min(config.max_new_tokens, loaded.positions - len(prompt)) for prompt in ids]
    answerable = [place for place, tokens in enumerate(room) if tokens > 0]
    if unanswered := len(ids) - len(answerable):
        say(
            f"{loaded.name}: no reply to {counted(unanswered, 'prompt')} as long as its "
            f"{loaded.positions} positions"
        )
    stop_ids = loaded.tokenizer.convert_tokens_to_ids(list(ends))
    if not stop_ids:
        say(
            f"{loaded.name}: its tokenizer has no eos, so no token ends a reply and none stops "
            "before max_new_tokens"
        )
    batches = [
        [answerable[place] for place in batch]
        for batch in batches_by_length([len(ids[one]) for one in answerable], config.batch_size)
    ]

    def answer(batch: list[int]) -> list[Reply]:
        asked, rooms = [ids[place] for place in batch], [room[place] for place in batch]
        seed = turn * TURN_SEEDS + batch[0]
        return reply_batch(loaded, asked, rooms, stop_ids, config, seed)

    label = f"{loaded.name}: replies" + (f", turn {turn + 1}" if turn else "")
    replies = [Reply("", stopped=False, tokens=0)] * len(prompts)
    for batch, found in zip(batches, ranks.map(label, answer, batches), strict=True):
        for place, reply in zip(batch, found, strict=True):
            replies[place] = reply
    return replies


@torch.inference_mode()
def reply_batch(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    rooms: Sequence[int],
    stop_ids: list[int],
    config: EvaluationConfig,
    seed: int,
) -> list[Reply]:
    """Reply to prompts of token ids, padded on the left, each with at most its room's tokens.

    `seed` distinguishes batches when replies are sampled.
    """
    longest = max(map(len, prompts))
    padding = [longest - len(ids) for ids in prompts]
    inputs = [[0] * pad + ids for pad, ids in zip(padding, prompts, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
    torch.manual_seed(config.seed * 1_000_003 + seed)
    settings = generation_settings(config, stop_ids, max(rooms))
    with _without_own_settings(loaded.model):
        output = loaded.model.generate(
            input_ids=torch.tensor(inputs, device=loaded.device),
            attention_mask=torch.tensor(mask, device=loaded.device),
            generation_config=settings,
        )
    rows = output[:, longest:].tolist()
    return [
        _reply(loaded, row[:room], set(stop_ids)) for row, room in zip(rows, rooms, strict=True)
    ]


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
    config: EvaluationConfig, stop_ids: list[int], new_tokens: int
) -> GenerationConfig:
    """The same settings for every model."""
    sampled = config.temperature > 0
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=sampled,
        **(sampling if sampled else {}),
        repetition_penalty=config.repetition_penalty,
        eos_token_id=stop_ids or None,
        pad_token_id=stop_ids[0] if stop_ids else None,
    )


def _reply(loaded: LoadedModel, ids: list[int], stop_ids: set[int]) -> Reply:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    text = loaded.tokenizer.decode(
        ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return Reply(BLANK_ENDS.sub("", text), end is not None, len(ids) if end is None else end + 1)
