"""The recipe's `tokenizer` section."""

from __future__ import annotations

from pydantic import field_validator

from core.config import Section, key
from core.errors import UserError
from core.languages import find_language


class TokenizerConfig(Section):
    """Learn new pieces from the text and extend the base's tokenizer with them."""

    new_pieces: dict[str, int] = key(
        ..., "language -> how many pieces to add for it; learnt in this order, a piece is added once", min_length=1
    )
    min_frequency: int = key(5, "how often two neighbours must meet in the text to become a piece", ge=1)
    max_piece_length: int = key(8, "longest new piece", unit="characters", ge=1)
    character_coverage: float = key(
        0.9998, "share of the text's characters that get a piece of their own (SentencePiece bases)", gt=0, le=1
    )
    pad_to_multiple: int = key(64, "the number of rows is rounded up to a multiple of this", unit="rows", ge=1)
    max_characters: int = key(
        100_000_000, "text that is counted for each language, from its start", unit="characters", gt=0
    )

    @field_validator("new_pieces")
    @classmethod
    def _known(cls, sizes: dict[str, int]) -> dict[str, int]:
        for tag, size in sizes.items():
            try:
                find_language(tag)
            except UserError as error:
                raise ValueError(str(error)) from None
            if size < 1:
                raise ValueError(f"{tag} asks for {size} pieces; ask for at least 1, or leave the language out")
        return sizes
