"""Rows drawn from the distribution of the old rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.tokenizer_ext.embeddings.methods.method import NewRows


def gaussian(task: NewRows) -> Iterator[Float32]:
    """Drawn from the normal distribution with the old rows' mean and covariance.

    John Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021.
    """
    for count in task.batch_sizes():
        drawn = task.random.standard_normal((count, task.old.width)) @ task.old.covariance_root.T
        yield (task.old.mean + drawn).astype(np.float32)
