"""Prompt files in the formats of other projects: `FORMAT:LANGUAGE:PATH` instead of a path.

`ifeval:ko:ifeval-ko.jsonl` is read as lines of our own format; `multi-if:PATH` has a language in
each row. A row that our checks cannot judge raises `UnsupportedRowError`: it is left out and
counted.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.core.spelling import nearest

Row = dict[str, Any]


class UnsupportedRowError(Exception):
    """A row without a counterpart here; the text says what it asks for."""


@dataclass(frozen=True)
class Format:
    """A format: the recipe's keys that take it, and how one of its rows is written in ours.

    A row that has a language of its own needs none in the path.
    """

    keys: tuple[str, ...]
    convert: Callable[[Row], Row]
    with_language: bool = False


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts. Without a format it is in ours."""

    path: Path
    format: Format | None = None
    language: str | None = None


def parse_path(given: str, key: str) -> PromptFile:
    """The file that the recipe's `key` names. Raises `UserError` for a format that does not fit."""
    name, colon, rest = given.partition(":")
    if not colon or name not in FORMATS:
        return PromptFile(Path(given).expanduser())
    found = FORMATS[name]
    if key not in found.keys:
        raise UserError(f"{key} = {given}: {name} is a format of {' and '.join(found.keys)}.")
    language, colon, path = rest.partition(":")
    if colon:
        try:
            return PromptFile(Path(path).expanduser(), found, find_language(language).tag)
        except UserError as error:
            raise UserError(f"{key} = {given}: {error}") from None
    if not found.with_language:
        raise UserError(f"{key} = {given} names no language; write {name}:LANGUAGE:PATH.")
    return PromptFile(Path(rest).expanduser(), found)


def check_format(given: str | None) -> str | None:
    """The value of a key for prompts. Raises `ValueError` for a format that does not exist."""
    if given is None:
        return None
    name, colon, _ = given.partition(":")
    named = colon and regex.fullmatch(r"[\w-]{2,}", name) and not Path(given).expanduser().exists()
    if named and name not in FORMATS:
        formats = ", ".join(FORMATS)
        raise ValueError(
            f"there is no format {name!r}{nearest(name, FORMATS)}; there are {formats}"
        )
    return given


def without_format(given: str) -> str:
    """The path in a value such as `ifeval:ko:PATH`."""
    name, _, rest = given.partition(":")
    if name not in FORMATS:
        return given
    language, colon, path = rest.partition(":")
    return path if colon else language


def read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a table by line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield reader.line_num, {name: value for name, value in row.items() if name}


def _text(row: Row, *names: str) -> str:
    for name in names:
        if isinstance(row.get(name), str) and row[name].strip():
            return str(row[name])
    raise ValueError(f'the field "{names[0]}" with text is missing')


