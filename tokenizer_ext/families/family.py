"""The interface of the two families of BPE tokenizers; everything else is written once, on top of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from cpt_merge.tokenizer_ext.families.tokenizer_json import Content
from cpt_merge.tokenizer_ext.learn.scripts import Scripts
from cpt_merge.tokenizer_ext.learn.word_counts import Splitter, Words


class Family(Protocol):
    """One family of tokenizers.

    A word or piece is a string in the alphabet of the model's vocabulary.
    """

    name: str

    def splitter(self, scripts: Scripts) -> Splitter:
        """The function that finds the parts of a document that pieces are learnt from."""

    def admits(self, scripts: Scripts, max_length: int) -> Callable[[str], bool]:
        """The test whether a string that two neighbours in a word spell may become a piece.

        It may have up to `max_length` characters.
        """

    def needed_characters(
        self, words: Words, coverage: float, vocabulary: Collection[str]
    ) -> dict[str, int]:
        """The characters that must become pieces first, with their frequencies."""

    def is_one_word(self, text: str) -> bool:
        """Whether the text reaches the merges unchanged and in one part."""

    def spells(self, piece: str) -> bool:
        """Whether a piece stands for itself within a word, and not for a byte of a character
        without a piece.
        """

    def settled(self) -> int:
        """The number of the base's merges that precede those of new pieces."""

    def written(self, text: str) -> str:
        """The text in the alphabet of the vocabulary."""

    def spelt(self, piece: str) -> bytes:
        """The bytes that a piece stands for."""

    def readable(self, piece: str) -> str:
        """A piece as text, with bytes of incomplete characters as `<E4><B8>`."""

    def write_model(self, content: Content, pieces: dict[str, int], rows: int, out: Path) -> None:
        """Write the family's files besides `tokenizer.json`, whose extended `content` is given."""
