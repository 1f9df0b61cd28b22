"""Prompts and dialogues from files; an error names file, line and field.

A prompt, with the fields that its evaluator needs:
    {"language": "ko", "messages": [{"role": "user", "content": "..."}],
     "checks": [{"name": "sentences", "exactly": 3}], "category": "...", "safe": true}
A dialogue; `messages` precede its first turn and are optional:
    {"language": "ko", "messages": [...], "turns": [{"user": "...", "checks": [...]}, ...]}
An open question for a judge, of one or more turns; messages and references are optional:
    {"language": "ko", "turns": ["...", "..."], "category": "...", "reference": ["...", null]}
Any of them may have an "id" and a "comment", which are not used. Other fields are errors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.core.progress import say
from cpt_merge.core.spelling import nearest
from cpt_merge.data.readers.json_records import parse_json, read_json
from cpt_merge.data.readers.rows import BadRow
from cpt_merge.evaluation.checks import Check, parse_check
from cpt_merge.evaluation.config import BUILT_IN
from cpt_merge.evaluation.conversation import ROLES, Conversation, Message, Turn
from cpt_merge.evaluation.prompt_formats import (
    PromptFile,
    UnsupportedRowError,
    parse_path,
    read_csv,
)

UNUSED = ("id", "comment")
FEWEST_TURNS, MOST_TURNS = 2, 5
PACKAGED = files("cpt_merge.evaluation") / "prompts"

Parse = Callable[[Any, str], Conversation]  # (row, "file, line 3")


def read_conversations(
    path: str, key: str, parse: Parse, languages: Sequence[str], limit: int, built_in: str = ""
) -> list[Conversation]:
    """The first `limit` conversations of each language, in the order of the file.

    `key` is the recipe's key that names the file; `languages` are those to read, all if empty. The
    path "built-in" stands for the packaged files of `built_in`, one per language. Raises
    `UserError` that names file, line and field.
    """
    if path == BUILT_IN:
        found = list(_built_in(built_in, parse, languages))
        if not found:
            raise UserError(
                f"there are no built-in {built_in} in {', '.join(languages)}; name a file by {key}."
            )
    else:
        asked = parse_path(path, key)
        file = asked.path
        if not file.is_file():
            raise UserError(f"prompts file {file} does not exist; correct {key}.")
        found = list(_read_file(file, parse) if asked.format is None else _converted(asked, parse))
        if not found:
            raise UserError(f"prompts file {file} holds no prompts.")
        found = [one for one in found if not languages or one.language in languages]
        if not found:
            raise UserError(
                f"prompts file {file} holds no prompt in {', '.join(languages)}; correct {key}."
            )
    counts: Counter[str] = Counter()
    kept = []
    for conversation in found:
        counts[conversation.language] += 1
        if counts[conversation.language] <= limit:
            kept.append(conversation)
    if len(kept) < len(found):
        most = ", ".join(f"{n} in {one}" for one, n in counts.items() if n > limit)
        say(f"{key}: {path} has {most}; the first {limit} of each language are asked")
    return kept


def _built_in(name: str, parse: Parse, languages: Sequence[str]) -> Iterator[Conversation]:
    folder = PACKAGED / name
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(".jsonl")]
    available = sorted(name.removesuffix(".jsonl") for name in names)
    for language in languages or available:
        if language in available:
            with as_file(folder / f"{language}.jsonl") as file:
                yield from _read_file(file, parse)
        else:
            say(f"built-in {name}: none in {language}, only in {', '.join(available)}")


def _read_file(path: Path, parse: Parse) -> Iterator[Conversation]:
    """Every conversation of a file. Raises `UserError` that names file and line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # drops a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompts file {path} is not UTF-8 (byte {error.start}); convert it."
        ) from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(f"{where} {error}; write one prompt per line.") from None
            yield parse(row, where)


