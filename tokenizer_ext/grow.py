"""The new pieces of one language: characters first, then a given list, then what is learnt from the text."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Split

from core.errors import UserError
from core.languages import find_language
from core.progress import Meter, say
from core.sources import Corpus
from core.sources import Split as Half
from tokenizer_ext.base import Base
from tokenizer_ext.config import TokenizerConfig
from tokenizer_ext.count import count_words
from tokenizer_ext.fast import Content, Merge, build_model, extend_model, merges_of
from tokenizer_ext.given import Replayed, read_given, replay
from tokenizer_ext.learn import ContinuedBpe, Growth, Vocabulary
from tokenizer_ext.scripts import Scripts
from tokenizer_ext.symbols import BREAK, WordArrays
from tokenizer_ext.words import SEPARATOR, Words

BLOCKS_AT_ONCE = 8  # of words that are split
Pieces = dict[str, Merge | None]  # piece -> the two that it is merged from, None for a single character


@dataclass(frozen=True)
class Learned:
    """What one language adds."""

    language: str
    pieces: Pieces  # the first merged first
    characters: int  # single characters for coverage; they lead
    given: int  # pieces from a list and steps towards them; they come next
    pruned: int  # pieces that were learnt and dropped again
    usage: Counter[str]  # token -> how often the counted words are spelt with it in the end


def learn_languages(base: Base, corpus: Corpus, config: TokenizerConfig) -> list[Learned]:
    """Learn every language in turn, each upon what the ones before it have added."""
    lists = {tag: read_given(path, Scripts(find_language(tag))) for tag, path in config.pieces_from.items()}
    learned: list[Learned] = []
    for language in config.languages():
        earlier = [piece for one in learned for piece in one.pieces]
        learned.append(_learn_language(base, earlier, corpus, language, lists.get(language, []), config))
    return learned


def documents(corpus: Corpus, language: str, split: Half, max_characters: int) -> Iterator[str]:
    """Documents in one language, from the start of each source in turn, until `max_characters` have been given.

    Raises `UserError` for a document that is no Unicode text.
    """
    left = max_characters
    for source in corpus.of_language(language):
        for number, text in enumerate(corpus.documents(source, split), start=1):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{source.path}: {split} document {number} holds a lone surrogate, so it is no Unicode text; "
                    "repair or remove it."
                ) from None
            yield text
            left -= len(text)
            if left <= 0:
                return


def with_pieces(base: Base, pieces: Sequence[str]) -> Content:
    """The base's `tokenizer.json` with pieces added at ids that serve for learning only."""
    first = max(base.ids.values()) + 1
    return extend_model(
        base.content, dict(zip(pieces, range(first, first + len(pieces)), strict=True)), base.family.settled()
    )


def _learn_language(
    base: Base, earlier: Sequence[str], corpus: Corpus, language: str, entries: Sequence[str], config: TokenizerConfig
) -> Learned:
    scripts = Scripts(find_language(language))
    texts = documents(corpus, language, "train", config.max_characters)
    words = count_words(texts, base.family.splitter(scripts), f"counting {language}")
    if not words.blocks:
        raise UserError(
            f"the text in {language!r} holds no {' or '.join(scripts.language.scripts)} letter; "
            "correct `language` in corpus.sources, or add text."
        )
    characters = _characters(base, earlier, words, language, config)
    given = _given(base, [*earlier, *characters], scripts, entries, config, len(characters)) if entries else {}
    pieces: Pieces = {**characters, **given}
    size = config.new_pieces.get(language, len(pieces))
    pruned: set[str] = set()
    while True:
        growth = _continue(base, [*earlier, *pieces], words, scripts, size - len(pieces), config, pruned)
        idle = idle_leaves(growth, config.min_frequency)
        pieces |= {piece: halves for piece, halves in growth.pieces.items() if piece not in idle}
        pruned |= idle
        if not idle:
            break
        say(f"{language}: {len(idle):,} pieces are used less than {config.min_frequency} times and left out again")
    if len(pieces) < size:
        say(
            f"{language}: found {len(pieces):,} of {size:,} pieces; no other pair occurs {config.min_frequency} times "
            "(tokenizer.min_frequency), or the text is too short."
        )
    return Learned(language, pieces, len(characters), len(given), len(pruned), Counter(growth.usage))


def _characters(base: Base, earlier: Sequence[str], words: Words, language: str, config: TokenizerConfig) -> Pieces:
    vocabulary = {*base.content["model"]["vocab"], *earlier}
    needed = base.family.needed_characters(words, config.character_coverage, vocabulary)
    size = config.new_pieces.get(language)
    if size is not None and len(needed) > size:
        raise UserError(
            f"tokenizer.new_pieces.{language} = {size} is too small: the text has {len(needed)} characters that the "
            "base lacks; raise it, or lower tokenizer.character_coverage."
        )
    return dict.fromkeys(needed)