def _list(value: Any, name: str) -> list[Any]:
    """A list, which some files write as JSON in a string."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list):
        raise ValueError(f'"{name}" is no list')
    return value


def _instruction(row: Row) -> Row:
    """IFEval: prompt, instruction_id_list, kwargs."""
    checks = _checks(row.get("instruction_id_list"), row.get("kwargs"))
    return {"messages": [{"role": "user", "content": _text(row, "prompt")}], "checks": checks}


def _multi_turn(row: Row) -> Row:
    """Multi-IF: turn_1_prompt, turn_1_instruction_id_list, turn_1_kwargs, ..., language."""
    turns = []
    for number in range(1, 6):
        name = f"turn_{number}_prompt"
        if not row.get(name) or row[name] == "None":
            break
        asked = _text(row, name)
        if asked.lstrip().startswith("{"):
            asked = str(json.loads(asked)["content"])
        ids = row.get(f"turn_{number}_instruction_id_list")
        turns.append({"user": asked, "checks": _checks(ids, row.get(f"turn_{number}_kwargs"))})
    if not turns:
        raise ValueError('the field "turn_1_prompt" is missing')
    if len(turns) == 1:
        raise UnsupportedRowError("a dialogue of one turn")
    converted: Row = {"turns": turns}
    if "language" in row:
        name = _text(row, "language")
        if name not in LANGUAGE_NAMES:
            raise UnsupportedRowError(f"language {name}")
        converted["language"] = LANGUAGE_NAMES[name]
    return converted


LANGUAGE_NAMES = {"Chinese": "zh_cn", "English": "en", "Korean": "ko", "Japanese": "ja"}


def _question(row: Row) -> Row:
    """MT-bench: turns, reference; LogicKor: questions, references."""
    turns = row.get("turns", row.get("questions"))
    references = row.get("reference", row.get("references"))
    converted: Row = {"turns": _list(turns, "turns")}
    if references is not None:
        converted["reference"] = [one or None for one in _list(references, "reference")]
    return converted | _category(row, "category")


def _single_question(row: Row) -> Row:
    """AlignBench: question, reference, category; Vicuna: text, category."""
    reference = row.get("reference")
    converted: Row = {"turns": [_text(row, "question", "text")]}
    if isinstance(reference, str) and reference.strip():
        converted["reference"] = [reference]
    return converted | _category(row, "category")


def _safety(row: Row) -> Row:
    """XSTest: prompt, type, label (safe or unsafe); older files have no label."""
    kind = str(row.get("type") or "")
    label = str(row.get("label") or ("unsafe" if kind.startswith("contrast_") else "safe"))
    if label not in ("safe", "unsafe"):
        raise ValueError(f'"label" is {label!r}, and neither safe nor unsafe')
    asked = [{"role": "user", "content": _text(row, "prompt")}]
    return {"messages": asked, "safe": label == "safe"} | _category(row, "type")


def _category(row: Row, name: str) -> Row:
    return {"category": str(row[name])} if row.get(name) else {}


def _checks(ids: Any, arguments: Any) -> list[Row]:
    names = _list(ids, "instruction_id_list")
    given = _list(arguments, "kwargs") if arguments else [{}] * len(names)
    if len(given) != len(names):
        raise ValueError(f'"kwargs" has {len(given)} entries for {len(names)} instructions')
    checks: list[Row] = []
    for name, one in zip(names, given, strict=True):
        values = json.loads(one) if isinstance(one, str) else one or {}
        values = {key: value for key, value in values.items() if value is not None}
        if name not in INSTRUCTIONS:
            raise UnsupportedRowError(f"instruction {name}")
        try:
            checks += INSTRUCTIONS[name](values)
        except KeyError as error:
            raise ValueError(f"instruction {name} needs {error.args[0]!r} in kwargs") from None
    return checks


def _limits(values: Row, number: str, relation: str) -> Row:
    if values.get(relation) == "less than":
        return {"at_most": int(values[number]) - 1}
    return {"at_least": int(values[number])}


CHINESE_CODES = {"zh": "zh_cn", "zh-cn": "zh_cn", "zh-tw": "zh_tw"}


def _language_check(values: Row) -> list[Row]:
    code = str(values["language"])
    tag = CHINESE_CODES.get(code.lower(), code)
    try:
        return [{"name": "language", "language": find_language(tag).tag}]
    except UserError:
        raise UnsupportedRowError(f"language {code}") from None


def _first_word(values: Row) -> list[Row]:
    return [
        {"name": "paragraphs", "exactly": int(values["num_paragraphs"])},
        {
            "name": "paragraph_starts_with",
            "paragraph": int(values["nth_paragraph"]),
            "text": values["first_word"],
        },
    ]


TWO_RESPONSES = r"(?s)\A\s*(\S(?:.*?\S)?)\s*\*{6}\s*+(?!\1\s*\Z)(?:(?!\*{6}).)*\S\s*\Z"
INSTRUCTIONS: Mapping[str, Callable[[Row], list[Row]]] = {
    "keywords:existence": lambda kw: [
        {"name": "occurrences", "word": word, "at_least": 1} for word in kw["keywords"]
    ],
    "keywords:frequency": lambda kw: [
        {"name": "occurrences", "word": kw["keyword"], **_limits(kw, "frequency", "relation")}
    ],
    "keywords:forbidden_words": lambda kw: [{"name": "avoids", "words": kw["forbidden_words"]}],
    "keywords:letter_frequency": lambda kw: [
        {
            "name": "letters",
            "letter": kw["letter"],
            **_limits(kw, "let_frequency", "let_relation"),
        }
    ],
    "language:response_language": _language_check,
    "length_constraints:number_sentences": lambda kw: [
        {"name": "sentences", **_limits(kw, "num_sentences", "relation")}
    ],
    "length_constraints:number_paragraphs": lambda kw: [
        {"name": "paragraphs", "exactly": int(kw["num_paragraphs"])}
    ],
    "length_constraints:number_words": lambda kw: [
        {"name": "words", **_limits(kw, "num_words", "relation")}
    ],
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda kw: [
        {"name": "placeholders", "count": int(kw["num_placeholders"])}
    ],
    "detectable_content:postscript": lambda kw: [
        {"name": "matches", "pattern": "(?i)" + regex.escape(kw["postscript_marker"])}
    ],
    "detectable_format:number_bullet_lists": lambda kw: [
        {"name": "bullets", "exactly": int(kw["num_bullets"])}
    ],
    "detectable_format:constrained_response": lambda kw: [
        {"name": "matches", "pattern": r"(?i)my answer is (yes|no|maybe)\."}
    ],
    "detectable_format:number_highlighted_sections": lambda kw: [
        {"name": "highlights", "count": int(kw["num_highlights"])}
    ],
    "detectable_format:multiple_sections": lambda kw: [
        {
            "name": "sections",
            "heading": kw["section_spliter"],
            "at_least": int(kw["num_sections"]),
        }
    ],
    "detectable_format:json_format": lambda kw: [{"name": "json_only"}],
    "detectable_format:title": lambda kw: [{"name": "matches", "pattern": r"<<[^\n]+>>"}],
    "combination:two_responses": lambda kw: [{"name": "matches", "pattern": TWO_RESPONSES}],
    "combination:repeat_prompt": lambda kw: [
        {"name": "starts_with", "text": kw["prompt_to_repeat"]}
    ],
    "startend:end_checker": lambda kw: [{"name": "ends_with", "text": kw["end_phrase"]}],
    "startend:quotation": lambda kw: [{"name": "quoted"}],
    "change_case:capital_word_frequency": lambda kw: [
        {"name": "capital_words", **_limits(kw, "capital_frequency", "capital_relation")}
    ],
    "change_case:english_capital": lambda kw: [{"name": "uppercase"}],
    "change_case:english_lowercase": lambda kw: [{"name": "lowercase"}],
    "punctuation:no_comma": lambda kw: [{"name": "no_commas"}],
}

QUESTIONS = ("evaluation.judge.questions",)
FORMATS: Mapping[str, Format] = {
    "ifeval": Format(("evaluation.instructions",), _instruction),
    "multi-if": Format(("evaluation.dialogues",), _multi_turn, with_language=True),
    "mt-bench": Format(QUESTIONS, _question),
    "logickor": Format(QUESTIONS, _question),
    "alignbench": Format(QUESTIONS, _single_question),
    "vicuna": Format(QUESTIONS, _single_question),
    "xstest": Format(("evaluation.safety.prompts",), _safety),
}
