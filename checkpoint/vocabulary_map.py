"""What every row of an embedding matrix means: a map from the extended vocabulary to the base."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError

MAP_FILE = "vocabulary_map.json"


@dataclass(frozen=True)
class NewPiece:
    """A piece that the base lacks, and the base ids that spelt it (without a dummy prefix)."""

    id: int
    piece: str
    constituents: list[int]


@dataclass(frozen=True)
class ChatToken:
    """A token of the chat model that the base lacks (`<|im_end|>`, a pad at 32000)."""

    id: int
    token: str
    chat_id: int


@dataclass(frozen=True)
class VocabularyMap:
    """Every row of the extended matrix: old, a new piece, a token of the chat model, or padding.

    Rows `0 .. base_rows - 1` are those of the base (invariant "old ids fixed").
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
                f"the vocabulary map describes {len(beyond)} rows beyond the base's "
                f"{self.base_rows} but the matrix has {self.rows} rows; make the tokenizer again."
            )

    def save(self, directory: Path) -> None:
        """Write `vocabulary_map.json`."""
        write_json(directory / MAP_FILE, asdict(self))

    @staticmethod
    def load(directory: Path) -> VocabularyMap:
        """Read `vocabulary_map.json`. Raises `UserError` if it is missing or damaged."""
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
