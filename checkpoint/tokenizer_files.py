"""What the files of a tokenizer say about its tokens, read without transformers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.reader import read_json
from cpt_merge.core.errors import UserError

SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a directory: tokens, roles, chat template."""

    directory: Path
    ids: dict[str, int]  # of every token string
    added: frozenset[str]  # tokens outside the vocabulary proper
    odd: str | None = None  # a token that loaders read at another id than the file says

    @staticmethod
    def read(directory: Path) -> TokenizerFiles | None:
        """None if the directory has no tokenizer. Raises `UserError` if it is damaged."""
        if not has_tokenizer(directory):
            return None
        tokens = read_tokens(directory)
        return TokenizerFiles(directory, tokens.ids, tokens.added, tokens.odd)

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Id -> token string."""
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def roles(self) -> dict[str, str]:
        """Role (`bos_token`, ...) -> token string, for the roles that have a token."""
        values = {**_read_if_there(self.directory / "special_tokens_map.json"), **self._config}
        found = {role: token_text(values.get(role)) for role in SPECIAL_ROLES}
        return {role: token for role, token in found.items() if token is not None}

    @cached_property
    def chat_template(self) -> str | None:
        """The default chat template, from its own file or from tokenizer_config.json."""
        path = self.directory / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it.") from None
        template = self._config.get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default", next(iter(named.values()), None))
        return template if isinstance(template, str) else None

    @cached_property
    def other_templates(self) -> list[str]:
        """The names of chat templates other than the default one."""
        template = self._config.get("chat_template")
        listed = [entry.get("name") for entry in template] if isinstance(template, list) else []
        folder = self.directory / "additional_chat_templates"
        files = sorted(path.stem for path in folder.glob("*.jinja"))
        return [name for name in map(str, [*listed, *files]) if name != "default"]

    @cached_property
    def _config(self) -> dict[str, Any]:
        return _read_if_there(self.directory / "tokenizer_config.json")

    def format_tokens(self) -> set[str]:
        """The added tokens that the template names, literally or by role, and the stop tokens."""
        template = self.chat_template or ""
        literal = {token for token in self.added if token in template and not token.isspace()}
        by_role = {
            token for role, token in self.roles.items() if re.search(rf"\b{role}\b", template)
        }
        stop_ids = read_stop_ids(self.directory)
        stops = {self.tokens[number] for number in stop_ids if number in self.tokens}
        return (literal | by_role | stops) & self.added


def token_text(value: Any) -> str | None:
    """A token in a tokenizer's configuration: a string, an object with `content`, or nothing."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def read_stop_ids(directory: Path) -> list[int]:
    """The ids that end a reply, from generation_config.json or else config.json."""
    for file in ("generation_config.json", "config.json"):
        ids = _read_if_there(directory / file).get("eos_token_id")
        if ids is not None:
            try:
                return [int(number) for number in (ids if isinstance(ids, list) else [ids])]
            except (ValueError, TypeError):
                raise UserError(
                    f"{directory / file} has eos_token_id {ids!r}, not a token id; correct it."
                ) from None
    return []


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


@dataclass(frozen=True)
class TokenIds:
    """Token string -> id; `added` are the tokens outside the vocabulary proper (specials)."""

    ids: dict[str, int]
    added: frozenset[str]
    odd: str | None = None  # a token that loaders read at another id than the file says


def has_tokenizer(directory: Path) -> bool:
    """Whether the directory contains a tokenizer whose tokens can be read."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def read_tokens(directory: Path) -> TokenIds:
    """The tokens of a directory's `tokenizer.json`, or else of its `tokenizer.model`.

    Raises `UserError` if there is neither, or if the file is damaged.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return _read_sentencepiece(directory)
    try:
        text = path.read_text(encoding="utf-8")
        content = _without_merges(text) or json.loads(text)
        vocabulary, added = content["model"]["vocab"], content["added_tokens"]
        if isinstance(vocabulary, list):
            raise UserError(
                f"{path} has a {content['model']['type']} vocabulary; only BPE is supported."
            )
        ids = {**vocabulary, **{token["content"]: token["id"] for token in added}}
        if not all(isinstance(number, int) and number >= 0 for number in ids.values()):
            raise ValueError("an id is not a whole number from 0 on")
        return TokenIds(
            ids, frozenset(token["content"] for token in added), _odd_number(vocabulary, added)
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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


def _read_sentencepiece(directory: Path) -> TokenIds:
    import sentencepiece

    path = directory / "tokenizer.model"
    if not path.is_file():
        raise UserError(
            f"{directory} contains no tokenizer.json or tokenizer.model; put the tokenizer there."
        )
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise UserError(f"{path} is not a SentencePiece model; put the right file there.") from None
    ids = {model.id_to_piece(number): number for number in range(model.vocab_size())}
    control = {piece for piece, n in ids.items() if model.is_control(n) or model.is_unknown(n)}
    beyond = _listed_added_tokens(directory)
    return TokenIds({**ids, **beyond}, frozenset(control | beyond.keys()))


def _listed_added_tokens(directory: Path) -> dict[str, int]:
    """The added tokens that a directory without `tokenizer.json` lists."""
    older, config = directory / "added_tokens.json", directory / "tokenizer_config.json"
    try:
        found: dict[str, int] = _read_if_there(older)
        if listed := _read_if_there(config).get("added_tokens_decoder"):
            found |= {token["content"]: int(number) for number, token in listed.items()}
        return {str(token): int(number) for token, number in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{older} or {config} lists added tokens that cannot be read ({error}); save it again."
        ) from None
