"""A chat template as a model meets it: what it is asked at each turn, and what it should reply.

At inference a model reads the conversation so far, rendered with `add_generation_prompt`, and
writes a reply up to the token that ends it. Many templates render a turn otherwise once it is over:
they remove its thoughts, or write an empty one only where it is the last. So every reply is
rendered after the prompt to which it replies, and nothing is assumed of what follows it.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jinja2.meta
import regex
from jinja2.exceptions import TemplateError

from cpt_merge.checkpoint.loaded_tokenizer import end_tokens, load_tokenizer
from cpt_merge.core.errors import UserError
from cpt_merge.data.conversations_messages import UNTRAINED, Message, roles
from cpt_merge.data.conversations_thoughts import (
    REASONING,
    closing_of,
    reasoning_field,
    split_thought,
    thinking_switch,
    without_last_marks,
)

Thinking = Literal["keep", "remove"]
REFUSALS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# variables and functions that every template gets
_GIVEN = {
    "messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now",
}  # fmt: skip
COMMON_ROLES = ("user", "assistant", "system")  # also of templates that name no role
# of templates that write today's: a store must not depend on the day
DATE = datetime.date(2024, 7, 26)
_MARK = regex.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_TODAY = regex.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<form>[^'"]*)(?P=quote)\s*\)""")


class ConversationError(ValueError):
    """A conversation that cannot be trained on. Its text continues a sentence about its row."""


@dataclass(frozen=True)
class ReplyText:
    """One turn of an assistant as text."""

    prompt: str  # all that the model reads
    whole: str  # the prompt and the reply, and perhaps what the template writes after it
    marked: bool  # `whole` is what the template renders, whose `{% generation %}` marks count
    messages: list[Message]  # that the template renders as `whole`
    variables: Mapping[str, Any]


