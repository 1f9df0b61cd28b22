"""What an extension achieves: fertility before and after, use of the new pieces, texts split by
both tokenizers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from cpt_merge.core.languages import find_language
from cpt_merge.tokenizer_ext.base_tokenizer import Base
from cpt_merge.tokenizer_ext.learn.grow import Learned, Pieces
from cpt_merge.tokenizer_ext.verify.invariants import Case

CURVE_POINTS = 16
EXAMPLES = 3  # per language
EXAMPLE_LENGTHS = range(8, 25)  # characters
EXAMPLE_TOKENS = 12  # shown of one example; text in bytes has many


@dataclass(frozen=True)
class Fertility:
    """One language's texts. Pairs are (base, extended tokenizer)."""

    language: str
    documents: int
    characters: int
    tokens_per_character: tuple[float, float]
    bytes_per_token: tuple[float, float]
    changed: float  # share of the documents that are tokenized differently
    tokens: Counter[str]  # how often the extended tokenizer uses each token


@dataclass(frozen=True)
class Usefulness:
    """One language's new pieces."""

    language: str
    asked: int
    found: int
    characters: int  # single characters among them, for coverage
    given: int  # from a list, including the steps towards its entries
    pruned: int  # learnt and dropped again
    used_in_training: float  # share of the pieces that occur in the counted text in the end
    used_in_heldout: float  # share of the pieces that occur in any held-out text
    curve: list[tuple[int, float]]  # (number of pieces, tokens per character of held-out text)


@dataclass(frozen=True)
class Example:
    """A text as both tokenizers split it."""

    language: str
    before: str
    after: str


def measure_fertility(case: Case, language: str, texts: Sequence[str]) -> Fertility:
    """Measure both tokenizers on at least one text."""
    before, after = (
        [
            encoding.ids
            for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
        for tokenizer in (case.before, case.after)
    )
    tokens = sum(map(len, before)), sum(map(len, after))
    characters = sum(map(len, texts))
    size = sum(len(text.encode()) for text in texts)
    names = {id_: token for token, id_ in case.content["model"]["vocab"].items()}
    return Fertility(
        language=language,
        documents=len(texts),
        characters=characters,
        tokens_per_character=(tokens[0] / characters, tokens[1] / characters),
        bytes_per_token=(size / tokens[0], size / tokens[1]),
        changed=sum(old != new for old, new in zip(before, after, strict=True)) / len(texts),
        tokens=Counter(names.get(id_, "") for ids in after for id_ in ids),
    )


def measure_usefulness(
    case: Case, learned: Learned, later: Pieces, asked: int, fertility: Mapping[str, Fertility]
) -> Usefulness:
    """Measure how the pieces of one language are used, and what each of them saves before the
    `later` ones.
    """
    number = max(len(learned.pieces), 1)
    seen = set[str]().union(*(one.tokens for one in fertility.values()))
    own = fertility.get(learned.language)
    return Usefulness(
        language=learned.language,
        asked=asked,
        found=len(learned.pieces),
        characters=learned.characters,
        given=learned.given,
        pruned=learned.pruned,
        used_in_training=len(learned.pieces.keys() & learned.usage.keys()) / number,
        used_in_heldout=len(learned.pieces.keys() & seen) / number,
        curve=gain_curve(learned.pieces, later, own, learned.characters) if own else [],
    )


def gain_curve(
    pieces: Pieces, later: Pieces, text: Fertility, characters: int
) -> list[tuple[int, float]]:
    """(number of pieces, tokens per character) with the first n of `pieces`, for n from none to
    all.

    One point is at the number of leading single `characters`. Pieces that `later` languages add do
    not count.

    A split with fewer pieces follows from the split with all of them: each missing piece falls back
    to the two pieces that it is merged from, and so on; a single character falls back to its bytes.
    """
    points = sorted(
        {
            characters,
            *(round(len(pieces) * step / CURVE_POINTS) for step in range(CURVE_POINTS + 1)),
        }
    )
    every = {**pieces, **later}
    tokens = text.tokens.total()
    return [
        (size, (tokens + _more_tokens(every, text.tokens, size)) / text.characters)
        for size in points
    ]


def _more_tokens(pieces: Pieces, counts: Counter[str], size: int) -> int:
    """How many more tokens there are with the first `size` pieces only."""
    length: dict[str, int] = {}
    for rank, (piece, halves) in enumerate(pieces.items()):  # halves precede the merged piece
        if rank < size:
            length[piece] = 1
        else:
            length[piece] = (
                sum(length.get(half, 1) for half in halves) if halves else len(piece.encode())
            )
    return sum((length[piece] - 1) * counts[piece] for piece in pieces)


def split_examples(case: Case, language: str, texts: Sequence[str]) -> list[Example]:
    """Split a few lines of the texts with both tokenizers."""
    starts = [line[: EXAMPLE_LENGTHS[-1]] for text in texts for line in text.splitlines()]
    letter = find_language(language).letters
    fitting = [start for start in starts if len(start) in EXAMPLE_LENGTHS and letter.search(start)]
    chosen = fitting[:: max(1, len(fitting) // EXAMPLES)][:EXAMPLES]
    return [
        Example(language, _split(case.base, case.before, text), _split(case.base, case.after, text))
        for text in chosen
    ]


def _split(base: Base, tokenizer: Tokenizer, text: str) -> str:
    tokens = tokenizer.encode(text, add_special_tokens=False).tokens
    shown = "|".join(base.family.readable(token) for token in tokens[:EXAMPLE_TOKENS])
    return shown if len(tokens) <= EXAMPLE_TOKENS else f"{shown}|… ({len(tokens)} tokens)"
