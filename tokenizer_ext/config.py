"""The recipe's `tokenizer` section."""

from __future__ import annotations

from pydantic import field_validator

from cpt_merge.core.config import ByLanguage, Section, key


class TokenizerConfig(Section):
    """How new pieces are learnt and added to the base's tokenizer."""

    new_pieces: ByLanguage[int] = key(
        {},
        "language -> number of pieces to add for it; languages are learnt in this order, and a "
        "piece is added once; without any, and without `pieces_from`, the base's own tokenizer is "
        "kept",
    )
    pieces_from: ByLanguage[str] = key(
        {},
        "language -> file: a word list (one a line) or a SentencePiece model. Its entries are "
        "added first; without `new_pieces` for the language, nothing else is learnt",
    )
    min_frequency: int = key(
        5, "how often two neighbours must occur in the text to become a piece", ge=1
    )
    max_piece_length: int = key(8, "longest piece that is learnt", unit="characters", ge=1, le=50)
    character_coverage: float = key(
        0.9998,
        "share of the text's characters that become pieces themselves (SentencePiece bases)",
        gt=0,
        le=1,
    )
    pad_to_multiple: int = key(
        64, "the number of rows is rounded up to a multiple of this", unit="rows", ge=1
    )
    max_characters: int = key(
        100_000_000,
        "text that is counted for each language, from its start",
        unit="characters",
        gt=0,
        lt=2**31,
    )

    def languages(self) -> list[str]:
        """The languages that get pieces, in the order in which they are learnt."""
        return list(dict.fromkeys([*self.new_pieces, *self.pieces_from]))

    @field_validator("new_pieces")
    @classmethod
    def _sizes(cls, sizes: dict[str, int]) -> dict[str, int]:
        for tag, size in sizes.items():
            if size < 1:
                raise ValueError(
                    f"{tag} asks for {size} pieces; ask for at least 1, or leave the language out"
                )
        return sizes
