"""What the two families of BPE tokenizers have to answer; all else is written once, over this interface."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from tokenizer_ext.fast import Content
from tokenizer_ext.scripts import Scripts


class Family(Protocol):
    """One family of tokenizers. A word or piece is a string in the alphabet of the model's vocabulary."""

    name: str

    def words(self, text: str, scripts: Scripts) -> Iterator[str]:
        """The parts of a document that pieces are learnt from."""

    def admits(self, scripts: Scripts, max_length: int) -> Callable[[str], bool]:
        """Whether a string, spelt by two neighbours within a word, may be a piece of up to `max_length` characters."""

    def needed_characters(
        self, words: Mapping[str, int], coverage: float, vocabulary: Collection[str]
    ) -> dict[str, int]:
        """The characters that must become pieces before pairs are counted, and how often each occurs."""

    def settled(self) -> int:
        """How many of the base's merges come before those of new pieces."""

    def readable(self, piece: str) -> str:
        """A piece as text; bytes that are no whole character as `<E4><B8>`."""

    def write_model(self, content: Content, pieces: dict[str, int], rows: int, out: Path) -> None:
        """Write what the family keeps beside `tokenizer.json`. `content` is that of the extended `tokenizer.json`."""
