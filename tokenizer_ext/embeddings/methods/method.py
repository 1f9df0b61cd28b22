"""What every initialisation method gets and returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.checkpoint.vocabulary_map import NewPiece
from cpt_merge.tokenizer_ext.embeddings.old_rows import OldRows
from cpt_merge.tokenizer_ext.embeddings.token_space import TokenSpace

BATCH = 1024  # rows
Use = Literal["input", "head", "both"]  # both: the one matrix of a tied model


@dataclass(frozen=True)
class NewRows:
    """The rows to initialise in one matrix, and everything that they may be made from."""

    pieces: Sequence[NewPiece]
    old: OldRows
    random: np.random.Generator
    use: Use = "input"
    space: TokenSpace | None = None  # of the new text's tokens; `focus` needs it
    letterless: frozenset[int] = frozenset()  # old ids without a whole letter; `auto` needs them

    def batch_sizes(self) -> Iterator[int]:
        """The number of pieces in each batch of at most `BATCH`."""
        for start in range(0, len(self.pieces), BATCH):
            yield min(BATCH, len(self.pieces) - start)

    def isotropic(self, count: int) -> Float32:
        """`count` random rows with about the old rows' mean norm, shape (count, width)."""
        drawn = self.random.standard_normal((count, self.old.width)).astype(np.float32)
        drawn *= np.float32(self.old.mean_norm / np.sqrt(self.old.width))
        return drawn


class Initialiser(Protocol):
    """One initialisation method."""

    def __call__(self, task: NewRows) -> Iterator[Float32]:
        """Yield the rows of all pieces in order, in batches, so that memory does not grow with
        their number.
        """