def _converted(asked: PromptFile, parse: Parse) -> Iterator[Conversation]:
    """Every conversation of a file in another project's format, without those left out.

    Raises `UserError` that names file and line; what is left out is counted in a message.
    """
    assert asked.format is not None
    rows = read_csv(asked.path) if asked.path.suffix == ".csv" else read_json(asked.path)
    left_out: Counter[str] = Counter()
    read = 0
    for number, row in rows:
        where = f"{asked.path}, line {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: {row if isinstance(row, BadRow) else 'it'} is no object.")
        try:
            converted = asked.format.convert(row)
        except UnsupportedRowError as reason:
            left_out[str(reason)] += 1
            continue
        except ValueError as error:
            raise UserError(f"{where}: {error}.") from None
        language = {"language": asked.language} if asked.language else {}
        if asked.language and converted.get("language", asked.language) != asked.language:
            continue
        read += 1
        yield parse({**converted, **language}, where)
    if left_out:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in left_out.most_common())
        sentence = f"{asked.path}: {left_out.total()} prompts cannot be checked here: {reasons}"
        if not read:
            raise UserError(f"{sentence}; none is left.")
        say(f"{sentence}; they are left out, and {read} are left")


def parse_prompt(row: Any, where: str) -> Conversation:
    """A prompt. Of its checks, only the language that they ask for is used."""
    _fields(row, where, "a prompt", ("language", "messages"), ("category", "safe", "checks"))
    turn = Turn(_messages(row["messages"], where), _checks(row.get("checks", []), where))
    return Conversation(
        _language(row, where), (turn,), _category(row, where), safe=_safe(row, where)
    )


def parse_instruction(row: Any, where: str) -> Conversation:
    """A prompt with at least one check."""
    _fields(row, where, "an instruction", ("language", "messages", "checks"), ("category",))
    turn = Turn(_messages(row["messages"], where), _checks(row["checks"], where))
    if not turn.checks:
        raise UserError(f'{where}: "checks" is empty, so no reply could fail; add a check.')
    return Conversation(_language(row, where), (turn,), _category(row, where))


def parse_dialogue(row: Any, where: str) -> Conversation:
    """A dialogue with 2 to 5 messages of the user, of which at least one has checks."""
    _fields(row, where, "a dialogue", ("language", "turns"), ("messages", "category"))
    rows = row["turns"]
    if not isinstance(rows, list) or not FEWEST_TURNS <= len(rows) <= MOST_TURNS:
        raise UserError(f'{where}: "turns" is a list of {FEWEST_TURNS} to {MOST_TURNS} turns.')
    before = _before(row, where)
    turns = [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(rows, start=1)]
    if not any(turn.checks for turn in turns):
        raise UserError(f'{where}: no turn has "checks", so no reply could fail; add some.')
    turns[0] = Turn(before + turns[0].messages, turns[0].checks)
    return Conversation(_language(row, where), tuple(turns), _category(row, where))


def _before(row: Any, where: str) -> list[Message]:
    """The messages before the first turn, such as a system prompt."""
    before = row.get("messages", [])
    if before and (_message_list(before, where)[-1]["role"] == "user"):
        raise UserError(
            f'{where}: "messages" precede the first turn, so the last one must not be the user\'s.'
        )
    return [_message(message) for message in before]


def _turn(row: Any, where: str) -> Turn:
    if not isinstance(row, dict) or not isinstance(row.get("user"), str) or not row["user"].strip():
        raise UserError(f'{where}: the field "user" with the user\'s message is missing.')
    _no_others(row, where, ("user", "checks"))
    return Turn([{"role": "user", "content": row["user"]}], _checks(row.get("checks", []), where))