def _given(
    base: Base,
    known: Sequence[str],
    scripts: Scripts,
    entries: Sequence[str],
    config: TokenizerConfig,
    characters: int,
) -> Pieces:
    """The pieces that the language's list makes, as many as there is room for."""
    language = scripts.language.tag
    content = with_pieces(base, known)
    admits = base.family.admits(scripts, max(map(len, entries)))
    room = config.new_pieces[language] - characters if language in config.new_pieces else sys.maxsize
    written = [base.family.written(entry) for entry in entries]
    made = replay(written, room, merges_of(content), content["model"]["vocab"].keys(), admits)
    _say_given(base, language, made, len(entries))
    return made.pieces


def _say_given(base: Base, language: str, made: Replayed, entries: int) -> None:
    taken = len(made.pieces) - made.steps
    say(f"{language}: {taken:,} of {entries:,} entries are new pieces, with {made.steps:,} steps towards them")
    if made.unreachable:
        shown = ", ".join(base.family.readable(entry) for entry in made.unreachable[:3])
        say(f"{language}: no merges of whole characters lead to {len(made.unreachable):,} entries ({shown}); left out")
    if made.left:
        say(f"{language}: no room for {made.left:,} entries; raise tokenizer.new_pieces.{language} to take them")


def _continue(
    base: Base,
    known: Sequence[str],
    words: Words,
    scripts: Scripts,
    size: int,
    config: TokenizerConfig,
    barred: Collection[str],
) -> Growth:
    """Go on from the base and `known` pieces: `size` more, none of them `barred`, and how all words are spelt then."""
    content = with_pieces(base, known)
    tokenizer = build_model(content)
    vocabulary = read_vocabulary(content, tokenizer, scripts, base)
    language = scripts.language.tag
    spells = [base.family.spells(name) for name in vocabulary.names]
    arrays = _split_words(tokenizer, spells, words, f"splitting {language}")
    admits = base.family.admits(scripts, config.max_piece_length)
    allowed = (lambda text: text not in barred and admits(text)) if barred else admits
    return ContinuedBpe(vocabulary, arrays, allowed, config.min_frequency).learn(size, f"learning {language}")


def read_vocabulary(content: Content, tokenizer: Tokenizer, scripts: Scripts, base: Base) -> Vocabulary:
    """What learning goes on from. `tokenizer` has the merges of `content` alone.

    Only dormant pieces that can stand in a word matter: with a letter of the scripts, or a part of a character.
    """
    ids = content["model"]["vocab"]
    names = [""] * (max(ids.values()) + 1)
    for piece, id_ in ids.items():
        names[id_] = piece
    merges = merges_of(content)
    made = {left + right for left, right in merges}
    possible = [piece for piece in made if _may_stand_in_a_word(base.family.spelt(piece), scripts)]
    spelt = tokenizer.encode_batch_fast(possible, add_special_tokens=False)
    dormant = {piece: one.ids for piece, one in zip(possible, spelt, strict=True) if len(one.ids) > 1}
    return Vocabulary(names, merges, dormant)


def _may_stand_in_a_word(spelt: bytes, scripts: Scripts) -> bool:
    try:
        return scripts.letter.search(spelt.decode()) is not None
    except UnicodeDecodeError:
        return True


def _split_words(tokenizer: Tokenizer, spells: Sequence[bool], words: Words, label: str) -> WordArrays:
    """The words as the tokenizer, which has only merges, splits them.

    Bytes of a character without a piece are a break: a piece may only contain characters that are pieces.
    """
    tokenizer.pre_tokenizer = Split(SEPARATOR, "removed")
    kept = np.where(spells, np.arange(len(spells)), BREAK).astype(np.int32)
    arrays = WordArrays()
    with Meter(label, words.distinct(), "words") as meter:
        for start in range(0, len(words.blocks), BLOCKS_AT_ONCE):
            texts, frequencies = zip(*words.blocks[start : start + BLOCKS_AT_ONCE], strict=True)
            encodings = tokenizer.encode_batch(texts, add_special_tokens=False)  # encode_batch_fast gives no word_ids
            lengths = np.concatenate([np.bincount(np.array(one.word_ids, np.int64)) for one in encodings])
            ids = np.concatenate([np.array(one.ids, np.int32) for one in encodings])
            arrays.add(kept[ids], lengths, np.concatenate(frequencies))
            meter.advance(len(lengths))
    return arrays


def idle_leaves(growth: Growth, min_frequency: int) -> set[str]:
    """The learnt pieces that the text hardly uses in the end, and that no other learnt piece is made of."""
    parts = {half for halves in growth.pieces.values() for half in halves}
    return {piece for piece in growth.pieces if growth.usage.get(piece, 0) < min_frequency and piece not in parts}
