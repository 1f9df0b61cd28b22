"""The chat model's format in the output's ids: stop ids, special ids, roles and template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.model_files import CONFIG_FILE, GENERATION_FILE
from cpt_merge.checkpoint.reader import read_json
from cpt_merge.checkpoint.tokenizer_files import DEFAULT, TokenizerFiles, read_stop_ids
from cpt_merge.core.progress import say

CARRIED_ROLES = ("bos_token", "eos_token", "pad_token")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ChatFormat:
    """How turns begin and replies end."""

    stop_ids: list[int]  # every id that ends a reply
    special_ids: dict[str, dict[str, Any]]  # configuration file -> its special ids
    roles: dict[str, str]
    templates: dict[str, str]  # by name, the default one first

    @property
    def template(self) -> str | None:
        """The default chat template."""
        return self.templates.get(DEFAULT)


class _Ids:
    """Maps ids of one tokenizer to the output's by token string; without tokens ids are equal."""

    def __init__(self, tokenizer: TokenizerFiles, rows: Mapping[str, int] | None) -> None:
        self.tokenizer, self.rows = tokenizer, rows

    def map(self, ids: list[int]) -> list[int]:
        """Ids that have no token in the output are left out, with a message."""
        if self.rows is None:
            return ids
        found = []
        for number in ids:
            token = self.tokenizer.tokens.get(number)
            if token is not None and token in self.rows:
                found.append(self.rows[token])
            else:
                say(
                    f"merge: {self.tokenizer.directory} names the id {number}, which has no token "
                    "in the output; the id is left out"
                )
        return found


def read_format(
    base: TokenizerFiles, chat: TokenizerFiles, rows: Mapping[str, int] | None
) -> ChatFormat:
    """The chat model's format.

    `rows` maps the output's tokens to their rows; None where rows meet by position.
    """
    of_chat, of_base = _Ids(chat, rows), _Ids(base, rows)
    roles = _roles(chat, rows)
    stops = of_chat.map(read_stop_ids(chat.directory))
    if rows is not None and "eos_token" in roles:
        stops.append(rows[roles["eos_token"]])
    stops = list(dict.fromkeys([*stops, *of_base.map(read_stop_ids(base.directory))]))
    special = {
        name: _special_ids(chat.directory / name, of_chat, stops)
        for name in (CONFIG_FILE, GENERATION_FILE)
    }
    return ChatFormat(stops, special, roles, chat.templates)


def _roles(chat: TokenizerFiles, rows: Mapping[str, int] | None) -> dict[str, str]:
    """bos, eos and pad. A token that the tokenizer does not contain is left out, with a message."""
    found = {}
    for role in CARRIED_ROLES:
        token = chat.roles.get(role)
        if token is None:
            continue
        if rows is None or token in rows:
            found[role] = token
        else:
            say(
                f"merge: {chat.directory} names {token!r} as its {role}, which it does not "
                "contain; it is left out"
            )
    return found


def _special_ids(path: Path, of_chat: _Ids, stops: list[int]) -> dict[str, Any]:
    config = read_json(path) if path.is_file() else {}
    values: dict[str, Any] = {}
    for name in ("bos_token_id", "pad_token_id"):
        if isinstance(config.get(name), int):
            ids = of_chat.map([config[name]])
            if ids:
                values[name] = ids[0]
    if stops:
        values["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    return values