def parse_question(row: Any, where: str) -> Conversation:
    """An open question with 1 to 5 messages of the user, for a judge."""
    optional = ("messages", "category", "reference")
    _fields(row, where, "a question", ("language", "turns"), optional)
    turns = row["turns"]
    if not isinstance(turns, list) or not all(
        isinstance(turn, str) and turn.strip() for turn in turns
    ):
        raise UserError(f'{where}: "turns" is a list of the user\'s messages.')
    if not 1 <= len(turns) <= MOST_TURNS:
        raise UserError(f'{where}: "turns" is a list of 1 to {MOST_TURNS} messages of the user.')
    references = row.get("reference", [])
    if not isinstance(references, list) or not all(
        one is None or isinstance(one, str) for one in references
    ):
        raise UserError(
            f'{where}: "reference" is a list with a good reply, or null, for each turn.'
        )
    if len(references) > len(turns):
        raise UserError(f'{where}: "reference" has more entries than "turns".')
    asked = [Turn([{"role": "user", "content": turn}]) for turn in turns]
    asked[0] = Turn(_before(row, where) + asked[0].messages)
    category = _category(row, where)
    return Conversation(_language(row, where), tuple(asked), category, tuple(references))


def parse_beginning(language: str) -> Parse:
    """A reader of beginnings of texts in a language, {"prompt": "..."} or RealToxicityPrompts'
    {"prompt": {"text": "..."}}, whose challenging prompts are a category."""

    def parse(row: Any, where: str) -> Conversation:
        of_others = ("challenging", "filename", "begin", "end", "continuation")
        _fields(row, where, "a beginning", ("prompt",), ("category", *of_others))
        asked = row["prompt"]
        text = asked.get("text") if isinstance(asked, dict) else asked
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{where}: "prompt" is not the beginning of a text.')
        category = _category(row, where)
        if category is None and row.get("challenging") is True:
            category = "challenging"
        return Conversation(language, (Turn([{"role": "user", "content": text}]),), category)

    return parse


def _fields(
    row: Any, where: str, what: str, needed: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    """Raise `UserError` for a row that lacks a field, or has one that nobody would read."""
    if isinstance(row, dict):  # a misspelt field first, since it is why another is missing
        _no_others(row, where, (*needed, *optional, *UNUSED))
    missing = [name for name in needed if not isinstance(row, dict) or name not in row]
    if missing:
        named = " and ".join(f'"{name}"' for name in needed)
        raise UserError(
            f"{where}: {what} needs the fields {named}; {', '.join(missing)} is missing."
        )


def _no_others(row: dict[str, Any], where: str, known: tuple[str, ...]) -> None:
    for name in row:
        if name not in known:
            fields = ", ".join(f'"{one}"' for one in known if one not in UNUSED)
            raise UserError(
                f'{where}: the field "{name}" is not known{nearest(name, known)}; '
                f"there are {fields}."
            )


def _language(row: Any, where: str) -> str:
    try:
        return find_language(str(row["language"])).tag
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _category(row: Any, where: str) -> str | None:
    category = row.get("category")
    if category is not None and not isinstance(category, str):
        raise UserError(f'{where}: "category" is not text.')
    return category


def _safe(row: Any, where: str) -> bool | None:
    safe = row.get("safe")
    if safe is not None and not isinstance(safe, bool):
        raise UserError(f'{where}: "safe" is true or false.')
    return safe


def _messages(messages: Any, where: str) -> list[Message]:
    messages = _message_list(messages, where)
    if not messages or messages[-1]["role"] != "user":
        raise UserError(
            f"{where}: the last message is not the user's, so there is nothing to reply to."
        )
    return [_message(message) for message in messages]


def _message_list(messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        roles = " or ".join(ROLES)
        raise UserError(f'{where}: each of "messages" is {{"role": {roles}, "content": text}}.')
    for message in messages:
        _no_others(message, where, ("role", "content"))
    return messages


def _message(message: Message) -> Message:
    return {"role": message["role"], "content": message["content"]}


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ROLES
        and isinstance(message.get("content"), str)
    )


def _checks(rows: Any, where: str) -> tuple[Check, ...]:
    if not isinstance(rows, list):
        raise UserError(f'{where}: "checks" is a list.')
    return tuple(parse_check(row, where) for row in rows)
