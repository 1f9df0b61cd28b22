"""Where the rows of the extended vocabulary are in the model that training starts from.

That model may be the chat model, another model on the base's vocabulary, or what another run made
with the same extended tokenizer. Its rows are found by the names of their tokens, whatever their
ids are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import vocabulary_rows
from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles
from cpt_merge.checkpoint.vocabulary_map import VocabularyMap
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted, say

_SHOWN = 5
_RUN = 1024  # rows that are copied at a time
NOWHERE = -2  # the place of a row that is initialised; -1 would be in front of row 0


@dataclass(frozen=True)
class StartRows:
    """Where each row of the extended vocabulary is in the model that training starts from."""

    places: NDArray[np.int64]  # a row of that model for each row of the vocabulary, or NOWHERE
    base_rows: int

    @staticmethod
    def align(model: Checkpoint, tokenizer: Path, vocabulary: VocabularyMap) -> StartRows:
        """Find the rows of the extended `tokenizer` in `model`; says what both do not share.

        Raises `UserError` if the model lacks tokens of the base, or has pieces of its own.
        """
        rows, extended = vocabulary_rows(model), TokenizerFiles.read(tokenizer)
        assert extended is not None
        own = tokens_of(model.directory)
        renamed = check_tokens(own, extended, range(vocabulary.base_rows))
        check_pieces(own, extended)
        places = np.full(vocabulary.rows, NOWHERE)
        for number in range(vocabulary.rows):
            token = extended.tokens.get(number)
            if token is None:  # no token is there, so its row teaches nothing
                same = number < rows and own.tokens.get(number) is None
                spare = rows - 1 if number < vocabulary.base_rows else NOWHERE
                places[number] = number if same else spare
            else:
                place = own.ids.get(token, number if token in renamed else NOWHERE)
                places[number] = place if place < rows else NOWHERE
        missing = [extended.tokens[int(one)] for one in _nowhere(places[: vocabulary.base_rows])]
        if missing:
            raise UserError(f"{_start(model.directory)} has no rows for {_listed(missing)}.")
        dropped = sorted(own.ids.keys() - extended.ids.keys() - set(renamed.values()))
        if dropped:
            say(
                f"embeddings: left out {counted(len(dropped), 'added token')} of {model.directory} "
                f"that the extended tokenizer lacks ({_listed(dropped)})"
            )
        return StartRows(places, vocabulary.base_rows)

    @property
    def old(self) -> NDArray[np.int64]:
        """Where the base's rows are."""
        return self.places[: self.base_rows]

    def has(self, row: int) -> bool:
        """Whether a row of the extended vocabulary is in the model."""
        return bool(self.places[row] != NOWHERE)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(first row, where it is, where the run ends) of rows that follow one another there."""
        breaks = (np.flatnonzero(np.diff(self.places) != 1) + 1).tolist()
        for first, last in pairwise([0, *breaks, len(self.places)]):
            start = int(self.places[first])
            if start != NOWHERE:
                for number in range(0, last - first, _RUN):
                    yield first + number, start + number, start + min(number + _RUN, last - first)

    def are_all(self, rows: int) -> bool:
        """Whether the extended vocabulary's rows are those of a matrix of so many, in order."""
        return rows == len(self.places) and np.array_equal(self.places, np.arange(rows))


def check_tokens(
    own: TokenizerFiles, other: TokenizerFiles, needed: Collection[int]
) -> dict[str, str]:
    """Check that the model to start from has the tokens of `other` with the `needed` ids.

    Returns reserved tokens of `other` with the names that the chat format gave them. Raises
    `UserError` for tokens that are missing.
    """
    renamed = {
        token: name
        for number, token in other.tokens.items()
        if token in other.added - own.ids.keys()
        and (name := own.tokens.get(number)) in own.added - other.ids.keys()
        and name is not None
    }
    known = own.ids.keys() | renamed.keys()
    missing = [token for number, token in other.tokens.items() if number in needed]
    missing = [token for token in missing if token not in known]
    if missing:
        raise UserError(
            f"{_start(own.directory)} lacks {counted(len(missing), 'token')} of the base "
            f"({_listed(missing)}); give a model of the base's vocabulary, or one that "
            "another run made of this base."
        )
    return renamed


def check_pieces(own: TokenizerFiles, extended: TokenizerFiles) -> None:
    """Raise `UserError` if the model to start from has pieces that the tokenizer lacks."""
    pieces = sorted(own.ids.keys() - extended.ids.keys() - own.added)
    if pieces:
        raise UserError(
            f"{_start(own.directory)} has {counted(len(pieces), 'piece')} that this run's "
            f"tokenizer lacks ({_listed(pieces)}), so what it learned of them would be lost; "
            "give this run the `tokenizer` and `corpus` of the run that made it."
        )


def tokens_of(directory: Path) -> TokenizerFiles:
    """The tokenizer of the model to start from. Raises `UserError` if it has none."""
    found = TokenizerFiles.read(directory)
    if found is None:
        raise UserError(
            f"{_start(directory)} has no tokenizer (tokenizer.json or tokenizer.model), so what "
            "its rows mean is unknown; copy the model's tokenizer into it."
        )
    return found


def _nowhere(places: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.flatnonzero(places == NOWHERE)


def _start(directory: Path) -> str:
    return f"training.start = {directory}"


def _listed(tokens: Collection[str]) -> str:
    shown = ", ".join(map(repr, list(tokens)[:_SHOWN]))
    return shown + (", ..." if len(tokens) > _SHOWN else "")
