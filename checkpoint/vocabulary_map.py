"""What every row of the embedding matrices means: the map from an extended vocabulary back to the base's."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError

MAP_FILE = "vocabulary_map.json"


@dataclass(frozen=True)
class NewPiece:
    """A piece that the base does not have, and the base ids that spelt it before (no dummy prefix among them)."""

    id: int
    piece: str
    constituents: list[int]


@dataclass(frozen=True)
class ChatToken:
    """A token that only the chat model's tokenizer has beyond the base's (`<|im_end|>`, a pad at 32000)."""

    id: int
    token: str
    chat_id: int


@dataclass(frozen=True)
class VocabularyMap:
    """Every row of the extended matrix is one of four: old, a new piece, a special of the chat model, padding.

    Rows `0 .. base_rows - 1` are the base's, at their old ids (law 1).
    """

    base_rows: int
    rows: int
    new: list[NewPiece]
    chat: list[ChatToken]
    padding: list[int]

    def __post_init__(self) -> None:
        beyond = sorted(
            [piece.id for piece in self.new] + [token.id for token in self.chat] + self.padding
        )
        if beyond != list(range(self.base_rows, self.rows)):
            raise UserError(
                f"the vocabulary map describes {len(beyond)} rows beyond the base's {self.base_rows} "
                f"but the matrix has {self.rows} rows; make the tokenizer again."
            )

    def save(self, directory: Path) -> None:
        """Write `vocabulary_map.json`."""
        write_json(directory / MAP_FILE, asdict(self))

    @staticmethod
    def load(directory: Path) -> VocabularyMap:
        """Read `vocabulary_map.json`. Raises `UserError` where it is missing or damaged."""
        path = directory / MAP_FILE
        if not path.is_file():
            raise UserError(f"{path} does not exist; run `cpt-merge tokenizer RECIPE` first.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return VocabularyMap(
                values["base_rows"],
                values["rows"],
                [NewPiece(**piece) for piece in values["new"]],
                [ChatToken(**token) for token in values["chat"]],
                values["padding"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}); make the tokenizer again.") from None


@dataclass(frozen=True)
class TokenIds:
    """Token string -> id, and which of the tokens stand outside the vocabulary proper (specials, added tokens)."""

    ids: dict[str, int]
    added: frozenset[str]
    odd: str | None = None  # a token that loaders read at another id than the file says


def has_tokenizer(directory: Path) -> bool:
    """True if the directory holds a tokenizer whose tokens can be read."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def read_tokens(directory: Path) -> TokenIds:
    """The tokens of a directory's `tokenizer.json`, or of `tokenizer.model` where there is only that.

    Raises `UserError` where there is neither, or a damaged one.
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
                f"{path} holds a {content['model']['type']} vocabulary; only BPE is supported."
            )
        ids = {**vocabulary, **{token["content"]: token["id"] for token in added}}
        if not all(isinstance(number, int) and number >= 0 for number in ids.values()):
            raise ValueError("an id is no whole number from 0 on")
        return TokenIds(
            ids, frozenset(token["content"] for token in added), _odd_number(vocabulary, added)
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no tokenizer.json ({error}); save the tokenizer again."
        ) from None


def _odd_number(vocabulary: dict[str, int], added: list[dict[str, Any]]) -> str | None:
    """Where the tokenizers library gives an added token another id than the file says.

    It numbers those that are not in the vocabulary from the vocabulary's size on, in the order of the list.
    """
    following = len(vocabulary)
    for token in added:
        number = vocabulary.get(token["content"])
        if number is None:
            number, following = following, following + 1
        if number != token["id"]:
            return f"{token['content']!r} at {token['id']}, but loaders read it at {number}"
    return None


_MERGES = re.compile(r'(?<!\\)"merges"\s*:\s*\[')  # within a string the quotes would be escaped


def _without_merges(text: str) -> dict[str, Any] | None:
    """A tokenizer.json without its merges, most of it and of no interest here; None where that is not so easily had."""
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
            f"{directory} holds no tokenizer.json or tokenizer.model; put the tokenizer there."
        )
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise UserError(f"{path} is no SentencePiece model; put the right file there.") from None
    ids = {model.id_to_piece(number): number for number in range(model.vocab_size())}
    control = {
        piece
        for piece, number in ids.items()
        if model.is_control(number) or model.is_unknown(number)
    }
    beyond = _listed_added_tokens(directory)
    return TokenIds({**ids, **beyond}, frozenset(control | beyond.keys()))


def _listed_added_tokens(directory: Path) -> dict[str, int]:
    """What a directory without `tokenizer.json` lists beside its `tokenizer.model`."""
    older, config = directory / "added_tokens.json", directory / "tokenizer_config.json"
    try:
        found: dict[str, int] = (
            json.loads(older.read_text(encoding="utf-8")) if older.is_file() else {}
        )
        if config.is_file():
            listed = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
            found |= {token["content"]: int(number) for number, token in listed.items()}
        return {str(token): int(number) for token, number in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{older} or {config} lists added tokens that cannot be read ({error}); save it again."
        ) from None
