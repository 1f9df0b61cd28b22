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
from cpt_merge.checkpoint.sentencepiece_model import (
    BYTE,
    MODEL_FILE,
    NORMAL,
    is_tiktoken,
    parse_proto,
)
from cpt_merge.checkpoint.token_ids import (
    ADDED_FILE,
    DECODER,
    FAST_FILE,
    SETTINGS_FILE,
    VOCABULARY_FILE,
    read_tokens,
)
from cpt_merge.checkpoint.tokenizer_files import token_text
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

    @property
    def becomes(self) -> dict[str, str]:
        """Reserved token -> the token that takes its id."""
        return {reserved: token for token, reserved in self.renamed.items()}

    def __bool__(self) -> bool:
        return bool(self.appended or self.renamed)


def apply(changes: TokenChanges, directory: Path, origin: Path) -> None:
    """Change all of a tokenizer's files in `directory`; new tokens behave as those in `origin`.

    Raises `UserError` if the tokenizer, read back, has one of the tokens at another id.
    """
    if not changes:
        return
    before, behaviour = read_tokens(directory).ids, _behaviour(origin)
    tokens = [*changes.appended, *changes.renamed]
    new = {token: {**_PLAIN, **behaviour.get(token, {})} for token in tokens}
    _rename_pieces(changes, directory / MODEL_FILE)
    _change_ids(changes, directory / VOCABULARY_FILE, {})
    fast = directory / FAST_FILE
    if fast.is_file():
        _change_fast(changes, new, fast)
    elif not (directory / ADDED_FILE).is_file():
        write_json(directory / ADDED_FILE, {})
    _change_ids(changes, directory / ADDED_FILE, changes.appended)
    _rename_settings(changes, directory)
    _change_decoder(changes, new, directory)
    replaced = {token: before[reserved] for token, reserved in changes.renamed.items()}
    _verify({**changes.appended, **replaced}, directory)


def _behaviour(origin: Path) -> dict[str, dict[str, Any]]:
    """Token -> how its tokenizer.json, or else its settings, say that it is matched."""
    path, settings = origin / FAST_FILE, origin / SETTINGS_FILE
    if path.is_file():
        tokens = read_json(path).get("added_tokens", [])
    else:
        listed = read_json(settings).get(DECODER, {}) if settings.is_file() else {}
        tokens = list(listed.values())
    return {
        token["content"]: {name: token[name] for name in _PLAIN if name in token}
        for token in tokens
    }


def _rename_pieces(changes: TokenChanges, path: Path) -> None:
    """In a SentencePiece model. Appended tokens are not for it: its readers find the others."""
    becomes = changes.becomes
    if not becomes or not path.is_file() or is_tiktoken(path):
        return
    proto = parse_proto(path)
    for piece in proto.pieces:
        if piece.type not in (NORMAL, BYTE) and piece.piece in becomes:
            piece.piece = becomes[piece.piece]
    path.write_bytes(proto.SerializeToString())


def _change_ids(changes: TokenChanges, path: Path, appended: Mapping[str, int]) -> None:
    """In a file that is a mapping from tokens to ids, if there is one."""
    if path.is_file():
        write_json(path, {**_renamed_keys(read_json(path), changes), **appended})


def _change_fast(changes: TokenChanges, new: Mapping[str, dict[str, Any]], path: Path) -> None:
    content = read_json(path)
    becomes = changes.becomes
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
    else:  # Unigram: pieces with their scores
        content["model"]["vocab"] = [
            [becomes.get(piece, piece), score] for piece, score in vocabulary
        ]
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1))


def _renamed_keys(values: Mapping[str, Any], changes: TokenChanges) -> dict[str, Any]:
    becomes = changes.becomes
    return {becomes.get(token, token): number for token, number in values.items()}


def _rename_settings(changes: TokenChanges, directory: Path) -> None:
    """A token is renamed everywhere: a loader would add it again under its old name."""
    for file in (directory / SETTINGS_FILE, directory / "special_tokens_map.json"):
        if file.is_file() and changes.renamed:
            write_json(file, _renamed(read_json(file), changes.becomes))


def _change_decoder(
    changes: TokenChanges, new: Mapping[str, dict[str, Any]], directory: Path
) -> None:
    """Change `added_tokens_decoder`, if the settings have one or there is no tokenizer.json.

    Without a tokenizer.json it lists all added tokens, because loaders that find it read no other
    list, and number the tokens that it lacks themselves.
    """
    path, fast = directory / SETTINGS_FILE, (directory / FAST_FILE).is_file()
    settings = read_json(path) if path.is_file() else {}
    if fast and DECODER not in settings:
        return
    decoder = dict(settings.get(DECODER, {}))
    for number, entry in decoder.items():
        if entry["content"] in changes.renamed:
            decoder[number] = {"content": entry["content"], **new[entry["content"]]}
    listed = {} if fast else read_json(directory / ADDED_FILE)
    special = _special_tokens(directory)
    for token, number in {**listed, **changes.appended}.items():
        entry = new.get(token, {**_PLAIN, "special": token in special})
        decoder.setdefault(str(number), {"content": token, **entry})
    in_order = dict(sorted(decoder.items(), key=lambda item: int(item[0])))
    write_json(path, {**settings, DECODER: in_order})


def _special_tokens(directory: Path) -> set[str]:
    """The tokens that the settings name by a role or as additional special tokens."""
    named: set[str] = set()
    for path in (directory / SETTINGS_FILE, directory / "special_tokens_map.json"):
        values = read_json(path) if path.is_file() else {}
        for name, value in values.items():
            if name.endswith("_token"):
                named.add(token_text(value) or "")
            elif name == "additional_special_tokens" and isinstance(value, list):
                named.update(token_text(one) or "" for one in value)
    return named


def drop_unknown(directory: Path) -> list[str]:
    """Remove tokens that the settings name and the tokenizer lacks: loaders would add them at ids
    of their own, which have no rows.

    Returns a sentence for each.
    """
    known, sentences = read_tokens(directory).ids, []
    for path in (directory / SETTINGS_FILE, directory / "special_tokens_map.json"):
        values = read_json(path) if path.is_file() else {}
        kept = {name: _known(value, known) for name, value in values.items() if _names(name)}
        changed = {name: value for name, value in kept.items() if value != values[name]}
        for name in changed:
            sentences.append(
                f"{path.name} names a token as {name} that the tokenizer does not contain "
                f"({values[name]!r}); it is left out"
            )
        if changed:
            write_json(path, {**values, **changed})
    return sentences


def _names(setting: str) -> bool:
    """Whether a setting names tokens."""
    return setting.endswith("_token") or setting in (
        "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens",
    )  # fmt: skip


def _known(value: Any, known: Mapping[str, int]) -> Any:
    """The tokens of a setting that are known."""
    if isinstance(value, list):
        return [one for one in value if token_text(one) in known]
    if isinstance(value, dict) and "content" not in value:
        return {name: one for name, one in value.items() if token_text(one) in known}
    token = token_text(value)
    return value if token is None or token in known else None


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
