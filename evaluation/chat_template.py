"""Chat templates: prompts as the model expects them, and the marks that no reply should contain."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import regex
from jinja2.exceptions import TemplateError

from cpt_merge.checkpoint.loaded_tokenizer import end_tokens
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.data.conversations_thoughts import reasoning_field
from cpt_merge.evaluation.config import DEFAULTS, EVERY_MODEL, EvaluationConfig
from cpt_merge.evaluation.conversation import Conversation, Message, Reply
from cpt_merge.evaluation.models import LanguageModel, load_tokenizer
from cpt_merge.evaluation.thoughts import Thoughts, find_thoughts

PLACEHOLDERS = ("UserPlaceholder", "AssistantPlaceholder")
REFUSALS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class ChatTemplate:
    """How a model is prompted."""

    template: str
    end_tokens: list[str]  # those that end a reply
    marks: list[str]  # special tokens and other marks of the template
    source: str  # the directory that it comes from
    thoughts: Thoughts | None = None  # how thoughts are marked; None if there are none
    variables: Mapping[str, Any] = field(default_factory=dict)  # such as enable_thinking

    def render(self, tokenizer: Any, messages: Sequence[Message]) -> str:
        """The text of a conversation up to the start of the reply. Raises `UserError`."""
        return render(tokenizer, self.template, messages, self.variables)

    def begins_thought(self, prompt: str) -> bool:
        """Whether a rendered prompt has opened a thought, which the reply continues."""
        return self.thoughts is not None and self.thoughts.begin_in(prompt)

    def turn_of(self, reply: Reply) -> Message:
        """A reply as a message of the conversation that follows."""
        return turn_of(reply, self.template)


def turn_of(reply: Reply, template: Any) -> Message:
    """A reply as a message of the conversation that follows.

    Its thoughts are left out, or given to a template that decides itself.
    """
    name = reasoning_field(template) if reply.thought else None
    return {"role": "assistant", "content": reply.text, **({name: reply.thought} if name else {})}


def read_chat_template(
    directory: Path, config: EvaluationConfig = DEFAULTS, name: str = ""
) -> ChatTemplate:
    """The chat template of a model, which the recipe may know by a name.

    Raises `UserError` if it has none.
    """
    tokenizer = load_tokenizer(directory)
    if not tokenizer.chat_template:
        raise UserError(
            f"the chat model's tokenizer in {directory} has no chat template, so it cannot be "
            "prompted; add a chat_template."
        )
    return own_template(tokenizer, directory, config, name)


def own_template(
    tokenizer: Any, directory: Path, config: EvaluationConfig, name: str
) -> ChatTemplate:
    """The chat template of a tokenizer that has one, for the model that the recipe calls `name`."""
    thoughts = find_thoughts(tokenizer, tokenizer.chat_template, config.thoughts)
    return ChatTemplate(
        tokenizer.chat_template,
        end_tokens(directory, tokenizer),
        _without_marks_of(thoughts, template_marks(tokenizer)),
        str(directory),
        thoughts,
        config.template_variables(name),
    )


def first_template(models: Mapping[str, Path], config: EvaluationConfig = DEFAULTS) -> ChatTemplate:
    """The chat template of the first model that has one. Raises `UserError` if none has."""
    for name, directory in models.items():
        if load_tokenizer(directory).chat_template:
            return read_chat_template(directory, config, name)
    raise UserError(
        f"none of the models {', '.join(models)} has a chat template, so they cannot be prompted; "
        "name a chat model by --template DIR."
    )


def template_for(
    model: LanguageModel,
    directory: Path,
    chat: ChatTemplate,
    config: EvaluationConfig = DEFAULTS,
) -> ChatTemplate:
    """A model's own template, or the chat model's if it has none.

    With a template that is not its own, a model may end its reply with the chat model's end tokens
    as well, as far as its vocabulary has them.
    """
    tokenizer = model.tokenizer
    if tokenizer.chat_template:
        own = own_template(tokenizer, directory, config, model.name)
        return replace(own, marks=_without_marks_of(own.thoughts, [*chat.marks, *own.marks]))
    say(f"{model.name}: has no chat template; it is prompted in that of {chat.source}")
    vocabulary = tokenizer.get_vocab()
    known = (token for token in chat.end_tokens if token in vocabulary)
    thoughts = chat.thoughts or find_thoughts(tokenizer, None, config.thoughts)
    return ChatTemplate(
        chat.template,
        list(dict.fromkeys([*end_tokens(directory, tokenizer), *known])),
        _without_marks_of(thoughts, [*chat.marks, *special_tokens(tokenizer)]),
        chat.source,
        thoughts,
        config.template_variables(model.name),
    )


def _without_marks_of(thoughts: Thoughts | None, marks: Sequence[str]) -> list[str]:
    """The marks that no reply should contain: those of thoughts are allowed."""
    if thoughts is None:
        return sorted(set(marks))
    left = {one: thoughts.without_marks(one) for one in marks}
    return sorted({one for one, rest in left.items() if rest})


def check_prompts(
    models: Mapping[str, Path],
    chat: ChatTemplate,
    conversations: Sequence[Conversation],
    config: EvaluationConfig = DEFAULTS,
) -> None:
    """Render every first turn for every model, before any model is loaded.

    Raises `UserError` for a prompt that a template refuses, and for a variable that it lacks.
    """
    used: set[str] = set()
    for name, directory in models.items():
        tokenizer = load_tokenizer(directory)
        template = tokenizer.chat_template or chat.template
        variables = config.template_variables(name)
        own = config.chat_template_kwargs.get(name, {})
        check_variables(f"evaluation.chat_template_kwargs.{name}", template, own)
        used |= variables.keys() & _words(template)
        for conversation in conversations:
            try:
                render(tokenizer, template, conversation.turns[0].messages, variables)
            except UserError as error:
                raise UserError(f"model {name}, {conversation.questions[:60]!r}: {error}") from None
    unused = sorted(config.chat_template_kwargs.get(EVERY_MODEL, {}).keys() - used)
    if unused:
        raise UserError(
            f"evaluation.chat_template_kwargs.{EVERY_MODEL}.{unused[0]}: no model's chat template "
            "has this variable; correct or remove it."
        )


def check_variables(key: str, template: Any, variables: Mapping[str, Any]) -> None:
    """Raise `UserError` for variables that the template lacks; `key` is where they are set."""
    words = _words(template)
    for variable in variables:
        if variable not in words:
            near = difflib.get_close_matches(variable, sorted(words), 1)
            raise UserError(
                f"{key}.{variable}: the chat template has no such variable; "
                f"{f'the nearest is {near[0]}' if near else 'remove it'}."
            )


def _words(template: Any) -> set[str]:
    return set(regex.findall(r"[A-Za-z_]\w*", str(template)))


def render(
    tokenizer: Any,
    template: str,
    messages: Sequence[Message],
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation up to the start of the reply.

    Raises `UserError` if the template refuses it.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                **(variables or {}),
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
