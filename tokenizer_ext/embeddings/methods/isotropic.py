"""Rows drawn around zero."""

from __future__ import annotations

from collections.abc import Iterator

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.tokenizer_ext.embeddings.methods.method import NewRows


def isotropic(task: NewRows) -> Iterator[Float32]:
    """Every direction alike, with about the old rows' mean norm."""
    for count in task.batch_sizes():
        yield task.isotropic(count)
