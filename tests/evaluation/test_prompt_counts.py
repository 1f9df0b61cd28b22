"""How many prompts show what difference: docs/evaluation.md's table, computed exactly.

Of n prompts, the better model alone passes a share d + r and the other one alone r. The p-value of
such a difference, over exchanges of the models, is that of a sign test, so power is a finite sum.
"""

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from cpt_merge.evaluation.statistics import chance_of

DOCS = Path(__file__).parents[2] / "docs/evaluation.md"
SIZES, REVERSED, COMPARED = (25, 54, 100, 200, 541), (0.0, 0.05, 0.1), (1, 20)
POWER = 0.8


@cache
def fewest_gains(n: int, most: float) -> list[int]:
    """For each number of losses, the fewest gains whose sign test has a p-value of at most `most`."""
    found = []
    for losses in range(n + 1):
        gains = losses + 1
        while gains + losses <= n and chance(gains, losses) > most:
            gains += 1
        found.append(gains)
    return found


@cache
def chance(gains: int, losses: int) -> float:
    m = gains + losses
    tail = sum(math.comb(m, k) for k in range(gains, m + 1))
    return min(1.0, 2 * tail / 2**m)


def power(n: int, difference: float, reverse: float, most: float) -> float:
    """How often the better model's difference is starred."""
    gain, total = difference + reverse, 0.0
    if gain + reverse > 1:
        return 1.0
    logs = [math.lgamma(k + 1) for k in range(n + 1)]
    needed = fewest_gains(n, most)
    for losses in range(n + 1 if reverse else 1):
        for gains in range(needed[losses], n - losses + 1):
            equal = n - gains - losses
            log = logs[n] - logs[gains] - logs[losses] - logs[equal]
            log += gains * math.log(gain) + (losses * math.log(reverse) if losses else 0.0)
            rest = 1 - gain - reverse
            if equal and rest <= 0:
                continue
            total += math.exp(log + (equal * math.log(rest) if equal else 0.0))
    return total


def smallest(n: int, reverse: float, compared: int) -> int:
    """The smallest difference in points that is starred in 80 % of cases."""
    low, high = 0, 100
    while high - low > 1:
        middle = (low + high) // 2
        enough = power(n, middle / 100, reverse, 0.05 / compared) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


def test_the_sign_test_is_the_p_value_that_is_reported():
    for gains, losses in ((5, 0), (9, 2), (6, 5)):
        changes = np.array([1.0] * gains + [-1.0] * losses + [0.0] * 3)
        assert chance_of(changes, 0) == pytest.approx(chance(gains, losses), abs=0.01)


def rows(sizes):
    for n in sizes:
        cells = [smallest(n, reverse, compared) for compared in COMPARED for reverse in REVERSED]
        yield f"| {n} | " + " | ".join(map(str, cells)) + " |"


def test_the_table_of_the_docs():
    text = DOCS.read_text(encoding="utf-8")
    for row in rows(SIZES[:4]):
        assert row in text


@pytest.mark.slow
def test_the_tables_largest_size():
    assert next(rows(SIZES[4:])) in DOCS.read_text(encoding="utf-8")
