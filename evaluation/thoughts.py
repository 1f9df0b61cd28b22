"""Thoughts: what a reasoning model writes before its answer, and has no place in a verdict on it.

How a model marks its thoughts is found here, from its tokenizer and chat template, and here a reply
is divided. Everything else gets the answer; the thought is kept in the samples.

    marks in the tokenizer's `response_template`, where it has one (transformers' parse_response)
    otherwise  the known pairs, where a mark is a token or is written in the chat template
    and        `evaluation.thoughts`, for models whose tokenizer does not tell
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import regex
from transformers.utils.chat_parsing.response_templates import load_response_template

from cpt_merge.core.errors import UserError
from cpt_merge.data.conversations_thoughts import PAIRS, REASONING
from cpt_merge.evaluation.config import ThoughtMarksConfig

# what some of these models write around the answer
FRAMES = (
    ("<response>", "</response>"),
    ("<answer>", "</answer>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
)
# harmony (gpt-oss) has channels: all but the final one are thoughts
CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
_HEADER = (
    r"(?:<\|end\|>\s*)?(?:<\|start\|>assistant)?"
    r"<\|channel\|>%s[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
)
# a mark between these is spoken about, not used
QUOTES = ("`「『“‘", "`」』”’")
# white space at either end, including characters of no width
BLANK_ENDS = regex.compile(r"\A[\s\u200b\u2060\ufeff]+|[\s\u200b\u2060\ufeff]+\Z")


@dataclass(frozen=True)
class ThoughtMarks:
    """Regular expressions of what begins and what ends a thought.

    Without `opening`, every reply begins within its thought.
    """

    opening: str | None
    closing: str


@dataclass(frozen=True)
class DividedReply:
    """A reply, or what there is of it so far. Marks are in neither part."""

    thought: str
    answer: str
    thinking: bool = False  # it ends within a thought
    answer_from: int = 0  # the place in the reply where the last thought ended


@dataclass(frozen=True)
class Thoughts:
    """How a model marks its thoughts, in one or more ways, and its answers."""

    marks: tuple[ThoughtMarks, ...]
    frames: tuple[tuple[str, str], ...] = ()  # regular expressions around an answer

    @cached_property
    def _opening(self) -> regex.Pattern[str]:
        openings = [one.opening for one in self.marks if one.opening]
        return regex.compile("|".join(openings) or "(?!)", regex.DOTALL)

    @cached_property
    def _either(self) -> regex.Pattern[str]:
        closings = "|".join(one.closing for one in self.marks)
        both = f"(?P<opening>{self._opening.pattern})|(?P<closing>{closings})"
        return regex.compile(both, regex.DOTALL)

    def without_marks(self, text: str) -> str:
        """A text without the marks of thoughts and answers in it."""
        for mark in (mark for frame in self.frames for mark in frame):
            text = regex.sub(mark, "", text)
        return str(self._either.sub("", text)).strip()

    def begin_in(self, prompt: str) -> bool:
        """Whether a reply to this rendered prompt begins within a thought."""
        if any(one.opening is None for one in self.marks):
            return True
        return any(not prompt[found.end() :].strip() for found in self._opening.finditer(prompt))

    def divide(self, reply: str, begun: bool) -> DividedReply:
        """Divide a reply; `begun`: the prompt has opened a thought.

        What precedes a closing mark without an opening one is a thought as well, since some models
        leave out the first mark.
        """
        thoughts, answer, thinking, place, answer_from = list[str](), "", begun, 0, 0
        for mark in self._either.finditer(reply):
            text, place = reply[place : mark.start()], mark.end()
            if thinking:
                thoughts.append(text)
            else:
                answer += text
            if mark["closing"] is not None:
                if not thinking:
                    thoughts, answer = [*thoughts, answer], ""
                answer_from = place
            thinking = mark["closing"] is None
        if thinking:
            thoughts.append(reply[place:])
        else:
            answer += self._without_frame(reply[place:])
        written = (stripped for text in thoughts if (stripped := BLANK_ENDS.sub("", text)))
        return DividedReply("\n".join(written), answer, thinking, answer_from)

    def may_continue(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a mark."""
        found = self._either.search(text, partial=True)
        while found is not None and not found.partial:
            found = self._either.search(text, found.end(), partial=True)
        return len(text) - found.start() if found is not None else 0

    def _without_frame(self, answer: str) -> str:
        for opening, closing in self.frames:
            answer = regex.sub(rf"\A\s*{opening}|{closing}\s*\Z", "", answer)
        return answer


def find_thoughts(
    tokenizer: Any, template: Any, further: Sequence[ThoughtMarksConfig]
) -> Thoughts | None:
    """How a model marks its thoughts; None if nothing tells that it has any.

    `template` is the chat template in which it is prompted, or a mapping of several. Raises
    `UserError` for a `response_template` that transformers cannot read.
    """
    vocabulary, written = tokenizer.get_vocab(), str(template or "")

    def knows(mark: str) -> bool:
        return mark in vocabulary or mark in written

    own = _of_response_template(getattr(tokenizer, "response_template", None))
    if not own:
        pairs = [pair for pair in PAIRS if any(map(knows, pair))]
        own = [_literal(*pair) for pair in pairs]
        if knows(CHANNEL) and knows(MESSAGE):
            own.append(ThoughtMarks(_HEADER % "(?:analysis|commentary)", _HEADER % "final"))
    marks = [*own, *(_literal(one.open, one.close) for one in further)]
    if not marks:
        return None
    frames = [tuple(map(regex.escape, frame)) for frame in FRAMES if any(map(knows, frame))]
    return Thoughts(tuple(dict.fromkeys(marks)), tuple((one, other) for one, other in frames))


def _literal(opening: str | None, closing: str) -> ThoughtMarks:
    return ThoughtMarks(_unquoted(opening) if opening else None, _unquoted(closing))


def _unquoted(mark: str) -> str:
    """The mark, unless it is in quotes or backticks."""
    before, after = QUOTES
    literal = regex.escape(mark)
    return f"(?:(?<![{before}]){literal}|{literal}(?![{after}]))"


def _of_response_template(template: Mapping[str, Any] | None) -> list[ThoughtMarks]:
    """The marks of the field with the thoughts, of a tokenizer that describes its replies."""
    if not template:
        return []
    try:
        fields = load_response_template(dict(template)).fields
    except ValueError as error:
        raise UserError(
            f"the tokenizer's response_template cannot be read ({error}); correct or remove it."
        ) from None
    field = next((fields[name] for name in REASONING if name in fields), None)
    if field is None:
        return []
    after = [one.open_re for one in fields.values() if one is not field and one.open_re is not None]
    closing = [field.close_re] if field.close_re is not None else after
    if not closing:
        return []
    opening = field.open_re.pattern if field.open_re is not None else None
    return [ThoughtMarks(opening, "|".join(one.pattern for one in closing))]


def undeclared_mark(reply: str) -> str | None:
    """A known mark with which a reply begins, or that ends a thought in it."""
    start = reply.lstrip()
    return next((one for one, end in PAIRS if start.startswith(one) or end in reply), None)
