"""Pieces chosen by the user: a word list, or the pieces of a SentencePiece model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cpt_merge.checkpoint.sentencepiece_model import NORMAL, parse_proto
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.tokenizer_ext.families.sentencepiece import SPACE
from cpt_merge.tokenizer_ext.families.tokenizer_json import Merge
from cpt_merge.tokenizer_ext.learn.scripts import Scripts

SHOWN = 3  # entries in a message
LONGEST = 50  # characters of an entry; SentencePiece refuses pieces of some hundred


def read_given(path: Path, scripts: Scripts) -> list[str]:
    """The entries of a list, the most important first, without entries that have characters of
    other scripts.

    A `.model` file is read as a SentencePiece model, by descending score. Any other file is a list
    of one word per line, without what follows a tab; a leading space belongs to the word, but is
    dropped for scripts without spaces between words. Raises `UserError` if nothing is left.
    """
    entries = _entries(path)
    if not scripts.set_words_apart:
        entries = [entry.removeprefix(" ") for entry in entries]
    long = [entry for entry in entries if len(entry) > LONGEST]
    if long:
        say(f"{path}: {len(long):,} entries are longer than {LONGEST} characters and are left out")
    entries = [entry for entry in entries if len(entry) <= LONGEST]
    fitting = [entry for entry in entries if scripts.spell(entry.removeprefix(" "))]
    others = [entry for entry in entries if entry and not scripts.spell(entry.removeprefix(" "))]
    wanted = " or ".join(scripts.language.scripts)
    if not fitting:
        raise UserError(
            f"{path} has no entry of {wanted} letters alone; correct tokenizer.pieces_from."
        )
    if others:
        shown = ", ".join(map(repr, others[:SHOWN]))
        say(
            f"{path}: {len(others):,} of {len(entries):,} entries are not of {wanted} alone and "
            f"left out ({shown})"
        )
    return list(dict.fromkeys(fitting))


def count_entries(path: Path) -> int:
    """The number of entries in a list, whether usable or not."""
    return len(list(filter(None, _entries(path))))


def _entries(path: Path) -> list[str]:
    if path.suffix != ".model":
        return _lines(path)
    pieces = [piece for piece in parse_proto(path).pieces if piece.type == NORMAL]
    pieces.sort(key=lambda piece: -piece.score)
    return [piece.piece.replace(SPACE, " ") for piece in pieces]


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); correct tokenizer.pieces_from."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it.") from None
    return [line.partition("\t")[0].rstrip() for line in text.splitlines()]


@dataclass(frozen=True)
class Replayed:
    """The pieces made from a list."""

    pieces: dict[str, Merge | None]  # in order; piece -> its two parts, None for a letter
    steps: int  # number of pieces that are not in the list, but lead to one that is
    unreachable: list[str]  # entries to which no admitted merges lead
    left: int  # entries for which there was no room


class Speller:
    """Splits a word as the tokenizer does: the merge of lowest rank first, the leftmost of equal
    ones.
    """

    def __init__(self, merges: Sequence[Merge]) -> None:
        self._rank = {merge: rank for rank, merge in reversed(list(enumerate(merges)))}
        self._new: dict[str, int] = {}

    def add(self, piece: str) -> None:
        """Make every split of `piece` into two a merge, after all others."""
        self._new[piece] = len(self._rank) + len(self._new)

    def forget(self, piece: str) -> None:
        """Undo the last `add`."""
        del self._new[piece]

    def split(self, word: str) -> list[str]:
        """The word's symbols."""
        symbols = list(word)
        while len(symbols) > 1:
            ranked = [(self._rank_of(*pair), place) for place, pair in enumerate(pairwise(symbols))]
            possible = [(rank, place) for rank, place in ranked if rank is not None]
            if not possible:
                break
            _, place = min(possible)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        return symbols

    def _rank_of(self, left: str, right: str) -> int | None:
        return self._new.get(left + right, self._rank.get((left, right)))


def replay(
    entries: Sequence[str],
    size: int,
    merges: Sequence[Merge],
    known: Collection[str],
    admits: Callable[[str], bool],
) -> Replayed:
    """Make up to `size` pieces of entries (in the alphabet of the vocabulary), in their order.

    Later pieces merge later, so an entry that is one piece stays one piece.
    """
    speller = Speller(merges)
    wanted = frozenset(entries)
    pieces: dict[str, Merge | None] = {}
    unreachable: list[str] = []
    missing = [entry for entry in dict.fromkeys(entries) if entry not in known]
    left = 0
    for done, entry in enumerate(missing):
        letters = [
            letter
            for letter in dict.fromkeys(entry)
            if letter not in known and letter not in pieces
        ]
        steps = _make_whole(speller, entry, lambda text: text not in known and admits(text), wanted)
        if steps is None:
            unreachable.append(entry)
        elif len(pieces) + len(letters) + len(steps) > size:
            left = len([other for other in missing[done:] if other not in pieces])
            break
        else:
            pieces |= {**dict.fromkeys(letters), **steps}
    return Replayed(pieces, len(pieces.keys() - wanted), unreachable, left)


def _make_whole(
    speller: Speller, entry: str, admits: Callable[[str], bool], wanted: Collection[str]
) -> dict[str, Merge] | None:
    """The pieces that make `entry` one symbol, or None if that takes pieces that are not admitted.

    Neighbours that spell another entry are merged first, then those with the shortest string, from
    the left.
    """
    steps: dict[str, Merge] = {}
    while len(symbols := speller.split(entry)) > 1:
        pairs = [pair for pair in pairwise(symbols) if admits("".join(pair))]
        if not pairs:
            for piece in reversed(steps):
                speller.forget(piece)
            return None
        pair = min(pairs, key=lambda pair: ("".join(pair) not in wanted, len("".join(pair))))
        speller.add("".join(pair))
        steps["".join(pair)] = pair
    return steps
