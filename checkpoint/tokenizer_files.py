"""What the files of a tokenizer say about its tokens, read without transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.reader import Checkpoint, read_json
from cpt_merge.checkpoint.token_ids import (
    DECODER,
    SETTINGS_FILE,
    SPECIALS_FILE,
    has_tokenizer,
    read_tokens,
    refuse_unread,
    unlisted,
)
from cpt_merge.core.artifact import write_text
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say

SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


TEMPLATE_FILE = "chat_template.jinja"
TEMPLATES_FOLDER = "additional_chat_templates"
DEFAULT = "default"


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a directory: tokens, roles, chat template."""

    directory: Path
    ids: dict[str, int]  # of every token string
    added: frozenset[str]  # tokens outside the vocabulary proper
    odd: str | None = None  # a token that loaders read at another id than the file says

    @staticmethod
    def read(directory: Path) -> TokenizerFiles | None:
        """None if the directory has no tokenizer.

        Raises `UserError` if it is damaged, or in files that are not read here.
        """
        if not has_tokenizer(directory):
            refuse_unread(directory)
            return None
        tokens = read_tokens(directory)
        return TokenizerFiles(directory, tokens.ids, tokens.added, tokens.odd)

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Id -> token string."""
        return {number: token for token, number in self.ids.items()}

    def require_listed(self) -> None:
        """Raise `UserError` if only the settings name a special token."""
        problem = unlisted(self.directory, self.ids)
        if problem:
            raise UserError(f"{problem}.")

    @cached_property
    def roles(self) -> dict[str, str]:
        """Role (`bos_token`, ...) -> token string, for the roles that have a token."""
        values = read_settings(self.directory)
        found = {role: token_text(values.get(role)) for role in SPECIAL_ROLES}
        return {role: token for role, token in found.items() if token is not None}

    @cached_property
    def templates(self) -> dict[str, str]:
        """Name -> chat template, the default one first.

        The default template is that of chat_template.jinja, tokenizer_config.json or the
        processor's chat_template.json, whichever is there first; the first of several if none is
        called so.
        """
        found: dict[str, str] = {}
        listed = self._config.get("chat_template")
        if isinstance(listed, list):
            found |= {str(entry["name"]): entry["template"] for entry in listed}
        for path in sorted((self.directory / TEMPLATES_FOLDER).glob("*.jinja")):
            found[path.stem] = _read_template(path)
        if isinstance(listed, str):
            found[DEFAULT] = listed
        own, processor = self.directory / TEMPLATE_FILE, self.directory / "chat_template.json"
        if own.is_file():
            found[DEFAULT] = _read_template(own)
        elif DEFAULT not in found and processor.is_file():
            template = read_json(processor).get("chat_template")
            found |= {DEFAULT: template} if isinstance(template, str) else {}
        default = DEFAULT if DEFAULT in found else next(iter(found), DEFAULT)
        first = {DEFAULT: found.pop(default)} if default in found else {}
        return {**first, **found}

    @property
    def chat_template(self) -> str | None:
        """The default chat template."""
        return self.templates.get(DEFAULT)

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_if_there(self.directory / "tokenizer_config.json")

    def format_tokens(self) -> set[str]:
        """The added tokens that the template names, literally or by role, and the stop tokens."""
        template = "\n".join(self.templates.values())
        literal = {token for token in self.added if token in template and not token.isspace()}
        by_role = {
            token for role, token in self.roles.items() if re.search(rf"\b{role}\b", template)
        }
        stop_ids = read_stop_ids(self.directory)
        stops = {self.tokens[number] for number in stop_ids if number in self.tokens}
        return (literal | by_role | stops) & self.added


def tokenizer_directory(model: Checkpoint) -> Path:
    """Where a model's tokenizer is: an adapter may leave it to its base model."""
    found = (directory for directory in model.directories if has_tokenizer(directory))
    return next(found, model.directory)


def write_templates(templates: Mapping[str, str], directory: Path) -> None:
    """Write chat templates as transformers saves them."""
    for name, template in templates.items():
        if name == DEFAULT:
            write_text(directory / TEMPLATE_FILE, template)
        elif re.fullmatch(r"[\w-]+", name):  # it becomes a file's name
            write_text(directory / TEMPLATES_FOLDER / f"{name}.jinja", template)
        else:
            say(f"the chat template {name!r} is left out, because no file can be called so")


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it.") from None


def token_text(value: Any) -> str | None:
    """A token in a tokenizer's configuration: a string, an object with `content`, or nothing."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def read_stop_ids(directory: Path) -> list[int]:
    """The ids that end a reply, from generation_config.json or else config.json."""
    for file in ("generation_config.json", "config.json"):
        ids = read_if_there(directory / file).get("eos_token_id")
        if ids is not None:
            try:
                return [int(number) for number in (ids if isinstance(ids, list) else [ids])]
            except (ValueError, TypeError):
                raise UserError(
                    f"{directory / file} has eos_token_id {ids!r}, not a token id; correct it."
                ) from None
    return []


def read_settings(directory: Path) -> dict[str, Any]:
    """The settings of a tokenizer, with the special tokens that transformers takes.

    special_tokens_map.json counts more than tokenizer_config.json, unless that lists the added
    tokens as well.
    """
    settings = read_if_there(directory / SETTINGS_FILE)
    return settings if DECODER in settings else settings | read_if_there(directory / SPECIALS_FILE)


def read_if_there(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no file."""
    return read_json(path) if path.is_file() else {}
