"""Replies of a model in memory, generated in batches of prompts of similar length.

Conversations are answered turn by turn: all first turns together, then all second ones, and so on,
so that batches stay full. Batches are formed before they are divided over the processes, so no
reply depends on the number of processes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from cpt_merge.core.distributed import Ranks
from cpt_merge.core.progress import counted, say
from cpt_merge.evaluation.chat_template import ChatTemplate
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Conversation, Exchange, Message, Reply
from cpt_merge.evaluation.generate.reader import LimitsReached, ReplyLimits, ReplyReader
from cpt_merge.evaluation.models import LoadedModel, batches_by_length
from cpt_merge.evaluation.thoughts import undeclared_mark

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
        prompts = [template.render(loaded.tokenizer, histories[place]) for place in places]
        found = generate(loaded, template, prompts, config, ranks, turn)
        for place, reply in zip(places, found, strict=True):
            replies[place].append(reply)
            histories[place].append(template.turn_of(reply))
    exchanges = [Exchange(*pair) for pair in zip(conversations, map(tuple, replies), strict=True)]
    for line in remarks([one for of_one in replies for one in of_one], template, config):
        say(f"{loaded.name}: {line}")
    return Generation(exchanges, time.monotonic() - start)


def remarks(
    replies: Sequence[Reply], template: ChatTemplate, config: EvaluationConfig
) -> Iterator[str]:
    """What a reader of the metrics should know of how replies ended and thoughts were found."""
    if endless := sum(reply.within_thought for reply in replies):
        yield (
            f"{endless} of {len(replies)} replies ended within a thought, so they have no answer "
            f" (evaluation.max_thought_tokens = {config.max_thought_tokens})"
        )
    most = config.max_new_tokens
    short = sum(
        most is not None
        and not (reply.stopped or reply.within_thought)
        and reply.tokens - reply.thought_tokens == most
        for reply in replies
    )
    if short:
        yield (
            f"{short} of {len(replies)} replies were cut off at "
            f"evaluation.max_new_tokens = {most}, before evaluation.max_characters = "
            f"{config.max_characters}: a tokenizer with longer tokens has more room"
        )
    marks = Counter(mark for reply in replies if (mark := undeclared_mark(reply.text)))
    if marks and template.thoughts is None:
        mark, count = marks.most_common(1)[0]
        yield (
            f"{count} of {len(replies)} replies have {mark}, though nothing in the tokenizer tells "
            "that the model thinks; if these are thoughts, set evaluation.thoughts"
        )


def generate(
    loaded: LoadedModel,
    template: ChatTemplate,
    prompts: Sequence[str],
    config: EvaluationConfig,
    ranks: Ranks,
    turn: int = 0,
) -> list[Reply]:
    """Reply to prompts that are rendered in the template, on every process.

    A prompt that fills the model's positions gets an empty reply that did not stop.
    """
    reader = reader_for(loaded.tokenizer, template, ReplyLimits.of(config))
    ids = [loaded.encode(prompt) for prompt in prompts]
    begun = [template.begins_thought(prompt) for prompt in prompts]
    room = [min(reader.most_tokens, loaded.positions - len(prompt)) for prompt in ids]
    answerable = [place for place, tokens in enumerate(room) if tokens > 0]
    if unanswered := len(ids) - len(answerable):
        say(
            f"{loaded.name}: no reply to {counted(unanswered, 'prompt')} as long as its "
            f"{loaded.positions} positions"
        )
    if not reader.stop_ids:
        say(
            f"{loaded.name}: its tokenizer has no eos, so no token ends a reply and none stops "
            "before its limits"
        )
    batches = [
        [answerable[place] for place in batch]
        for batch in batches_by_length([len(ids[one]) for one in answerable], config.batch_size)
    ]

    def answer(batch: list[int]) -> list[Reply]:
        asked = [Asked(ids[place], room[place], begun[place]) for place in batch]
        return reply_batch(loaded, reader, asked, config, turn * TURN_SEEDS + batch[0])

    label = f"{loaded.name}: replies" + (f", turn {turn + 1}" if turn else "")
    replies = [Reply("", stopped=False, tokens=0)] * len(prompts)
    for batch, found in zip(batches, ranks.map(label, answer, batches), strict=True):
        for place, reply in zip(batch, found, strict=True):
            replies[place] = reply
    return replies


def reader_for(tokenizer: Any, template: ChatTemplate, limits: ReplyLimits) -> ReplyReader:
    """What reads the replies to prompts in a template."""
    stop_ids = tuple(tokenizer.convert_tokens_to_ids(template.end_tokens))
    return ReplyReader(tokenizer, stop_ids, template.thoughts, limits)


@dataclass(frozen=True)
class Asked:
    """A prompt in token ids, the most tokens of its reply, and whether it opens a thought."""

    ids: list[int]
    room: int
    begun: bool


@torch.inference_mode()
def reply_batch(
    loaded: LoadedModel,
    reader: ReplyReader,
    asked: Sequence[Asked],
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
    with _without_own_settings(loaded.model):
        output = loaded.model.generate(
            input_ids=torch.tensor(inputs, device=loaded.device),
            attention_mask=torch.tensor(mask, device=loaded.device),
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
