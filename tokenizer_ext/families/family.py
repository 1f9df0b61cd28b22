"""What the two families of BPE tokenizers have to answer; all else is written once, over this interface."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from cpt_merge.tokenizer_ext.families.tokenizer_json import Content
from cpt_merge.tokenizer_ext.learn.scripts import Scripts
from cpt_merge.tokenizer_ext.learn.word_counts import Splitter, Words


class Family(Protocol):
    """One family of tokenizers. A word or piece is a string in the alphabet of the model's vocabulary."""

    name: str

    def splitter(self, scripts: Scripts) -> Splitter:
        """Finds the parts of a document that pieces are learnt from."""

    def admits(self, scripts: Scripts, max_length: int) -> Callable[[str], bool]:
        """Whether a string, spelt by two neighbours within a word, may be a piece of up to `max_length` characters."""

    def needed_characters(
        self, words: Words, coverage: float, vocabulary: Collection[str]
    ) -> dict[str, int]:
        """The characters that must become pieces before pairs are counted, and how often each occurs."""

    def is_one_word(self, text: str) -> bool:
        """Whether merges ever see the text as it is, in one piece."""

    def spells(self, piece: str) -> bool:
        """Whether a piece stands for itself within a word, and not for one byte of a character that is no piece."""

    def settled(self) -> int:
        """How many of the base's merges come before those of new pieces."""

    def written(self, text: str) -> str:
        """Text in the alphabet of the vocabulary."""

    def spelt(self, piece: str) -> bytes:
        """The bytes that a piece stands for."""

    def readable(self, piece: str) -> str:
        """A piece as text; bytes that are no whole character as `<E4><B8>`."""

    def write_model(self, content: Content, pieces: dict[str, int], rows: int, out: Path) -> None:
        """Write what the family keeps beside `tokenizer.json`. `content` is that of the extended `tokenizer.json`."""
