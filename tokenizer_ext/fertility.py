"""What the extension is worth: fertility before and after, the use of the new pieces, texts split both ways."""

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
EXAMPLE_TOKENS = 12  # shown of one example; text that only bytes can spell has many


@dataclass(frozen=True)
class Fertility:
    """One language's texts. Pairs are (with the base, with the extended tokenizer)."""

    language: str
    documents: int
    characters: int
    tokens_per_character: tuple[float, float]
    bytes_per_token: tuple[float, float]
    changed: float  # share of the documents whose tokens differ
    tokens: Counter[str]  # how often the extended tokenizer uses each token


@dataclass(frozen=True)
class Usefulness:
    """One language's new pieces."""

    language: str
    asked: int
    found: int
    characters: int  # single characters among them, there for coverage
    given: int  # from a list, with the steps towards them
    pruned: int  # learnt and left out again
    used_in_training: float  # share of the pieces that the counted text is spelt with in the end
    used_in_heldout: float  # share of the pieces that any held-out text is spelt with
    curve: list[
        tuple[int, float]
    ]  # number of pieces, tokens per character of the language's held-out text


@dataclass(frozen=True)
class Example:
    """A text as the two tokenizers split it."""

    language: str
    before: str
    after: str


def measure_fertility(case: Case, language: str, texts: Sequence[str]) -> Fertility:
    """Both tokenizers on some texts, at least one."""
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
    """How the pieces of one language are used, and what each further one saves before there are `later` ones."""
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
    """(number of pieces, tokens per character) for the first so many of `pieces`, from none to all.

    One of the points is at the `characters` that lead. The pieces that `later` languages have added do not count.

    What is merged last can be taken apart again: with fewer pieces a text is split as with all, but that each of the
    later pieces is the two that it is merged from, and so on. A single character is its bytes.
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
    """How many more tokens there are with only the first `size` pieces."""
    length: dict[str, int] = {}
    for rank, (piece, halves) in enumerate(
        pieces.items()
    ):  # halves come before what is merged from them
        if rank < size:
            length[piece] = 1
        else:
            length[piece] = (
                sum(length.get(half, 1) for half in halves) if halves else len(piece.encode())
            )
    return sum((length[piece] - 1) * counts[piece] for piece in pieces)


def split_examples(case: Case, language: str, texts: Sequence[str]) -> list[Example]:
    """A few lines of the texts, split by both tokenizers."""
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
