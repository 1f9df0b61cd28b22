"""A chat template proves itself on small conversations before any data is read.

What is proven: that the loss counts the assistant's content and the token that ends it and nothing
that somebody else says, and that a row has the tokens of the conversation rendered as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cpt_merge.core.errors import UserError
from cpt_merge.data.conversations_messages import ChatRecord, Message
from cpt_merge.data.conversations_rows import ChatRow, chat_rows, decode, encode
from cpt_merge.data.conversations_template import ConversationError, ConversationTemplate

_SAID = ("Kwaq sorel?", "Vint omba.", "Drel pisk?", "Humo tarn.")  # words of no template
_SYSTEM, _THOUGHT = "Yerb lund.", "Olf grame."


@dataclass(frozen=True)
class CheckedTemplate:
    """A template that was found right, and what its user should know."""

    template: ConversationTemplate
    remarks: list[str]


def checked(template: ConversationTemplate, source: Path) -> CheckedTemplate:
    """Raises `UserError` for a template with which replies cannot be trained."""
    _check_variables(template, source)
    remarks = list[str]()
    template = _with_its_end(template, source, remarks)
    thought = _needs_thought(template)
    first, second = _turn(_SAID[0], _SAID[1], thought), _turn(_SAID[2], _SAID[3], thought)
    _prove(template, first, source)
    for turns, what in (
        ([*first, *second], "conversations of several turns"),
        ([{"role": "system", "content": _SYSTEM}, *first], "system prompts"),
    ):
        try:
            chat_rows(template, ChatRecord(turns))
        except ConversationError as error:
            remarks.append(f"the chat template does not render {what}: a conversation {error}")
        else:
            _prove(template, turns, source)
    if template.switch and template.thinking == "keep":
        remarks.append(
            f"replies without a thought are trained with {template.switch}: false in the template"
        )
    return CheckedTemplate(template, remarks)


def _check_variables(template: ConversationTemplate, source: Path) -> None:
    """Raise `UserError` for variables that the template would ignore."""
    known = template.settable
    for name in template.variables:
        if name not in known:
            raise UserError(
                f"chat_template_kwargs has {name!r}, but the chat template in {source} reads "
                f"{', '.join(sorted(known)) or 'no variable'}; correct or remove it."
            )


def _turn(question: str, answer: str, thought: str) -> list[Message]:
    reply: Message = {"role": "assistant", "content": answer}
    return [
        {"role": "user", "content": question},
        {**reply, "reasoning_content": thought} if thought else reply,
    ]


def _needs_thought(template: ConversationTemplate) -> str:
    """A thought for a template that begins every reply with one; else nothing."""
    try:
        template.reply(_turn(_SAID[0], _SAID[1], ""), 1, [])
    except ConversationError:
        return _THOUGHT
    return ""


def _with_its_end(
    template: ConversationTemplate, source: Path, remarks: list[str]
) -> ConversationTemplate:
    """The template, which may end a turn with a special token that ends no reply yet.

    Phi-3 writes `<|end|>` and, at the very end, the tokenizer's eos; a model that learned both
    would go on after its reply. Command R writes `<|END_RESPONSE|>` and eos after every reply.
    """
    thought = _needs_thought(template)
    first = _turn(_SAID[0], _SAID[1], thought)
    try:
        reply = template.reply(first, 1, [])
    except ConversationError as error:
        raise UserError(f"the chat template in {source}: a conversation {error}.") from None
    if template.end_ids & set(_after_a_turn(template, first)):
        return template
    place = reply.whole.rindex(_SAID[1]) + len(_SAID[1])
    after = encode(template, [reply.whole[place:]])[0]
    special = set(template.tokenizer.all_special_ids) | {
        id_ for id_, token in template.tokenizer.added_tokens_decoder.items() if token.special
    }
    found = next((id_ for id_ in after if id_ in special | template.end_ids), None)
    if found is None or found in template.end_ids:
        return template
    token = template.tokenizer.convert_ids_to_tokens(found)
    remarks.append(
        f"the chat template in {source} ends a reply with {token}, at which generation does not "
        "end; add its id to `eos_token_id` of generation_config.json"
    )
    return replace(template, end_ids=template.end_ids | {found})


def _after_a_turn(template: ConversationTemplate, turn: list[Message]) -> list[int]:
    """The tokens between a turn's reply and the next question; none if there can be no other."""
    question: Message = {"role": "user", "content": _SAID[2]}
    variables = {template.switch: False} if template.switch else {}
    try:
        text = template.render(
            [*turn, question], [], {**variables, **template.variables}, prompt=True
        )
    except ConversationError:
        return []
    return encode(template, [text.partition(_SAID[1])[2].partition(_SAID[2])[0]])[0]


def _prove(template: ConversationTemplate, messages: list[Message], source: Path) -> None:
    try:
        rows = chat_rows(template, ChatRecord(messages)).rows
    except ConversationError as error:
        raise UserError(f"the chat template in {source}: a conversation {error}.") from None
    replies = [one["content"] for one in messages if one["role"] == "assistant"]
    others = [one["content"] for one in messages if one["role"] != "assistant"]
    stretches = [stretch for row in rows for stretch in trained_texts(template, row)]
    if len(stretches) != len(replies):
        raise _wrong(source, f"{len(stretches)} stretches count for {len(replies)} replies")
    for reply, stretch in zip(replies, stretches, strict=True):
        if stretch.count(reply) != 1 or any(one in stretch for one in others):
            raise _wrong(source, f"of the reply {reply!r}, {stretch!r} counts")
    whole = encode(template, [rendered_whole(template, messages)])[0]
    if len(rows) == 1 and whole[: len(rows[0].ids)] != rows[0].ids:
        raise _wrong(source, "a conversation has other tokens when it is rendered as a whole")


def _wrong(source: Path, what: str) -> UserError:
    return UserError(f"the chat template in {source} cannot be trained with: {what}.")


def rendered_whole(template: ConversationTemplate, messages: list[Message]) -> str:
    """A conversation rendered at once, with the variables of its last reply."""
    return template.reply(messages, len(messages) - 1, []).whole


def trained_texts(template: ConversationTemplate, row: ChatRow) -> list[str]:
    """The texts of the stretches that the loss counts."""
    stretches: list[list[int]] = []
    counts = False
    for id_, trained in zip(row.ids, row.trained, strict=True):
        if trained and not counts:
            stretches.append([])
        if trained:
            stretches[-1].append(id_)
        counts = trained
    return [decode(template, stretch) for stretch in stretches]
