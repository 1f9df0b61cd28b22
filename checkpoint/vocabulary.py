"""What every row of the embedding matrices means: the map from an extended vocabulary back to the base's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from core.artifact import write_json
from core.errors import UserError

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
        beyond = sorted([piece.id for piece in self.new] + [token.id for token in self.chat] + self.padding)
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


def read_token_ids(directory: Path) -> dict[str, int]:
    """Token string -> id of the `tokenizer.json` in a directory, added tokens included, without transformers.

    Raises `UserError` where there is no `tokenizer.json`.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; save the tokenizer with transformers' save_pretrained there.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}); copy or download it again.") from None
    if isinstance(vocabulary, list):
        raise UserError(f"{path} holds a {content['model']['type']} vocabulary; only BPE is supported.")
    return {**vocabulary, **{token["content"]: token["id"] for token in content["added_tokens"]}}
