"""Give a tokenizer the special tokens of a chat format: appended, or in place of reserved tokens.

Vocabulary is never added like this; `tokenizer_ext` extends the model of the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.reader import read_json
from cpt_merge.checkpoint.tokenizer_files import read_tokens
from cpt_merge.core.artifact import write_json, write_text
from cpt_merge.core.errors import UserError

_PLAIN = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


@dataclass(frozen=True)
class TokenChanges:
    """`appended`: token -> its new id. `renamed`: token -> the reserved token whose id it takes."""

    appended: dict[str, int] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.appended or self.renamed)


def apply(changes: TokenChanges, directory: Path, origin: Path) -> None:
    """Change the tokenizer's files in `directory`; its new tokens behave as those in `origin`.

    Raises `UserError` if the tokenizer, read back, has one of the tokens at another id.
    """
    if not changes:
        return
    before, behaviour = read_tokens(directory).ids, _behaviour(origin)
    tokens = [*changes.appended, *changes.renamed]
    new = {token: {**_PLAIN, **behaviour.get(token, {})} for token in tokens}
    if (directory / "tokenizer.json").is_file():
        _change_fast(changes, new, directory / "tokenizer.json")
    else:
        listed = directory / "added_tokens.json"
        known = read_json(listed) if listed.is_file() else {}
        write_json(listed, {**_renamed_keys(known, changes), **changes.appended})
    _change_settings(changes, new, directory / "tokenizer_config.json")
    replaced = {token: before[reserved] for token, reserved in changes.renamed.items()}
    _verify({**changes.appended, **replaced}, directory)


def _behaviour(origin: Path) -> dict[str, dict[str, Any]]:
    """Token -> how a tokenizer.json says that it is matched."""
    path = origin / "tokenizer.json"
    tokens = read_json(path).get("added_tokens", []) if path.is_file() else []
    return {
        token["content"]: {name: token[name] for name in _PLAIN if name in token}
        for token in tokens
    }


def _change_fast(changes: TokenChanges, new: Mapping[str, dict[str, Any]], path: Path) -> None:
    content = read_json(path)
    becomes = {reserved: token for token, reserved in changes.renamed.items()}
    tokens = [
        {"id": entry["id"], "content": becomes[entry["content"]], **new[becomes[entry["content"]]]}
        if entry["content"] in becomes
        else entry
        for entry in content["added_tokens"]
    ]
    tokens += [
        {"id": number, "content": token, **new[token]} for token, number in changes.appended.items()
    ]
    content["added_tokens"] = sorted(tokens, key=lambda entry: int(entry["id"]))
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):  # tokens outside of it get consecutive ids, without holes
        added = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
        content["model"]["vocab"] = {**_renamed_keys(vocabulary, changes), **added}
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1))


def _renamed_keys(values: Mapping[str, Any], changes: TokenChanges) -> dict[str, Any]:
    becomes = {reserved: token for token, reserved in changes.renamed.items()}
    return {becomes.get(token, token): number for token, number in values.items()}


def _change_settings(changes: TokenChanges, new: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Change `added_tokens_decoder`, if the settings have one or there is no tokenizer.json.

    A renamed token is renamed everywhere: a loader would add it again under its old name.
    """
    becomes = {reserved: token for token, reserved in changes.renamed.items()}
    for file in (path, path.with_name("special_tokens_map.json")):
        if file.is_file() and becomes:
            write_json(file, _renamed(read_json(file), becomes))
    settings = read_json(path) if path.is_file() else {}
    if "added_tokens_decoder" not in settings and (path.parent / "tokenizer.json").is_file():
        return
    decoder = dict(settings.get("added_tokens_decoder", {}))
    for number, entry in decoder.items():
        if entry["content"] in changes.renamed:
            decoder[number] = {"content": entry["content"], **new[entry["content"]]}
    decoder |= {
        str(number): {"content": token, **new[token]} for token, number in changes.appended.items()
    }
    write_json(path, {**settings, "added_tokens_decoder": decoder})


def _renamed(value: Any, becomes: Mapping[str, str]) -> Any:
    """JSON with some strings replaced, at any depth."""
    if isinstance(value, str):
        return becomes.get(value, value)
    if isinstance(value, list):
        return [_renamed(item, becomes) for item in value]
    if isinstance(value, dict):
        return {name: _renamed(item, becomes) for name, item in value.items()}
    return value


def _verify(expected: Mapping[str, int], directory: Path) -> None:
    """With the tokenizers library where it reads the files: it may give tokens other ids."""
    if (directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        found: Mapping[str, int | None] = {
            token: tokenizer.token_to_id(token) for token in expected
        }
    else:
        found = read_tokens(directory).ids
    wrong = [token for token, number in expected.items() if found.get(token) != number]
    if wrong:
        raise UserError(
            f"{directory} cannot have {', '.join(map(repr, wrong))} at the ids of their rows in "
            "the merged model; extend the tokenizer with `cpt-merge tokenizer RECIPE`, which adds "
            "the chat model's tokens."
        )