@dataclass(frozen=True)
class ConversationTemplate:
    """The tokenizer of a chat model with its template, and how thoughts are treated."""

    tokenizer: Any
    end_ids: frozenset[int]  # tokens that end a reply
    thinking: Thinking = "keep"
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the recipe, for the template

    @staticmethod
    def read(
        directory: Path, thinking: Thinking = "keep", variables: Mapping[str, Any] | None = None
    ) -> ConversationTemplate:
        """Raises `UserError` for a tokenizer without a chat template or without a fast version."""
        tokenizer = load_tokenizer(directory)
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer in {directory} has no chat template, so conversations cannot be "
                "rendered; add a chat_template."
            )
        ends = tokenizer.convert_tokens_to_ids(end_tokens(directory, tokenizer))
        return ConversationTemplate(tokenizer, frozenset(ends), thinking, variables or {})

    @cached_property
    def text(self) -> str:
        """The template, or all of them where a tokenizer has several."""
        template = self.tokenizer.chat_template
        return template if isinstance(template, str) else "\n".join(template.values())

    @cached_property
    def is_marked(self) -> bool:
        """Whether the template marks what an assistant writes."""
        return bool(_MARK.search(self.text))

    @cached_property
    def reasoning_field(self) -> str | None:
        """The field from which the template takes thoughts."""
        return reasoning_field(self.text)

    @cached_property
    def switch(self) -> str | None:
        """The variable that asks for a reply with or without a thought."""
        found = thinking_switch(_variables(self.text))
        return None if found in self.variables else found

    @cached_property
    def settable(self) -> frozenset[str]:
        """The variables that a recipe may set."""
        return _variables(self.text) - _GIVEN - {*self.tokenizer.special_tokens_map}

    def knows_role(self, role: str) -> bool:
        """Whether the template names a role. One that writes any role teaches nothing new."""
        return role in COMMON_ROLES or bool(
            regex.search(rf"""['"]{regex.escape(role)}""", self.text)
        )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any],
        variables: Mapping[str, Any],
        *,
        prompt: bool,
    ) -> str:
        """The text of messages, with the beginning of a reply to a `prompt`.

        Raises `ConversationError` if the template refuses them.
        """
        return str(self._apply(messages, tools, variables, prompt=prompt, tokenize=False))

    def render_marked(self, reply: ReplyText, tools: Sequence[Any]) -> tuple[list[int], list[bool]]:
        """(token ids, whether the template marks each as an assistant's) of a reply's whole."""
        found = self._apply(
            reply.messages,
            tools,
            reply.variables,
            prompt=False,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        marks = [bool(mark) for mark in found["assistant_masks"]]
        # transformers ends a stretch with the first token of its last character, which may have
        # several, of one byte each
        for place, (before, (start, _)) in enumerate(pairwise(found["offset_mapping"]), start=1):
            if marks[place - 1] and start < before[1]:
                marks[place] = True
        return list(found["input_ids"]), marks

    def _apply(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any],
        variables: Mapping[str, Any],
        prompt: bool,
        **options: Any,
    ) -> Any:
        def apply(written: Sequence[Message]) -> Any:
            return self.tokenizer.apply_chat_template(
                list(written),
                tools=list(tools) or None,
                chat_template=_dated(self.tokenizer.get_chat_template(None, list(tools) or None)),
                add_generation_prompt=prompt,
                **variables,
                **options,
            )

        try:
            try:
                return apply(messages)
            except TypeError:  # of templates that expect arguments of tools as text
                return apply([_with_text_arguments(message) for message in messages])
        except REFUSALS as error:
            raise ConversationError(
                f"is refused by the chat template ({str(error).rstrip('.')}); its roles are "
                f"{roles(messages)}"
            ) from None

    def reply(self, messages: Sequence[Message], place: int, tools: Sequence[Any]) -> ReplyText:
        """The reply at a place of the messages, in the form in which a model generates it.

        Raises `ConversationError` for one that the template does not render after its own prompt.
        """
        before = [self._written(message) for message in messages[:place]]
        thought, answer = self.thought_of(messages[place])
        switched = {self.switch: bool(thought)} if self.switch else {}
        variables = {**switched, **self.variables}
        target = self._written(messages[place], is_reply=True)
        prompt = self.render(before, tools, variables, prompt=True)
        whole = self.render([*before, target], tools, variables, prompt=False)
        rendered = whole.startswith(prompt)
        if not rendered:
            whole = _after_its_marks(prompt, whole, thought, place) or _after_its_question(
                prompt, whole, messages[:place]
            )
        if not whole:
            raise ConversationError(
                f"has a message {place + 1} that the chat template does not render after its own "
                f"prompt for a reply, which ends with {prompt[-40:]!r}"
            )
        written = whole[len(prompt) :]
        if answer.strip() not in written:
            raise ConversationError(
                f"has a message {place + 1} whose content the chat template leaves out or changes"
            )
        for call in target.get("tool_calls", []):
            if call["function"]["name"] not in written:
                raise ConversationError(
                    f"has a message {place + 1} whose calls of tools the chat template leaves out"
                )
        if thought and thought not in written:
            raise ConversationError(
                f"has a message {place + 1} whose thought the chat template leaves out; set "
                "`thinking: remove`"
            )
        end = self._end_of_open(whole, len(prompt), [*before, target], tools, variables)
        return ReplyText(prompt, whole + end, rendered, [*before, target], variables)

    def _end_of_open(
        self,
        whole: str,
        start: int,
        messages: Sequence[Message],
        tools: Sequence[Any],
        variables: Mapping[str, Any],
    ) -> str:
        """The token that ends a reply of which the template writes no end; "" if there is none.

        Apertus writes it with the next turn, and GLM ends generation with the mark of that turn.
        """
        ends = self.tokenizer.convert_ids_to_tokens(sorted(self.end_ids))
        if any(end in whole[start:] for end in ends):
            return ""
        role = "tool" if messages[-1].get("tool_calls") else "user"
        following: Message = {"role": role, "content": "Zq7next"}
        try:
            text = self.render([*messages, following], tools, variables, prompt=True)
        except ConversationError:
            return ""
        after = text.removeprefix(whole) if text.startswith(whole) else ""
        return next((end for end in ends if after.startswith(end)), "")

    def thought_of(self, message: Message) -> tuple[str, str]:
        """(the thought to train on, the content without any)."""
        inline, answer = split_thought(message["content"])
        given = next((message[name] for name in REASONING if message.get(name)), inline)
        return ("" if self.thinking == "remove" else given.strip()), answer

    def _written(self, message: Message, is_reply: bool = False) -> Message:
        """A message as the template expects it.

        Earlier thoughts are left out, or given to a template that decides itself.
        """
        kept = {key: one for key, one in message.items() if key not in (UNTRAINED, *REASONING)}
        if message["role"] != "assistant":
            return kept
        thought, answer = self.thought_of(message)
        if not thought:
            return {**kept, "content": answer}
        if self.reasoning_field:
            return {**kept, "content": answer, self.reasoning_field: thought}
        if is_reply and split_thought(message["content"])[0]:
            return kept  # its content has the thought
        return {**kept, "content": answer}


def _after_its_marks(prompt: str, whole: str, thought: str, place: int) -> str:
    """The reply after a prompt that ends with marks of thoughts, which `whole` lacks; else "".

    Such templates begin every reply with a thought, or with an empty one where none is wanted.
    """
    start, marks = without_last_marks(prompt)
    if not marks or not whole.startswith(start):
        return ""
    closing = closing_of(marks)
    if closing is None:
        return prompt + whole[len(start) :]
    if not thought:
        raise ConversationError(
            f"has a message {place + 1} without a thought, but the chat template begins every "
            f"reply with {marks.strip()!r}; give it a `reasoning_content`, or use another template"
        )
    answer = whole[len(start) :].lstrip("\n")
    return f"{prompt}{thought}\n{closing}\n\n{answer}"


def _after_its_question(prompt: str, whole: str, before: Sequence[Message]) -> str:
    """The reply after a prompt that has more in front of the last question than `whole`; else "".

    Such templates write a system prompt in front of the last message only if it is the user's.
    """
    asked = before[-1]["content"].strip() if before else ""
    place = prompt.rfind(asked) if asked else -1
    if place < 0 or whole.count(prompt[place:]) != 1:
        return ""
    return prompt + whole.partition(prompt[place:])[2]


def _with_text_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls}


def _variables(template: str) -> frozenset[str]:
    """The variables that a template gets from outside."""
    parser = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = parser.parse(_MARK.sub("", template))
    except TemplateError:
        return frozenset()  # rendering says what is wrong
    return frozenset(jinja2.meta.find_undeclared_variables(parsed))


@cache
def _dated(template: str) -> str:
    """The template with a date in place of today's."""
    return str(_TODAY.sub(lambda found: repr(DATE.strftime(found["form"])), template))
