"""The tokens of a directory's tokenizer, from all files that list them, without transformers.

Up to five files list tokens: tokenizer.json, tokenizer.model, vocab.json, added_tokens.json, and
tokenizer_config.json in its `added_tokens_decoder`. Loaders and converters read different ones, so
files that disagree on a token or its id are an error that names both. One difference is none: a
token that stands for no text (a control or reserved token) may have a new name in tokenizer.json or
in a list of added tokens, which loaders prefer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
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
from cpt_merge.core.errors import UserError
from cpt_merge.core.foreign_formats import refuse_pointer

FAST_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocab.json"
ADDED_FILE = "added_tokens.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
DECODER = "added_tokens_decoder"  # in tokenizer_config.json

TOKEN_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_TOKENIZER_NAME = re.compile(
    r"(?i)vocab|merges|tekken|tokeni[sz]|added_tokens|\.(model|spm|tiktoken|bpe|codes)(\.v\d+)?$"
)
_NO_TOKENIZER = (SETTINGS_FILE, "vocabulary_map.json")  # the map is ours

_SPECIAL_NAME = re.compile(r"[<\[].+[>\]]")
_SHOWN = 3  # tokens in a message


@dataclass(frozen=True)
class TokenIds:
    """Token string -> id; `added` are the tokens outside the vocabulary proper (specials)."""

    ids: dict[str, int]
    added: frozenset[str]
    odd: str | None = None  # a token that loaders read at another id than the file says


@dataclass(frozen=True)
class _Listing:
    """The tokens that one file lists.

    `renamable` are those that stand for no text. `whole`: it lists the whole vocabulary.
    """

    file: str
    ids: Mapping[str, int]
    renamable: frozenset[str] = frozenset()
    whole: bool = False

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Id -> token."""
        return {number: token for token, number in self.ids.items()}


def has_tokenizer(directory: Path) -> bool:
    """Whether the directory contains a tokenizer whose tokens can be read."""
    return any((directory / name).is_file() for name in (FAST_FILE, MODEL_FILE))


def refuse_unread(directory: Path) -> None:
    """Raise `UserError` if a directory without a readable tokenizer has one in other files."""
    names = sorted(
        path.name
        for path in directory.glob("*")
        if _TOKENIZER_NAME.search(path.name) and path.name not in _NO_TOKENIZER and path.is_file()
    )
    settings = directory / SETTINGS_FILE
    if settings.is_file() and read_json(settings).get("tokenizer_class"):
        names.append(SETTINGS_FILE)
    if not names or has_tokenizer(directory):
        return
    raise UserError(
        f"no {FAST_FILE} or {MODEL_FILE} in {directory}, by which rows could be aligned, but only "
        f"{', '.join(names)}; load and save that tokenizer with transformers' AutoTokenizer, which "
        f"writes {FAST_FILE}, and put that there."
    )


def unlisted(directory: Path, known: Collection[str]) -> str | None:
    """A sentence on the special tokens that only the settings name, whose ids loaders choose."""
    places = []
    for file in (SETTINGS_FILE, SPECIALS_FILE):
        path = directory / file
        named = _named_tokens(read_json(path)) if path.is_file() else []
        found = [token for token in dict.fromkeys(named) if token not in known]
        if found:
            places.append(f"{file} names {', '.join(found)}")
    if not places:
        return None
    return (
        f"in {directory}, {' and '.join(places)}, but the files of the tokenizer itself do not, so "
        "loaders give out new ids; load and save this tokenizer with transformers' AutoTokenizer, "
        f"which writes them into {FAST_FILE}"
    )


