"""The new pieces, one language after another: characters first, then a given list, then learnt
pieces.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Split

from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.core.progress import Meter, say
from cpt_merge.data.sources import Corpus
from cpt_merge.tokenizer_ext.base_tokenizer import Base
from cpt_merge.tokenizer_ext.config import TokenizerConfig
from cpt_merge.tokenizer_ext.families.tokenizer_json import (
    Content,
    Merge,
    added_tokens_of,
    build_model,
    extend_model,
    merges_of,
)
from cpt_merge.tokenizer_ext.learn.bpe import ContinuedBpe, Growth
from cpt_merge.tokenizer_ext.learn.scripts import Scripts
from cpt_merge.tokenizer_ext.learn.symbols import BREAK, WordArrays
from cpt_merge.tokenizer_ext.learn.word_counts import SEPARATOR, Words, count_words, read_documents
from cpt_merge.tokenizer_ext.learn.word_lists import Replayed, read_given, replay

BLOCKS_AT_ONCE = 8  # of words that are split
SHOWN = 3  # examples in a message
Pieces = dict[
    str, Merge | None
]  # piece -> the two that it is merged from, None for a single character


@dataclass(frozen=True)
class Learned:
    """The pieces that one language adds."""

    language: str
    pieces: Pieces  # the first merged first
    characters: int  # leading single characters, for coverage
    given: int  # then pieces from a list, and steps towards them
    pruned: int  # learnt pieces that were dropped again
    usage: Counter[str]  # token -> its frequency in the counted words in the end


def learn_languages(base: Base, corpus: Corpus, config: TokenizerConfig) -> list[Learned]:
    """Learn each language in turn, on top of the pieces of the languages before it."""
    scripts = {language: Scripts(find_language(language)) for language in config.languages()}
    lists = {
        language: read_given(Path(path), scripts[language])
        for language, path in config.pieces_from.items()
    }
    learned: list[Learned] = []
    for language in scripts:
        earlier = [piece for one in learned for piece in one.pieces]
        grower = Grower(base, earlier, scripts[language], config)
        texts = read_documents(corpus, language, "train", config.max_characters)
        words = count_words(texts, base.family.splitter(scripts[language]), f"counting {language}")
        learned.append(grower.grow(words, lists.get(language, [])))
    return learned


@dataclass(frozen=True)
class Grower:
    """Finds the pieces of one language beyond those of the base and of `earlier` languages."""

    base: Base
    earlier: Sequence[str]
    scripts: Scripts
    config: TokenizerConfig

    @property
    def language(self) -> str:
        """The language's tag."""
        return self.scripts.language.tag

    @property
    def size(self) -> int | None:
        """The number of pieces asked for; None: all that a list makes."""
        return self.config.new_pieces.get(self.language)

    def grow(self, words: Words, entries: Sequence[str]) -> Learned:
        """The needed characters, the pieces of the list `entries`, and learnt pieces."""
        characters = self._characters(words)
        given = self._given(entries, characters) if entries else {}
        pieces: Pieces = {**characters, **given}
        size = len(pieces) if self.size is None else self.size
        pruned: set[str] = set()
        while True:
            growth = self._learn(words, pieces, size - len(pieces), barred=pruned)
            idle = idle_leaves(growth, self.config.min_frequency)
            pieces |= {
                piece: halves for piece, halves in growth.pieces.items() if piece not in idle
            }
            pruned |= idle
            if not idle:
                break
            say(
                f"{self.language}: {len(idle):,} pieces are rarely used in the end "
                "(tokenizer.min_frequency) and left out"
            )
        if size and not pieces:
            raise UserError(
                f"the text in {self.language!r} gives no new piece: it has hardly any "
                f"{' or '.join(self.scripts.language.scripts)} letters; correct `language` in "
                "corpus.sources, add text, or lower tokenizer.min_frequency."
            )
        if len(pieces) < size:
            say(
                f"{self.language}: found {len(pieces):,} of {size:,} pieces; no other pair occurs "
                f"{self.config.min_frequency} times (tokenizer.min_frequency), or the text is too "
                "short."
            )
        return Learned(
            self.language, pieces, len(characters), len(given), len(pruned), Counter(growth.usage)
        )

    def _characters(self, words: Words) -> Pieces:
        """The characters that must be pieces before the first merge."""
        if not words.blocks:
            raise UserError(
                f"the text in {self.language!r} holds no "
                f"{' or '.join(self.scripts.language.scripts)} letter; "
                "correct `language` in corpus.sources, or add text."
            )
        vocabulary = {*self.base.content["model"]["vocab"], *self.earlier}
        needed = self.base.family.needed_characters(
            words, self.config.character_coverage, vocabulary
        )
        if self.size is not None and len(needed) > self.size:
            raise UserError(
                f"tokenizer.new_pieces.{self.language} = {self.size} is too small: the text has "
                f"{len(needed)} "
                "characters that the base lacks; raise it, or lower tokenizer.character_coverage."
            )
        return dict.fromkeys(needed)

    def _given(self, entries: Sequence[str], characters: Pieces) -> Pieces:
        """The pieces of the list, as many as there is room for."""
        apart = [entry for entry in entries if not self.base.family.is_one_word(entry)]
        if apart:
            shown = ", ".join(apart[:SHOWN])
            say(
                f"{self.language}: the base's tokenizer cuts or changes {len(apart):,} entries "
                f"({shown}); left out"
            )
        entries = [entry for entry in entries if self.base.family.is_one_word(entry)]
        if not entries:
            return {}
        content = with_pieces(self.base, [*self.earlier, *characters])
        admits = self.base.family.admits(self.scripts, max(map(len, entries)))
        room = sys.maxsize if self.size is None else self.size - len(characters)
        written = [self.base.family.written(entry) for entry in entries]
        made = replay(written, room, merges_of(content), content["model"]["vocab"].keys(), admits)
        self._say_given(made, len(entries))
        return made.pieces

    def _say_given(self, made: Replayed, entries: int) -> None:
        taken = len(made.pieces) - made.steps
        say(
            f"{self.language}: {taken:,} of {entries:,} entries are new pieces, with "
            f"{made.steps:,} steps towards them"
        )
        if made.unreachable:
            shown = ", ".join(map(self.base.family.readable, made.unreachable[:SHOWN]))
            say(
                f"{self.language}: no whole characters lead to {len(made.unreachable):,} entries "
                f"({shown}); left out"
            )
        if made.left:
            say(
                f"{self.language}: no room for {made.left:,} entries; raise "
                f"tokenizer.new_pieces.{self.language}"
            )

    def _learn(self, words: Words, pieces: Pieces, size: int, barred: Collection[str]) -> Growth:
        """`size` further pieces, none of them `barred`, and their effect on the words."""
        content = with_pieces(self.base, [*self.earlier, *pieces])
        tokenizer = build_model(content)
        vocabulary = content["model"]["vocab"]
        names = [""] * (max(vocabulary.values()) + 1)
        for piece, id_ in vocabulary.items():
            names[id_] = piece
        spells = [self.base.family.spells(name) for name in names]
        arrays = _split_words(tokenizer, spells, words, f"splitting {self.language}")
        admits = self.base.family.admits(self.scripts, self.config.max_piece_length)
        taken = {*barred, *(token.content for token in added_tokens_of(self.base.content))}
        allowed = lambda text: text not in taken and admits(text)  # noqa: E731
        bpe = ContinuedBpe(names, arrays, allowed, self.config.min_frequency)
        return bpe.learn(size, f"learning {self.language}")


