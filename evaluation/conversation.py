"""Conversations of one or more turns, and a model's replies to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpt_merge.evaluation.checks.registry import Check

ROLES = ("system", "user", "assistant")
ANY_LANGUAGE = "any"
Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """The messages before a reply, and the checks of this reply."""

    messages: list[Message]  # the last one is the user's
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Turns of one conversation; a single prompt has one. Each turn sees the earlier replies."""

    language: str  # in which it is written
    turns: tuple[Turn, ...]
    category: str | None = None
    references: tuple[str | None, ...] = ()  # good replies by turn, for judges
    safe: bool | None = None  # whether a good model answers it; None if nobody said so

    def reference(self, turn: int) -> str | None:
        """A good reply to a turn, if there is one."""
        return self.references[turn] if turn < len(self.references) else None

    def reply_language(self, turn: int) -> str:
        """The language of the conversation, unless a check of the turn asks for another.

        `any` if the reply should be JSON alone, whose keys and values are in no language.
        """
        for check in self.turns[turn].checks:
            if check.name == "language":
                return str(check.arguments["language"])
            if check.name == "json_only":
                return ANY_LANGUAGE
        return self.language

    @property
    def questions(self) -> str:
        """The user's messages, one per line; for tables."""
        return "\n".join(turn.messages[-1]["content"] for turn in self.turns)


def with_system(conversation: Conversation, text: str) -> Conversation:
    """The conversation after a system prompt, unless it begins with one."""
    first, *others = conversation.turns
    if first.messages[0]["role"] == "system":
        return conversation
    first = replace(first, messages=[{"role": "system", "content": text}, *first.messages])
    return replace(conversation, turns=(first, *others))


def prompt(language: str, messages: list[Message], checks: Sequence[Check] = ()) -> Conversation:
    """A conversation of one turn."""
    return Conversation(language, (Turn(messages, tuple(checks)),))


@dataclass(frozen=True)
class Reply:
    """A model's reply. Its texts include special tokens, but not the one that ended it."""

    text: str  # the answer
    stopped: bool  # by the model itself, not by a limit
    tokens: int  # generated, including thoughts and the end token
    thought: str = ""  # what a reasoning model wrote before the answer
    thought_tokens: int = 0
    within_thought: bool = False  # it ended within a thought, so there is no answer

    @property
    def thinks(self) -> bool:
        """Whether it has a thought that is not empty."""
        return self.within_thought or bool(self.thought)


@dataclass(frozen=True)
class Exchange:
    """A conversation with a model's replies, one per turn."""

    conversation: Conversation
    replies: tuple[Reply, ...]

    def messages(self) -> list[Message]:
        """All messages before the last reply."""
        *earlier, last = self.conversation.turns
        found: list[Message] = []
        for turn, reply in zip(earlier, self.replies, strict=False):
            found += [*turn.messages, {"role": "assistant", "content": reply.text}]
        return [*found, *last.messages]

    @property
    def thought(self) -> str:
        """The thoughts of all replies, for tables."""
        return "\n".join(reply.thought for reply in self.replies if reply.thought)

    @property
    def text(self) -> str:
        """All replies, one per line; for tables and scorers."""
        return "\n".join(reply.text for reply in self.replies)
