"""The chat template: prompts rendered as the model expects them, and the marks that have no place in a reply."""

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


@dataclass(frozen=True)
class ChatTemplate:
    """How a model is spoken to."""

    template: str
    end_tokens: list[str]  # what ends a reply
    marks: list[str]  # special tokens and other marks of the template
    source: str  # the directory that it is from


def read_chat_template(directory: Path) -> ChatTemplate:
    """The chat template of a model. Raises `UserError` if it has none."""
    tokenizer = load_tokenizer(directory)
    if not tokenizer.chat_template:
        raise UserError(
            f"the chat model's tokenizer in {directory} has no chat template, so no prompt can be rendered."
        )
    return ChatTemplate(
        tokenizer.chat_template,
        end_tokens(directory, tokenizer),
        template_marks(tokenizer),
        str(directory),
    )


def first_template(models: Mapping[str, Path]) -> ChatTemplate:
    """The chat template of the first model that has one. Raises `UserError` if none has."""
    for directory in models.values():
        if load_tokenizer(directory).chat_template:
            return read_chat_template(directory)
    raise UserError(
        f"none of the models {', '.join(models)} has a chat template, so no prompt can be rendered; "
        "name a chat model by --template DIR."
    )


def template_for(loaded: LoadedModel, directory: Path, chat: ChatTemplate) -> ChatTemplate:
    """A model's own template; the chat model's for one that has none, said in a line.

    With a template that is not its own, a model may also end its reply with the chat model's end
    tokens, by their name.
    """
    tokenizer = loaded.tokenizer
    own_ends = end_tokens(directory, tokenizer)
    if tokenizer.chat_template:
        marks = sorted({*chat.marks, *template_marks(tokenizer)})
        return ChatTemplate(tokenizer.chat_template, own_ends, marks, str(directory))
    say(f"{loaded.name}: has no chat template; it is asked in that of {chat.source}")
    vocabulary = tokenizer.get_vocab()
    ends = list(
        dict.fromkeys([*own_ends, *(token for token in chat.end_tokens if token in vocabulary)])
    )
    return ChatTemplate(
        chat.template, ends, sorted({*chat.marks, *special_tokens(tokenizer)}), chat.source
    )


def check_prompts(
    models: Mapping[str, Path], chat: ChatTemplate, conversations: Sequence[Conversation]
) -> None:
    """Render every first turn for every model, before any is loaded.

    Raises `UserError` for what a template refuses.
    """
    for name, directory in models.items():
        tokenizer = load_tokenizer(directory)
        for conversation in conversations:
            try:
                render(
                    tokenizer,
                    tokenizer.chat_template or chat.template,
                    conversation.turns[0].messages,
                )
            except UserError as error:
                raise UserError(f"model {name}, {conversation.questions[:60]!r}: {error}") from None


def render(tokenizer: Any, template: str, messages: Sequence[Message]) -> str:
    """The text of a conversation up to where the reply begins.

    Raises `UserError` where the template refuses it.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
            )
        )
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template refuses a prompt with the roles {roles} ({error}); change it."
        ) from None


def special_tokens(tokenizer: Any) -> list[str]:
    """Every special token of a tokenizer."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def template_marks(tokenizer: Any) -> list[str]:
    """What the template writes around messages, found by rendering placeholders, and the special tokens.

    Of the template's own text, a piece between special tokens, line ends and messages counts if it holds more than
    letters, digits and spaces, and two characters (`[INST]`, `### Response:`): `user` or `.` may be in any reply.
    """
    user, assistant = PLACEHOLDERS
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", user), ("assistant", assistant)) * 2
    ]
    text = render(tokenizer, tokenizer.chat_template, messages) + render(
        tokenizer, tokenizer.chat_template, messages[:1]
    )
    special = special_tokens(tokenizer)
    borders = "|".join(
        map(regex.escape, [*PLACEHOLDERS, *sorted(special, key=len, reverse=True), "\n"])
    )
    pieces = {piece.strip() for piece in regex.split(borders, text)}
    return sorted(
        {
            *special,
            *(
                piece
                for piece in pieces
                if regex.search(r"[^\p{L}\p{N}\s].|.[^\p{L}\p{N}\s]", piece)
            ),
        }
    )
