"""The defaults of `cpt-merge init`."""

from pathlib import Path

import pytest

from cpt_merge.launcher.choosing import (
    BEGIN,
    END,
    SIZES,
    LanguageFacts,
    as_markdown,
    choose_batch,
    choose_shares,
    choose_tokens,
    defaults_for,
)

ROOT = Path(__file__).parents[2]
CURVE = ((0, 2.0), (500, 1.2), (1000, 1.0), (1500, 0.98), (2000, 0.97))


def test_the_page_shows_the_tables() -> None:
    """docs/choosing.md is what `make docs` writes."""
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0] == f"\n{as_markdown()}\n"


def test_larger_models_learn_slower_and_new_rows_faster() -> None:
    rates = [row.learning_rate for row in SIZES]
    assert rates == sorted(rates, reverse=True)
    assert all(row.embedding_learning_rate > row.learning_rate for row in SIZES)
    assert defaults_for(8e9) is SIZES[3]
    assert defaults_for(1e12) is SIZES[-1]


def test_as_many_pieces_as_save_something() -> None:
    assert LanguageFacts(1e6, CURVE).pieces(fewest=0) == 1500
    assert LanguageFacts(1e6, CURVE).pieces(fewest=1600) == 2000, "characters come first"
    assert LanguageFacts(1e6, ((0, 0.7), (2000, 0.65))).pieces(fewest=0) == 0, "saves 7 %"
    assert LanguageFacts(1e6, ((0, 0.7),)).pieces(fewest=0) == 0, "cannot be extended"


def test_little_text_is_read_four_times_and_much_text_as_far_as_the_budget_goes() -> None:
    row = defaults_for(8e9)
    assert choose_tokens(row, 1e6, replay=False)[0] == 4_000_000
    assert choose_tokens(row, 1e6, replay=True)[0] == 4_700_000, "85 % of them are the text"
    assert choose_tokens(row, 1e12, replay=True)[0] == row.tokens


@pytest.mark.parametrize("ranks", [1, 6, 8])
def test_a_batch_divides_over_the_ranks_and_leaves_steps_enough(ranks: int) -> None:
    row = defaults_for(8e9)
    assert choose_batch(row, 3_000_000_000, 4096, ranks) % ranks == 0
    assert 10_000_000 / (choose_batch(row, 10_000_000, 4096, 1) * 4096) >= 300
    assert choose_batch(row, 1000, 4096, ranks) == ranks


def test_shares_sum_to_one_and_a_small_language_is_not_lost() -> None:
    shares = choose_shares({"ko": 9e6, "zh_tw": 1e6}, replay=True)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["en"] == 0.15
    assert shares["zh_tw"] == pytest.approx(0.85 / 4, abs=1e-3)
