"""Conversations as rows of token ids, and which of them the loss counts.

A row is what a model has read and written when it has replied: `prompt reply`. Of the reply, up to
the token that ends it, the loss counts every token; of a prompt none. A row that the next prompt
begins with is not needed: the next row contains it with its replies. So most templates give one row
per conversation, and those that change earlier turns one for each form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpt_merge.data.conversations_messages import ChatRecord, Message, is_trained
from cpt_merge.data.conversations_template import (
    ConversationError,
    ConversationTemplate,
    ReplyText,
)

_PROBE = "Zq7probe"  # no template contains or changes it


@dataclass(frozen=True)
class ChatRow:
    """Token ids, and for each whether the loss counts it."""

    ids: list[int]
    trained: list[bool]
    replies: int  # that are trained on


@dataclass(frozen=True)
class ChatRows:
    """The rows of a conversation, and what is not in them."""

    rows: list[ChatRow]
    dropped: int  # messages after the last reply
    borders: int  # replies whose first characters would be one token with the end of the prompt


def chat_rows(template: ConversationTemplate, chat: ChatRecord) -> ChatRows:
    """Raises `ConversationError` for a conversation that cannot be trained on."""
    places = [place for place, one in enumerate(chat.messages) if is_trained(one)]
    if not places:
        raise ConversationError("has no message of an assistant to train on")
    messages = chat.messages[: places[-1] + 1]
    _check_messages(template, messages)
    replies = [template.reply(messages, place, chat.tools) for place in places]
    _check_rendered(template, replies[-1], chat.tools)
    rows, borders = list[ChatRow](), 0
    for place, reply in zip(places, replies, strict=True):
        prompt, row, joined = _row(template, reply, chat.tools, place)
        borders += joined
        if rows and prompt[: len(rows[-1].ids)] == rows[-1].ids:
            row = _joined(rows.pop(), row)
        rows.append(row)
    return ChatRows(rows, len(chat.messages) - len(messages), borders)


def _joined(earlier: ChatRow, row: ChatRow) -> ChatRow:
    """A row with the replies of one with which it begins."""
    trained = [*earlier.trained, *row.trained[len(earlier.ids) :]]
    return ChatRow(row.ids, trained, earlier.replies + row.replies)


def _row(
    template: ConversationTemplate, reply: ReplyText, tools: Sequence[Any], place: int
) -> tuple[list[int], ChatRow, bool]:
    """(the tokens of the prompt, the row, whether a token reaches across their border)."""
    prompt, whole = encode(template, [reply.prompt, reply.whole])
    joined = whole[: len(prompt)] != prompt
    if joined:  # a model never writes such a token, since it reads the prompt's own
        rest = _encode_rest(template, reply.whole[len(reply.prompt) :])
        if decode(template, [*prompt, *rest]) != decode(template, whole):
            raise ConversationError(
                f"has a message {place + 1} whose tokens differ from those that a model would "
                "write after the prompt"
            )
        whole = [*prompt, *rest]
    first = len(prompt)
    ends = (at for at in range(first, len(whole)) if whole[at] in template.end_ids)
    end = next(ends, None)
    if end is None:
        raise ConversationError(
            f"has a message {place + 1} that the chat template ends without any of the tokens that "
            f"end a reply ({_names(template)}), so a model would not learn to stop"
        )
    trained = [at >= first for at in range(end + 1)]
    if template.is_marked and reply.marked and not joined:
        ids, marks = template.render_marked(reply, tools)
        if ids[:end] != whole[:end] or not any(marks[first:end]):
            raise ConversationError(
                f"has a message {place + 1} of which the template's generation marks cover nothing"
            )
        trained = [at >= first and bool(marks[at]) for at in range(end)] + [True]
    return prompt, ChatRow(whole[: end + 1], trained, 1), joined


def encode(template: ConversationTemplate, texts: list[str]) -> list[list[int]]:
    """The token ids of rendered texts, as a model gets them at inference."""
    found = template.tokenizer(texts, add_special_tokens=False, verbose=False)
    return [list(ids) for ids in found["input_ids"]]


def _encode_rest(template: ConversationTemplate, text: str) -> list[int]:
    """The tokens of a text within another: SentencePiece puts a space in front of a first one."""
    line, both = encode(template, ["\n", "\n" + text])
    return both[len(line) :] if both[: len(line)] == line else encode(template, [text])[0]


def decode(template: ConversationTemplate, ids: Sequence[int]) -> str:
    """The text of token ids, with its special tokens."""
    return str(
        template.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    )


def _names(template: ConversationTemplate) -> str:
    return ", ".join(template.tokenizer.convert_ids_to_tokens(sorted(template.end_ids)))


def _check_messages(template: ConversationTemplate, messages: Sequence[Message]) -> None:
    ends = template.tokenizer.convert_ids_to_tokens(sorted(template.end_ids))
    for place, message in enumerate(messages, start=1):
        role = message["role"]
        if not template.knows_role(role):
            raise ConversationError(
                f"has a message {place} with the role {role!r}, which the chat template does not "
                "name"
            )
        if role != "assistant":
            continue
        if not template.thought_of(message)[1].strip() and not message.get("tool_calls"):
            raise ConversationError(f"has an empty message {place} of the assistant")
        for token in ends:
            if token in message["content"]:
                raise ConversationError(
                    f"has a message {place} that contains {token!r}, which ends a reply"
                )


def _check_rendered(template: ConversationTemplate, reply: ReplyText, tools: Sequence[Any]) -> None:
    """Raise `ConversationError` for a message that the template leaves out."""
    for place, message in enumerate(reply.messages[:-1]):
        content = message["content"].strip()
        if not content or content in reply.prompt:
            continue
        other = [*reply.messages[:-1]]
        other[place] = {**message, "content": _PROBE}
        probed = template.render(other, tools, reply.variables, prompt=True)
        if _PROBE not in probed:
            raise ConversationError(
                f"has a message {place + 1} with the role {message['role']!r} that the chat "
                "template leaves out"
            )
