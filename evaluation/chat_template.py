"""Chat templates: prompts as the model expects them, and the marks that no reply should contain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
from jinja2.exceptions import TemplateError

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.evaluation.conversation import Conversation, Message
from cpt_merge.evaluation.models import LoadedModel, end_tokens, load_tokenizer

PLACEHOLDERS = ("UserPlaceholder", "AssistantPlaceholder")
REFUSALS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class ChatTemplate:
    """How a model is prompted."""

    template: str
    end_tokens: list[str]  # those that end a reply
    marks: list[str]  # special tokens and other marks of the template
    source: str  # the directory that it comes from


def read_chat_template(directory: Path) -> ChatTemplate:
    """The chat template of a model. Raises `UserError` if it has none."""
    tokenizer = load_tokenizer(directory)
    if not tokenizer.chat_template:
        raise UserError(
            f"the chat model's tokenizer in {directory} has no chat template, so it cannot be "
            "prompted; add a chat_template."
        )
    ends, marks = end_tokens(directory, tokenizer), template_marks(tokenizer)
    return ChatTemplate(tokenizer.chat_template, ends, marks, str(directory))


def first_template(models: Mapping[str, Path]) -> ChatTemplate:
    """The chat template of the first model that has one. Raises `UserError` if none has."""
    for directory in models.values():
        if load_tokenizer(directory).chat_template:
            return read_chat_template(directory)
    raise UserError(
        f"none of the models {', '.join(models)} has a chat template, so they cannot be prompted; "
        "name a chat model by --template DIR."
    )


def template_for(loaded: LoadedModel, directory: Path, chat: ChatTemplate) -> ChatTemplate:
    """A model's own template, or the chat model's if it has none.

    With a template that is not its own, a model may end its reply with the chat model's end tokens
    as well, as far as its vocabulary has them.
    """
    tokenizer = loaded.tokenizer
    own_ends = end_tokens(directory, tokenizer)
    if tokenizer.chat_template:
        marks = sorted({*chat.marks, *template_marks(tokenizer)})
        return ChatTemplate(tokenizer.chat_template, own_ends, marks, str(directory))
    say(f"{loaded.name}: has no chat template; it is prompted in that of {chat.source}")
    vocabulary = tokenizer.get_vocab()
    ends = dict.fromkeys([*own_ends, *(token for token in chat.end_tokens if token in vocabulary)])
    marks = sorted({*chat.marks, *special_tokens(tokenizer)})
    return ChatTemplate(chat.template, list(ends), marks, chat.source)


def check_prompts(
    models: Mapping[str, Path], chat: ChatTemplate, conversations: Sequence[Conversation]
) -> None:
    """Render every first turn for every model, before any model is loaded.

    Raises `UserError` for a prompt that a template refuses.
    """
    for name, directory in models.items():
        tokenizer = load_tokenizer(directory)
        template = tokenizer.chat_template or chat.template
        for conversation in conversations:
            try:
                render(tokenizer, template, conversation.turns[0].messages)
            except UserError as error:
                raise UserError(f"model {name}, {conversation.questions[:60]!r}: {error}") from None


def render(tokenizer: Any, template: str, messages: Sequence[Message]) -> str:
    """The text of a conversation up to the start of the reply.

    Raises `UserError` if the template refuses it.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
            )
        )
    except REFUSALS as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template refuses a prompt with the roles {roles} ({error}); change it."
        ) from None


def special_tokens(tokenizer: Any) -> list[str]:
    """Every special token of a tokenizer."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def template_marks(tokenizer: Any) -> list[str]:
    """The special tokens, and what the template writes around messages.

    The template is rendered with placeholders. Of its own text, a piece between special tokens,
    line ends and messages counts as a mark if it has at least two characters and one that is no
    letter, digit or space (`[INST]`, `### Response:`); `user` or `.` may be in any reply.
    """
    user, assistant = PLACEHOLDERS
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}] * 2
    template, special = tokenizer.chat_template, special_tokens(tokenizer)
    text = render(tokenizer, template, messages) + render(tokenizer, template, messages[:1])
    borders = [*PLACEHOLDERS, *sorted(special, key=len, reverse=True), "\n"]
    pieces = (piece.strip() for piece in regex.split("|".join(map(regex.escape, borders)), text))
    marks = [one for one in pieces if regex.search(r"[^\p{L}\p{N}\s].|.[^\p{L}\p{N}\s]", one)]
    return sorted({*special, *marks})
