"""What people see of progress: amounts with a proper plural, and bars on terminals only."""

import subprocess
import sys

import pytest

from cpt_merge.core.progress import Meter, counted, say

LIBRARIES = """
from cpt_merge.core.progress import silence_bars
silence_bars()
import datasets, tqdm, transformers
for bar in (datasets.utils.tqdm, tqdm.tqdm, transformers.utils.logging.tqdm):
    assert list(bar(range(3))) == [0, 1, 2]
"""


def test_a_number_and_its_noun() -> None:
    counts = [
        (0, "prompt"),
        (1, "prompt"),
        (1200, "prompt"),
        (1, "process"),
        (2, "process"),
        (3, "reply"),
    ]
    assert [counted(*one) for one in counts] == [
        "0 prompts", "1 prompt", "1,200 prompts", "1 process", "2 processes", "3 replies",
    ]  # fmt: skip


def test_libraries_draw_no_bars_into_a_pipe() -> None:
    command = [sys.executable, "-c", LIBRARIES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("total", "unit", "shown"),
    [
        (0.0042, "MB", "0.0042/0.0042 MB"),
        (123456.7, "MB", "123,457/123,457 MB"),
        (5, "tensors", "5/5 tensors"),
    ],
)
def test_an_amount_is_shown_with_its_digits(capsys, total, unit, shown):
    with Meter("work", total, unit) as meter:
        meter.advance(total)
    assert f"work: {shown}" in capsys.readouterr().err


def test_the_last_line_has_the_time_that_it_took(capsys):
    """Also where the sum of many small amounts is a little less than the whole."""
    with Meter("work", 1.0, "MB") as meter:
        for _ in range(10):
            meter.advance(0.1)
    assert meter.done < 1
    assert "left" not in capsys.readouterr().err


def test_a_name_between_colons_is_no_emoji(capsys):
    say("ko:a: [b] 3 documents")
    assert capsys.readouterr().err == "ko:a: [b] 3 documents\n"
