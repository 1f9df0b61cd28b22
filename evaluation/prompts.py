"""What is asked and what is read: prompts from a file, held-out documents from the corpus."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.languages import find_language
from core.sources import Corpus
from evaluation.config import EvaluationConfig

ROLES = ("system", "user", "assistant")
Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """A conversation whose last turn is the user's, and the language the reply should be in."""

    language: str
    messages: list[Message]


def read_prompts(config: EvaluationConfig) -> list[Prompt]:
    """The first `max_prompts` prompts of each language, in file order; none where no file is given.

    Raises `UserError` that names file, line and field.
    """
    if config.prompts is None:
        return []
    path = Path(config.prompts).expanduser()
    if not path.is_file():
        raise UserError(f"prompts file {path} does not exist; correct evaluation.prompts.")
    counts: Counter[str] = Counter()
    prompts = []
    for prompt in _parse(path):
        counts[prompt.language] += 1
        if counts[prompt.language] <= config.max_prompts:
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"prompts file {path} holds no prompts.")
    return prompts


def _parse(path: Path) -> Iterator[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"prompts file {path} is not UTF-8 (byte {error.start}); convert it.") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not JSON ({error}); each line is one prompt.") from None
            yield _prompt(row, where)


def _prompt(row: Any, where: str) -> Prompt:
    if not isinstance(row, dict) or not {"language", "messages"} <= row.keys():
        raise UserError(f'{where}: a prompt needs the fields "language" and "messages".')
    try:
        language = find_language(row["language"]).tag
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    messages = row["messages"]
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise UserError(f'{where}: each of "messages" is {{"role": {" or ".join(ROLES)}, "content": text}}.')
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: the last message is not the user's, so there is nothing to reply to.")
    return Prompt(language, [{"role": message["role"], "content": message["content"]} for message in messages])


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)


def heldout_documents(config: EvaluationConfig, corpus: Corpus) -> dict[str, list[str]]:
    """Held-out documents by language: the sources of a language in turns, until `documents` or `max_bytes` are reached.

    The document that would pass `max_bytes` is cut there, at a whole character. Raises `UserError` for a language
    without any.
    """
    found = {}
    for language in corpus.languages():
        streams = [corpus.documents(source, "heldout") for source in corpus.of_language(language)]
        in_turns = (text for text in chain.from_iterable(zip_longest(*streams)) if text is not None)
        texts: list[str] = []
        left = config.max_bytes
        for text in in_turns:
            cut = text.encode()[:left].decode(errors="ignore")
            if cut:
                texts.append(cut)
            left -= len(text.encode())
            if left <= 0 or len(texts) == config.documents:
                break
        if not texts:
            raise UserError(f"corpus: no document in {language!r} is held out; raise corpus.heldout or add text.")
        found[language] = texts
    return found