def _named_tokens(settings: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens that a tokenizer's settings name, in their order."""
    for name in TOKEN_ROLES:
        yield from _texts(settings.get(name))
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(name) or []
        for value in more.values() if isinstance(more, dict) else more:
            yield from _texts(value)


def _texts(value: Any) -> Iterator[str]:
    """The text of a token in the settings, if it has one."""
    if isinstance(value, dict):
        value = value.get("content")
    if isinstance(value, str) and value:
        yield value


def read_tokens(directory: Path) -> TokenIds:
    """The tokens of a directory's `tokenizer.json`, or else of its `tokenizer.model`.

    Raises `UserError` if there is neither, if a file is damaged, or if two files disagree.
    """
    if not (directory / FAST_FILE).is_file():
        return _read_without_fast(directory)
    found = _read_fast(directory / FAST_FILE)
    fast = _Listing(FAST_FILE, found.ids, found.added)
    for other in _others(directory):
        _require_same_tokens(directory, fast, other)
    return found


def _read_fast(path: Path) -> TokenIds:
    try:
        text = path.read_text(encoding="utf-8")
        content = _without_merges(text) or json.loads(text)
        vocabulary, added = content["model"]["vocab"], content["added_tokens"]
        if isinstance(vocabulary, list):  # Unigram: pieces with their scores
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        ids = {**vocabulary, **{token["content"]: token["id"] for token in added}}
        if not all(isinstance(number, int) and number >= 0 for number in ids.values()):
            raise ValueError("an id is not a whole number from 0 on")
        return TokenIds(
            ids, frozenset(token["content"] for token in added), _odd_number(vocabulary, added)
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        refuse_pointer(path)
        raise UserError(
            f"{path} is not a tokenizer.json ({error}); save the tokenizer again."
        ) from None


def _odd_number(vocabulary: dict[str, int], added: list[dict[str, Any]]) -> str | None:
    """The first added token to which the tokenizers library gives another id than the file says.

    The library numbers added tokens that are not in the vocabulary consecutively from its size on.
    """
    following = len(vocabulary)
    for token in added:
        number = vocabulary.get(token["content"])
        if number is None:
            number, following = following, following + 1
        if number != token["id"]:
            return f"{token['content']!r} at {token['id']}, but loaders read it at {number}"
    return None


_MERGES = re.compile(r'(?<!\\)"merges"\s*:\s*\[')  # quotes inside a string would be escaped


def _without_merges(text: str) -> dict[str, Any] | None:
    """A tokenizer.json parsed without its merges, which are most of it; None if that fails."""
    found = _MERGES.search(text)
    if found is None:
        return None
    try:
        content: dict[str, Any] = json.loads(
            text[: found.start()] + '"merges": [' + text[text.rindex("]") :]
        )
    except ValueError:
        return None
    return content if "added_tokens" in content and "vocab" in content.get("model", {}) else None


def _read_without_fast(directory: Path) -> TokenIds:
    path = directory / MODEL_FILE
    if not path.is_file():
        raise UserError(
            f"{directory} contains no tokenizer.json or tokenizer.model; put the tokenizer there."
        )
    if is_tiktoken(path):
        raise UserError(
            f"{path} is a tiktoken file, without special tokens; put the model's tokenizer.json "
            "next to it."
        )
    model = _read_model(path)
    listed: dict[str, int] = {}
    lists = list(_lists_of_added_tokens(directory))
    for one in lists:
        _require_beside(directory, model, one)
        for other in lists:
            _require_same_ids(directory, one, other)
        listed |= one.ids
    renamed = {model.tokens.get(number) for number in listed.values()} - listed.keys()
    ids = {token: number for token, number in model.ids.items() if token not in renamed}
    return TokenIds({**ids, **listed}, (model.renamable - renamed) | listed.keys())


def _others(directory: Path) -> Iterator[_Listing]:
    """What the files next to a tokenizer.json list. A tiktoken file does not list special tokens
    and is not read by loaders.
    """
    model, vocabulary = directory / MODEL_FILE, directory / VOCABULARY_FILE
    if model.is_file() and not is_tiktoken(model):
        yield _read_model(model)
    if vocabulary.is_file():
        ids = read_json(vocabulary)
        special = frozenset(token for token in ids if _SPECIAL_NAME.fullmatch(token))
        yield _Listing(VOCABULARY_FILE, ids, special, whole=True)
    yield from _lists_of_added_tokens(directory)


def _read_model(path: Path) -> _Listing:
    pieces = parse_proto(path).pieces
    ids = {piece.piece: number for number, piece in enumerate(pieces)}
    special = frozenset(piece.piece for piece in pieces if piece.type not in (NORMAL, BYTE))
    return _Listing(path.name, ids, special, whole=True)


def _lists_of_added_tokens(directory: Path) -> Iterator[_Listing]:
    older, settings = directory / ADDED_FILE, directory / SETTINGS_FILE
    try:
        if older.is_file():
            ids = {str(token): int(number) for token, number in read_json(older).items()}
            yield _Listing(ADDED_FILE, ids)
        listed = read_json(settings).get(DECODER) if settings.is_file() else None
        if listed:
            ids = {str(token["content"]): int(number) for number, token in listed.items()}
            yield _Listing(f"{SETTINGS_FILE} ({DECODER})", ids)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{older} or {settings} lists added tokens that cannot be read ({error}); save it "
            "again."
        ) from None


def _require_same_tokens(directory: Path, fast: _Listing, other: _Listing) -> None:
    """Raise `UserError` if another file does not list what tokenizer.json does."""
    differing = []
    for token, number in other.ids.items():
        found = fast.ids.get(token)
        name = fast.tokens.get(number)
        renamed = token in other.renamable and name in fast.renamable and name not in other.ids
        if found != number and not (found is None and renamed):
            differing.append(f"{token!r} (id {number} and {_place(found)})")
    if other.whole:
        lacking = fast.ids.keys() - fast.renamable - other.ids.keys()
        differing += [
            f"{token!r} (id none and {fast.ids[token]})"
            for token in sorted(lacking, key=fast.ids.__getitem__)
        ]
    _require_none(directory, other, fast, differing)


def _require_beside(directory: Path, model: _Listing, listed: _Listing) -> None:
    """Raise `UserError` if an added token is listed at the id of a piece, or a piece at another."""
    differing = []
    for token, number in listed.ids.items():
        found, name = model.ids.get(token, number), model.tokens.get(number, token)
        if found != number:
            differing.append(f"{token!r} (id {found} and {number})")
        elif name != token and name not in model.renamable:
            differing.append(f"id {number} ({name!r} and {token!r})")
    _require_none(directory, model, listed, differing)


def _require_same_ids(directory: Path, one: _Listing, other: _Listing) -> None:
    """Raise `UserError` if two lists of added tokens have a token at two ids, or two at one."""
    differing = [
        f"{token!r} (id {number} and {_place(other.ids.get(token))})"
        for token, number in one.ids.items()
        if other.ids.get(token, number) != number or other.tokens.get(number, token) != token
    ]
    _require_none(directory, one, other, differing)


def _place(number: int | None) -> str:
    return "none" if number is None else str(number)


def _require_none(directory: Path, one: _Listing, other: _Listing, differing: list[str]) -> None:
    if differing:
        more = len(differing) - _SHOWN
        shown = ", ".join(differing[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
        raise UserError(
            f"{directory}: {one.file} and {other.file} disagree on {shown}; remove the file that "
            "is out of date, or save the tokenizer again with transformers."
        )