def with_pieces(base: Base, pieces: Sequence[str]) -> Content:
    """The base's `tokenizer.json` with pieces added at ids that serve for learning only."""
    first = max(base.ids.values()) + 1
    ids = {piece: first + number for number, piece in enumerate(pieces)}
    return extend_model(base.content, ids, base.family.settled())


def _split_words(
    tokenizer: Tokenizer, spells: Sequence[bool], words: Words, label: str
) -> WordArrays:
    """The words as split by a tokenizer that has only merges.

    Bytes of a character without a piece become a BREAK, because a piece may only contain characters
    that are pieces.
    """
    tokenizer.pre_tokenizer = Split(SEPARATOR, "removed")
    kept = np.where(spells, np.arange(len(spells)), BREAK).astype(np.int32)
    arrays = WordArrays()
    with Meter(label, words.distinct(), "words") as meter:
        for start in range(0, len(words.blocks), BLOCKS_AT_ONCE):
            texts, frequencies = zip(*words.blocks[start : start + BLOCKS_AT_ONCE], strict=True)
            # encode_batch_fast gives no word_ids
            encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
            lengths = np.concatenate(
                [np.bincount(np.array(one.word_ids, np.int64)) for one in encodings]
            )
            ids = np.concatenate([np.array(one.ids, np.int32) for one in encodings])
            arrays.add(kept[ids], lengths, np.concatenate(frequencies))
            meter.advance(len(lengths))
    return arrays


def idle_leaves(growth: Growth, min_frequency: int) -> set[str]:
    """The learnt pieces that are rare in the end and are no part of another learnt piece."""
    parts = {half for halves in growth.pieces.values() for half in halves}
    return {
        piece
        for piece in growth.pieces
        if growth.usage.get(piece, 0) < min_frequency and piece not in parts
    }
