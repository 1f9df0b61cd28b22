"""What the extension is worth: fertility before and after, the use of the new pieces, texts split both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tokenizers import Tokenizer

from core.languages import find_language
from tokenizer_ext.base import Base
from tokenizer_ext.grow import Learned
from tokenizer_ext.verify import Case

CURVE_POINTS = 12
EXAMPLES = 3  # per language
EXAMPLE_LENGTHS = range(8, 25)  # characters
EXAMPLE_TOKENS = 12  # shown of one example; text that only bytes can spell has many


@dataclass(frozen=True)
class Fertility:
    """One language's held-out text. Pairs are (with the base, with the extended tokenizer)."""

    language: str
    documents: int
    characters: int
    tokens_per_character: tuple[float, float]
    bytes_per_token: tuple[float, float]
    changed: float  # share of the documents whose tokens differ
    ids: frozenset[int]  # that the extended tokenizer uses


@dataclass(frozen=True)
class Usefulness:
    """One language's new pieces."""

    language: str
    asked: int
    found: int
    characters: int  # single characters among them, there for coverage
    used_in_training: float  # share of the pieces that the counted text is spelt with in the end
    used_in_heldout: float  # share of the pieces that any held-out text is spelt with
    curve: list[tuple[int, float]]  # number of pieces, tokens per letter of the counted text


@dataclass(frozen=True)
class Example:
    """A held-out text as the two tokenizers split it."""

    language: str
    before: str
    after: str


def measure_fertility(case: Case, language: str) -> Fertility | None:
    """Both tokenizers on a language's held-out documents; None where there are none."""
    texts = case.samples.heldout[language]
    if not texts:
        return None
    before, after = (
        [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        for tokenizer in (case.before, case.after)
    )
    tokens = sum(map(len, before)), sum(map(len, after))
    characters = sum(map(len, texts))
    size = sum(len(text.encode()) for text in texts)
    return Fertility(
        language=language,
        documents=len(texts),
        characters=characters,
        tokens_per_character=(tokens[0] / characters, tokens[1] / characters),
        bytes_per_token=(size / tokens[0], size / tokens[1]),
        changed=sum(old != new for old, new in zip(before, after, strict=True)) / len(texts),
        ids=frozenset(id_ for ids in after for id_ in ids),
    )


def measure_usefulness(case: Case, learned: Learned, asked: int, fertility: Sequence[Fertility]) -> Usefulness:
    """How the pieces of one language are used, and what each further one saves."""
    number = len(learned.pieces)
    ids = {piece.piece: piece.id for piece in case.map.new}
    seen = frozenset[int]().union(*(one.ids for one in fertility))
    remaining = [learned.tokens_before - saved for saved in accumulate(learned.saved, initial=0)]
    points = sorted({round(number * step / CURVE_POINTS) for step in range(CURVE_POINTS + 1)})
    return Usefulness(
        language=learned.language,
        asked=asked,
        found=number,
        characters=learned.characters,
        used_in_training=learned.used / max(number, 1),
        used_in_heldout=sum(ids[piece] in seen for piece in learned.pieces) / max(number, 1),
        curve=[(point, remaining[point] / learned.letters) for point in points],
    )


def split_examples(case: Case, language: str) -> list[Example]:
    """A few lines of the held-out text, split by both tokenizers."""
    letter = find_language(language).letters
    starts = (line[: EXAMPLE_LENGTHS[-1]] for text in case.samples.heldout[language] for line in text.splitlines())
    fitting = [start for start in starts if len(start) in EXAMPLE_LENGTHS and letter.search(start)]
    chosen = fitting[:: max(1, len(fitting) // EXAMPLES)][:EXAMPLES]
    return [
        Example(language, _split(case.base, case.before, text), _split(case.base, case.after, text)) for text in chosen
    ]


def _split(base: Base, tokenizer: Tokenizer, text: str) -> str:
    tokens = tokenizer.encode(text, add_special_tokens=False).tokens
    shown = "|".join(base.family.readable(token) for token in tokens[:EXAMPLE_TOKENS])
    return shown if len(tokens) <= EXAMPLE_TOKENS else f"{shown}|… ({len(tokens)} tokens)"
