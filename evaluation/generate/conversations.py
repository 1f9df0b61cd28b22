"""Conversations with a model, whichever engine generates its replies.

They are answered turn by turn: all first turns together, then all second ones, and so on, so that
an engine always has many prompts at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cpt_merge.core.progress import counted, say
from cpt_merge.evaluation.chat_template import ChatTemplate
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Conversation, Exchange, Message, Reply
from cpt_merge.evaluation.generate.engine import Engine, Prompt
from cpt_merge.evaluation.generate.reader import ReplyLimits, ReplyReader
from cpt_merge.evaluation.thoughts import undeclared_mark


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
    engine: Engine,
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    config: EvaluationConfig,
) -> Generation:
    """Answer every turn of every conversation, on every process.

    The model sees its own earlier replies.
    """
    engine.start()  # its time does not count
    histories: list[list[Message]] = [[] for _ in conversations]
    replies: list[list[Reply]] = [[] for _ in conversations]
    start = time.monotonic()
    for turn in range(max((len(one.turns) for one in conversations), default=0)):
        places = [place for place, one in enumerate(conversations) if turn < len(one.turns)]
        for place in places:
            histories[place] += conversations[place].turns[turn].messages
        prompts = [template.render(engine.model.tokenizer, histories[place]) for place in places]
        found = generate(engine, template, prompts, config, turn)
        for place, reply in zip(places, found, strict=True):
            replies[place].append(reply)
            histories[place].append(template.turn_of(reply))
    exchanges = [Exchange(*pair) for pair in zip(conversations, map(tuple, replies), strict=True)]
    for line in remarks([one for of_one in replies for one in of_one], template, config):
        say(f"{engine.model.name}: {line}")
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
    engine: Engine,
    template: ChatTemplate,
    texts: Sequence[str],
    config: EvaluationConfig,
    turn: int = 0,
) -> list[Reply]:
    """Reply to prompts that are rendered in the template, on every process.

    A prompt that fills the model's positions gets an empty reply that did not stop.
    """
    engine.start()  # a server may have fewer positions than the model
    model = engine.model
    reader = reader_for(model.tokenizer, template, ReplyLimits.of(config))
    prompts = []
    for text in texts:
        ids = model.encode(text)
        room = min(reader.most_tokens, engine.positions - len(ids))
        prompts.append(Prompt(text, ids, room, template.begins_thought(text)))
    answerable = [place for place, one in enumerate(prompts) if one.room > 0]
    if unanswered := len(prompts) - len(answerable):
        say(
            f"{model.name}: no reply to {counted(unanswered, 'prompt')} as long as its "
            f"{engine.positions} positions"
        )
    if not reader.stop_ids:
        say(
            f"{model.name}: its tokenizer has no eos, so no token ends a reply and none stops "
            "before its limits"
        )
    label = f"{model.name}: replies" + (f", turn {turn + 1}" if turn else "")
    found = engine.reply([prompts[one] for one in answerable], reader, config, turn, label)
    replies = [Reply("", stopped=False, tokens=0)] * len(prompts)
    for place, reply in zip(answerable, found, strict=True):
        replies[place] = reply
    return replies


def reader_for(tokenizer: Any, template: ChatTemplate, limits: ReplyLimits) -> ReplyReader:
    """What reads the replies to prompts in a template."""
    stop_ids = tuple(tokenizer.convert_tokens_to_ids(template.end_tokens))
    return ReplyReader(tokenizer, stop_ids, template.thoughts, limits)
