"""Prompts and dialogues from files, one JSON object a line; whatever is wrong is said with file, line and field.

{"language": "ko", "messages": [{"role": "user", "content": "..."}],          a prompt
 "checks": [{"name": "sentences", "exactly": 3}], "category": "..."}          (both as the evaluator needs them)
{"language": "ko", "messages": [...],                                         a dialogue; messages: what comes
 "turns": [{"user": "...", "checks": [...]}, {"user": "..."}]}                before its first turn, may be left out
{"language": "ko", "turns": ["...", "..."], "category": "...",                an open question for a judge, of one or
 "reference": ["...", null]}                                                  more turns; references may be left out
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.core.progress import say
from cpt_merge.evaluation.checks import Check, parse_check
from cpt_merge.evaluation.config import BUILT_IN
from cpt_merge.evaluation.conversation import ROLES, Conversation, Message, Turn

FEWEST_TURNS, MOST_TURNS = 2, 5
PACKAGED = files("cpt_merge.evaluation") / "prompts"

Parse = Callable[[Any, str], Conversation]  # (row, "file, line 3")


def read_conversations(
    path: str, key: str, parse: Parse, languages: Sequence[str], limit: int, built_in: str = ""
) -> list[Conversation]:
    """The first `limit` conversations of each language, in file order.

    `key` is the recipe's that named the file. `languages`: only these, all if empty. For the path
    "built-in" the packaged files of `built_in`, one per language, are read. Raises `UserError` that
    names file, line and field.
    """
    if path == BUILT_IN:
        found = list(_built_in(built_in, parse, languages))
        if not found:
            raise UserError(
                f"there are no built-in {built_in} in {', '.join(languages)}; give a file by {key}."
            )
    else:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"prompts file {file} does not exist; correct {key}.")
        found = list(read_file(file, parse))
        if not found:
            raise UserError(f"prompts file {file} holds no prompts.")
        found = [
            conversation
            for conversation in found
            if not languages or conversation.language in languages
        ]
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
    return kept


def _built_in(name: str, parse: Parse, languages: Sequence[str]) -> Iterator[Conversation]:
    folder = PACKAGED / name
    there = sorted(
        entry.name.removesuffix(".jsonl")
        for entry in folder.iterdir()
        if entry.name.endswith(".jsonl")
    )
    for language in languages or there:
        if language in there:
            with as_file(folder / f"{language}.jsonl") as file:
                yield from read_file(file, parse)
        else:
            say(f"built-in {name}: none in {language}, only in {', '.join(there)}")


def read_file(path: Path, parse: Parse) -> Iterator[Conversation]:
    """Every conversation of a file. Raises `UserError` that names file and line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split(
            "\n"
        )  # a mark of byte order is no part of the text
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompts file {path} is not UTF-8 (byte {error.start}); convert it."
        ) from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{where} holds half of a surrogate pair (\\ud800 to \\udfff); correct the text."
                ) from None
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{where} is not JSON ({error}); each line is one prompt."
                ) from None
            yield parse(row, where)


def parse_prompt(row: Any, where: str) -> Conversation:
    """A prompt whose reply is judged by its form alone."""
    _needs(row, where, "a prompt", "language", "messages")
    return Conversation(
        _language(row, where), (Turn(_messages(row["messages"], where)),), _category(row, where)
    )


def parse_instruction(row: Any, where: str) -> Conversation:
    """A prompt with at least one check."""
    _needs(row, where, "an instruction", "language", "messages", "checks")
    turn = Turn(_messages(row["messages"], where), _checks(row["checks"], where))
    if not turn.checks:
        raise UserError(f'{where}: "checks" is empty, so no reply could fail; add a check.')
    return Conversation(_language(row, where), (turn,), _category(row, where))


def parse_dialogue(row: Any, where: str) -> Conversation:
    """A dialogue of 2 to 5 turns of the user's, at least one of them checked."""
    _needs(row, where, "a dialogue", "language", "turns")
    rows = row["turns"]
    if not isinstance(rows, list) or not FEWEST_TURNS <= len(rows) <= MOST_TURNS:
        raise UserError(
            f'{where}: "turns" is a list of {FEWEST_TURNS} to {MOST_TURNS} turns of the user\'s.'
        )
    before = row.get("messages", [])
    if before and (
        not isinstance(before, list)
        or not all(map(_is_message, before))
        or before[-1]["role"] == "user"
    ):
        raise UserError(
            f'{where}: "messages" of a dialogue come before its first turn, so no user\'s may be the last.'
        )
    turns = [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(rows, start=1)]
    if not any(turn.checks for turn in turns):
        raise UserError(f'{where}: no turn has "checks", so no reply could fail; add some.')
    turns[0] = Turn([_message(message) for message in before] + turns[0].messages, turns[0].checks)
    return Conversation(_language(row, where), tuple(turns), _category(row, where))


def parse_question(row: Any, where: str) -> Conversation:
    """An open question of 1 to 5 turns of the user's, for a judge."""
    _needs(row, where, "a question", "language", "turns")
    turns = row["turns"]
    if not isinstance(turns, list) or not all(
        isinstance(turn, str) and turn.strip() for turn in turns
    ):
        raise UserError(f'{where}: "turns" is a list of what the user says, each of them text.')
    if not 1 <= len(turns) <= MOST_TURNS:
        raise UserError(f'{where}: "turns" is a list of 1 to {MOST_TURNS} turns of the user\'s.')
    references = row.get("reference", [])
    if not isinstance(references, list) or not all(
        one is None or isinstance(one, str) for one in references
    ):
        raise UserError(
            f'{where}: "reference" is a list of good replies, one a turn, null where there is none.'
        )
    asked = tuple(Turn([{"role": "user", "content": turn}]) for turn in turns)
    return Conversation(_language(row, where), asked, _category(row, where), tuple(references))


def _turn(row: Any, where: str) -> Turn:
    if not isinstance(row, dict) or not isinstance(row.get("user"), str) or not row["user"].strip():
        raise UserError(f'{where}: it needs the field "user", what the user says.')
    return Turn([{"role": "user", "content": row["user"]}], _checks(row.get("checks", []), where))


def _needs(row: Any, where: str, what: str, *fields: str) -> None:
    if not isinstance(row, dict) or not set(fields) <= row.keys():
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        named = " and ".join(f'"{name}"' for name in fields)
        raise UserError(
            f"{where}: {what} needs the fields {named}; {', '.join(missing)} is missing."
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


def _messages(messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise UserError(
            f'{where}: each of "messages" is {{"role": {" or ".join(ROLES)}, "content": text}}.'
        )
    if not messages or messages[-1]["role"] != "user":
        raise UserError(
            f"{where}: the last message is not the user's, so there is nothing to reply to."
        )
    return [_message(message) for message in messages]


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
