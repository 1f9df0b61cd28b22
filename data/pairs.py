"""Pairs of a preferred and a rejected reply in packed sequences.

A store of pairs is one of conversations in which the rows of a pair lie together: in a sequence,
the documents with targets are the chosen and the rejected row of the first pair, of the second, and
so on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor


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

    def of(self, sequence: int) -> npt.NDArray[np.float32]:
        """Those of one sequence."""
        return self.values[self.first[sequence] : self.first[sequence + 1]]
