"""The mean of a piece's constituents, leaning on one of its ends."""

from __future__ import annotations

from collections.abc import Iterator

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.tokenizer_ext.embeddings.methods.method import NewRows, Use
from cpt_merge.tokenizer_ext.embeddings.methods.spelling import Spelling, spelt_rows

SHARES: dict[Use, float] = {"input": 0.5, "head": 0.25, "both": 0}


def ends(task: NewRows) -> Iterator[Float32]:
    """The mean of the constituents, moved towards the last one in the input and the first one in
    the head.

    What follows a piece follows its last constituent, and what is predicted in a piece's place is
    its first one. The head leans less, or pieces that begin alike could not be told apart; a tied
    matrix leans on neither. No norm is changed. The idea is EEVE's (Kim et al., 2024,
    https://arxiv.org/abs/2402.14714: mean for the input, first constituent for the head); the
    shares are measured (docs/embeddings.md).
    """
    spelling = Spelling(SHARES[task.use])
    for row in spelt_rows(task, lambda piece: spelling):
        yield row[None]
