"""Replies, generated in batches of prompts of like length; conversations are answered turn by turn.

All conversations that have a first turn are answered together, then all that have a second, ..., so
that batches stay full. Batches are formed before they are divided over the processes, so no reply
depends on how many there are.
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
from cpt_merge.core.progress import say
from cpt_merge.evaluation.chat_template import ChatTemplate, render
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Conversation, Exchange, Message, Reply
from cpt_merge.evaluation.generate.batching import batches_by_length
from cpt_merge.evaluation.models import LoadedModel

BLANK_ENDS = regex.compile(
    r"\A[\s\u200b\u2060\ufeff]+|[\s\u200b\u2060\ufeff]+\Z"
)  # white space, also without any width
TURN_SEEDS = (
    10_007  # more than there are batches; tells the batches of one turn from those of the next
)


@dataclass(frozen=True)
class Generation:
    """What a model answered to all conversations, and how fast."""

    exchanges: list[Exchange]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, over all processes; 0 where nothing was asked."""
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

    The model's own replies go into the next turn.
    """
    histories: list[list[Message]] = [[] for _ in conversations]
    replies: list[list[Reply]] = [[] for _ in conversations]
    start = time.monotonic()
    for turn in range(max((len(conversation.turns) for conversation in conversations), default=0)):
        places = [
            place
            for place, conversation in enumerate(conversations)
            if turn < len(conversation.turns)
        ]
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

    A prompt that leaves no room in the model's positions is not answered: its reply is empty and
    did not stop.
    """
    ids = [loaded.encode(prompt) for prompt in prompts]
    room = [min(config.max_new_tokens, loaded.positions - len(prompt)) for prompt in ids]
    answerable = [place for place, tokens in enumerate(room) if tokens > 0]
    if len(answerable) < len(ids):
        unanswered = len(ids) - len(answerable)
        say(
            f"{loaded.name}: prompts that fill its {loaded.positions} positions and are not answered: {unanswered}"
        )
    stop_ids = loaded.tokenizer.convert_tokens_to_ids(list(ends))
    if not stop_ids:
        say(
            f"{loaded.name}: no token ends its replies (its tokenizer has no eos), so none stops before max_new_tokens"
        )
    lengths = [len(ids[place]) for place in answerable]
    batches = [
        [answerable[place] for place in batch]
        for batch in batches_by_length(lengths, config.batch_size)
    ]

    def answer(batch: list[int]) -> list[Reply]:
        asked, rooms = [ids[place] for place in batch], [room[place] for place in batch]
        return reply_batch(
            loaded, asked, rooms, stop_ids, config, seed=turn * TURN_SEEDS + batch[0]
        )

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
    """Reply to prompts of token ids, padded on the left, each by at most its room's tokens.

    `seed` tells batches apart when replies are sampled.
    """
    longest = max(map(len, prompts))
    inputs = torch.tensor(
        [[0] * (longest - len(ids)) + ids for ids in prompts], device=loaded.device
    )
    mask = torch.tensor(
        [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=loaded.device
    )
    torch.manual_seed(config.seed * 1_000_003 + seed)
    settings = generation_settings(config, stop_ids, max(rooms))
    with _without_own_settings(loaded.model):
        output = loaded.model.generate(
            input_ids=inputs, attention_mask=mask, generation_config=settings
        )
    rows = output[:, longest:].tolist()
    return [
        _reply(loaded, row[:room], set(stop_ids)) for row, room in zip(rows, rooms, strict=True)
    ]


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """`generate` takes from the model's own `generation_config` whatever it is not told, such as `min_new_tokens`."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def generation_settings(
    config: EvaluationConfig, stop_ids: list[int], new_tokens: int
) -> GenerationConfig:
    """The same for every model."""
    sampling = (
        {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        if config.temperature > 0
        else {}
    )
    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=config.temperature > 0,
        **sampling,
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
