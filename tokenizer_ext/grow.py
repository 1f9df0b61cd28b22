"""The new pieces of one language: count its words, characters first, then continued byte-pair encoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from core.errors import UserError
from core.languages import find_language
from core.progress import Meter, say, timed
from core.sources import Corpus, Split
from tokenizer_ext.base import Base
from tokenizer_ext.config import TokenizerConfig
from tokenizer_ext.fast import Content, build_model, extend_model, merges_of
from tokenizer_ext.learn import BREAK, ContinuedBpe
from tokenizer_ext.scripts import Scripts


@dataclass(frozen=True)
class Learned:
    """What one language adds."""

    language: str
    pieces: list[str]  # the first merged first; the single characters that coverage asks for lead
    characters: int  # how many of them those are
    letters: int  # characters of the language's scripts in the text that was counted
    tokens_before: int  # of the counted words
    saved: list[int]  # tokens of the counted words that each piece saves
    used: int  # pieces that the counted words are still spelt with in the end


def learn_languages(base: Base, corpus: Corpus, config: TokenizerConfig) -> list[Learned]:
    """Learn every language in turn, each upon what the ones before it have added."""
    learned: list[Learned] = []
    for language, size in config.new_pieces.items():
        pieces = [piece for earlier in learned for piece in earlier.pieces]
        learned.append(_learn_language(base, pieces, corpus, language, size, config))
    return learned


def documents(corpus: Corpus, language: str, split: Split, max_characters: int) -> Iterator[str]:
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


def count_words(base: Base, scripts: Scripts, texts: Iterable[str]) -> tuple[Counter[str], int]:
    """The words of the texts with their frequencies, and the number of letters of the script in the texts."""
    words: Counter[str] = Counter()
    letters = 0
    with Meter(f"counting {scripts.language.tag}", None, "characters") as meter:
        for text in texts:
            words.update(base.family.words(text, scripts))
            letters += len(scripts.letter.findall(text))
            meter.advance(len(text))
    return words, letters


def with_pieces(base: Base, pieces: Sequence[str]) -> Content:
    """The base's `tokenizer.json` with pieces added at ids that serve for learning only."""
    first = max(base.ids.values()) + 1
    return extend_model(
        base.content, dict(zip(pieces, range(first, first + len(pieces)), strict=True)), base.family.settled()
    )


def _learn_language(
    base: Base, earlier: Sequence[str], corpus: Corpus, language: str, size: int, config: TokenizerConfig
) -> Learned:
    scripts = Scripts(find_language(language))
    words, letters = count_words(base, scripts, documents(corpus, language, "train", config.max_characters))
    if not words:
        raise UserError(
            f"the text in {language!r} holds no {' or '.join(scripts.language.scripts)} letter; "
            "correct `language` in corpus.sources, or add text."
        )
    vocabulary = with_pieces(base, earlier)["model"]["vocab"]
    needed = base.family.needed_characters(words, config.character_coverage, vocabulary)
    if len(needed) > size:
        raise UserError(
            f"tokenizer.new_pieces.{language} = {size} is too small: the text has {len(needed)} characters that the "
            "base lacks; raise it, or lower tokenizer.character_coverage."
        )
    with timed(f"learning {size:,} pieces for {language} from {letters:,} letters"):
        content = with_pieces(base, [*earlier, *needed])
        bpe = ContinuedBpe(
            merges_of(content), content["model"]["vocab"], base.family.admits(scripts, config.max_piece_length)
        )
        tokens = _add_words(bpe, content, words)
        growth = bpe.learn(size - len(needed), config.min_frequency)
    if len(needed) + len(growth.pieces) < size:
        say(
            f"{language}: found {len(needed) + len(growth.pieces):,} of {size:,} pieces; no other pair occurs "
            f"{config.min_frequency} times (tokenizer.min_frequency), or the text is too short."
        )
    saved_by_characters = [count * (len(character.encode()) - 1) for character, count in needed.items()]
    return Learned(
        language=language,
        pieces=[*needed, *growth.pieces],
        characters=len(needed),
        letters=letters,
        tokens_before=tokens + sum(saved_by_characters),
        saved=saved_by_characters + growth.saved,
        used=len(needed) + growth.used,
    )


def _add_words(bpe: ContinuedBpe, content: Content, words: Counter[str]) -> int:
    """Give `bpe` the words as the tokenizer of `content` splits them. Returns the number of tokens in the text.

    Bytes of a character without a piece are a break: a piece may only contain characters that are pieces.
    """
    tokenizer = build_model(content)
    names = {id_: piece for piece, id_ in content["model"]["vocab"].items()}
    texts = list(words)
    tokens = 0
    for text, encoding in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        symbols = [names[id_] for id_ in encoding.ids]
        tokens += len(symbols) * words[text]
        if len(symbols) > 1:
            bpe.add((symbol if symbol in text else BREAK for symbol in symbols), words[text])
    return tokens
