"""The mean of a piece's constituents, at the old rows' mean norm."""

from __future__ import annotations

from collections.abc import Iterator

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.tokenizer_ext.embeddings.methods.method import NewRows
from cpt_merge.tokenizer_ext.embeddings.methods.spelling import Spelling, spelt_rows


def constituents(task: NewRows) -> Iterator[Float32]:
    """The mean of the rows that spelt the piece before.

    A mean is shorter than its parts, so it is scaled up.
    """
    spelling = Spelling(norm=task.old.mean_norm)
    for row in spelt_rows(task, lambda piece: spelling):
        yield row[None]
