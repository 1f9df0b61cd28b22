"""Deadlines come from the command line or from Slurm; the earlier one counts."""

from datetime import datetime

import pytest

from cpt_merge.core.deadline import deadline, parse_stop_at
from cpt_merge.core.errors import UserError

NOW = datetime(2026, 11, 24, 17, 30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-24T18:00", datetime(2026, 11, 24, 18)),
        ("18:00", datetime(2026, 11, 24, 18)),
        ("17:00", datetime(2026, 11, 25, 17)),
        ("+90m", datetime(2026, 11, 24, 19)),
        ("+8h", datetime(2026, 11, 25, 1, 30)),
    ],
)
def test_times(text: str, expected: datetime) -> None:
    assert parse_stop_at(text, NOW) == expected.timestamp()


@pytest.mark.parametrize("text", ["soon", "2026-11-24T17:00", "+3d", "25:00"])
def test_what_is_no_time_or_past_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--stop-at"):
        parse_stop_at(text, NOW)


def test_the_first_of_both_counts() -> None:
    assert deadline({}) == float("inf")
    assert deadline({"SLURM_JOB_END_TIME": "200", "CPT_MERGE_STOP_AT": "100.5"}) == 100.5
    with pytest.raises(UserError, match="SLURM_JOB_END_TIME=later is not a time"):
        deadline({"SLURM_JOB_END_TIME": "later"})
