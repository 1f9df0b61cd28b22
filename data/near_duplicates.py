"""Clusters of near-duplicate documents, from their MinHash signatures (`data/minhash.py`).

Locality-sensitive hashing (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3)
proposes pairs: documents that agree in all rows of a band. Whether a pair is similar enough is then
decided by whole signatures. Signatures are read column by column, so memory holds a few numbers per
document and per pair, never the signatures.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cpt_merge.data.minhash import PERMUTATIONS
from cpt_merge.data.parts import Column
from cpt_merge.data.store import Integers

RECALL = 0.99  # least probability that a pair at the threshold is proposed

_MIX = np.uint64(0x9E3779B97F4A7C15)


def cluster_firsts(column: Callable[[int], Column], documents: int, threshold: float) -> Integers:
    """For each document, the first of its cluster; its own number if it is alone or the first.

    Documents are in one cluster if pairs whose estimated similarity is at least `threshold` connect
    them. `column(n)` reads number n of all signatures.
    """
    pairs = _proposed(column, documents, rows_of_band(threshold))
    first, second = np.divmod(pairs, max(documents, 1))
    equal = np.zeros(len(pairs), np.int64)
    for number in range(PERMUTATIONS if len(pairs) else 0):
        values = column(number)
        equal += values[first] == values[second]
    near = equal >= threshold * PERMUTATIONS
    return _connected(documents, first[near], second[near])


def rows_of_band(threshold: float) -> int:
    """The most rows with which a pair at the threshold is proposed with probability RECALL."""
    fitting = [
        rows
        for rows in range(1, PERMUTATIONS + 1)
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= RECALL
    ]
    return max(fitting, default=1)


def _proposed(column: Callable[[int], Column], documents: int, rows: int) -> Integers:
    """Pairs (a, b), a < b, that agree in a band, as a * documents + b.

    Of the documents that agree, each is paired with the first one and with the one before it.
    """
    pairs = np.zeros(0, np.int64)
    for start in range(0, PERMUTATIONS - rows + 1, rows):
        keys = np.zeros(documents, np.uint64)
        for number in range(start, start + rows):
            keys = (keys ^ column(number)) * _MIX
            keys ^= keys >> np.uint64(32)
        order = np.argsort(keys, kind="stable")
        agrees = np.flatnonzero(np.diff(keys[order]) == 0) + 1  # with the one before it
        begins = np.ones(documents, np.bool_)
        begins[agrees] = False
        runs = np.maximum.accumulate(np.where(begins, np.arange(documents), 0))
        found = [order[before] * documents + order[agrees] for before in (agrees - 1, runs[agrees])]
        pairs = np.unique(np.concatenate([pairs, *found]))
    return pairs


def _connected(documents: int, first: Integers, second: Integers) -> Integers:
    """The smallest document that each is connected with."""
    firsts = np.arange(documents)
    while True:
        low = np.minimum(firsts[first], firsts[second])
        before = firsts.copy()
        for one in (first, second):
            np.minimum.at(firsts, before[one], low)
        firsts = firsts[firsts]
        if (firsts == before).all():
            return firsts
