"""Pairs of a preferred and a rejected reply in packed sequences.

A store of pairs is one of conversations in which the rows of a pair lie together: in a sequence,
the documents with targets are the chosen and the rejected row of the first pair, of the second, and
so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cpt_merge.core.artifact import write_arrays


@dataclass(frozen=True)
class Pairs:
    """Which tokens of a batch belong to which reply, and what the reference model makes of them.

    `reply` (int64 [tokens]) is 2 i for targets of pair i's chosen reply, 2 i + 1 for those of its
    rejected one, and 2 * count elsewhere. `reference` [count, 2] has the log probabilities of both,
    in nats; None while they are being computed.
    """

    reply: Tensor
    count: int
    beta: float
    reference: Tensor | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Pairs:
        """The same with other tensors."""
        reference = None if self.reference is None else change(self.reference)
        return replace(self, reply=change(self.reply), reference=reference)


def replies_of(
    has_target: npt.NDArray[np.bool_], boundaries: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int64], int]:
    """(`reply` of a batch, how many pairs it has); documents begin at `boundaries`."""
    document = np.repeat(np.arange(len(boundaries) - 1), np.diff(boundaries))
    counted = np.bincount(document, has_target, minlength=len(boundaries) - 1) > 0
    number = np.cumsum(counted) - 1
    replies = int(counted.sum())
    assert replies % 2 == 0, "the rows of a pair lie in one sequence"
    return np.where(has_target, number[document], replies), replies // 2


@dataclass(frozen=True)
class Reference:
    """Log probabilities of the replies of one split of one source, by its sequences."""

    values: npt.NDArray[np.float32]  # [pairs, 2]
    first: npt.NDArray[np.int64]  # [sequences + 1], the number of a sequence's first pair

    @staticmethod
    def of(by_sequence: Sequence[npt.NDArray[np.float32]]) -> Reference:
        """From the values of each sequence."""
        counts = [0, *map(len, by_sequence)]
        values = np.concatenate([np.zeros((0, 2), np.float32), *by_sequence])
        return Reference(values, np.cumsum(counts, dtype=np.int64))

    @staticmethod
    def read(path: Path) -> Reference:
        """What `write` wrote."""
        with np.load(path) as kept:
            return Reference(kept["values"], kept["first"])

    def write(self, path: Path) -> None:
        """Write it, complete or not at all."""
        write_arrays(path, {"values": self.values, "first": self.first})

    def sequence(self, number: int) -> npt.NDArray[np.float32]:
        """Those of one sequence [pairs, 2]."""
        return self.values[self.first[number] : self.first[number + 1]]

    def pairs(self, numbers: npt.NDArray[np.int64]) -> int:
        """How many pairs these sequences have."""
        return int((self.first[numbers + 1] - self.first[numbers]).sum())


@dataclass(frozen=True)
class Preference:
    """What turns conversations into pairs: the loss's beta, and where references are kept."""

    beta: float
    folder: Path

    def path(self, documents: Path) -> Path:
        """Where the reference of the split in `documents` (STORE/SOURCE/SPLIT) is."""
        return self.folder / f"{documents.parent.name}-{documents.name}.npz"
