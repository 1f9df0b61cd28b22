"""What is asked and what is answered: conversations of one or more turns of the user's, and the replies to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpt_merge.evaluation.checks.registry import Check

ROLES = ("system", "user", "assistant")
ANY_LANGUAGE = "any"
Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """What is said before a reply, and what the reply is checked for."""

    messages: list[Message]  # the last one is the user's
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """The turns of one conversation; a single prompt is one of one turn.

    Each turn sees the model's own replies.
    """

    language: str  # that it is written in
    turns: tuple[Turn, ...]
    category: str | None = None
    references: tuple[str | None, ...] = ()  # good replies, by turn; for judges

    def reference(self, turn: int) -> str | None:
        """A good reply to a turn, if there is one."""
        return self.references[turn] if turn < len(self.references) else None

    def reply_language(self, turn: int) -> str:
        """The language that the reply to a turn should be in: the conversation's, unless a check asks for another.

        `any` where the reply is to be in no language: JSON alone has keys and values in whatever the prompt names.
        """
        for check in self.turns[turn].checks:
            if check.name == "language":
                return str(check.arguments["language"])
            if check.name == "json_only":
                return ANY_LANGUAGE
        return self.language

    @property
    def questions(self) -> str:
        """What the user says, a turn a line; for tables."""
        return "\n".join(turn.messages[-1]["content"] for turn in self.turns)


def prompt(language: str, messages: list[Message], checks: Sequence[Check] = ()) -> Conversation:
    """A conversation of one turn."""
    return Conversation(language, (Turn(messages, tuple(checks)),))


@dataclass(frozen=True)
class Reply:
    """What a model answered. Special tokens are left in the text; the one that ended it is not."""

    text: str
    stopped: bool  # by itself, not by max_new_tokens
    tokens: int  # generated, the end token included


@dataclass(frozen=True)
class Exchange:
    """A conversation with a model's replies, one per turn."""

    conversation: Conversation
    replies: tuple[Reply, ...]

    def messages(self) -> list[Message]:
        """What the model saw before its last reply."""
        found: list[Message] = []
        for place, turn in enumerate(self.conversation.turns):
            found += turn.messages
            if place < len(self.conversation.turns) - 1:
                found.append({"role": "assistant", "content": self.replies[place].text})
        return found

    @property
    def text(self) -> str:
        """All that the model said, a reply a line; for tables and scorers."""
        return "\n".join(reply.text for reply in self.replies)
