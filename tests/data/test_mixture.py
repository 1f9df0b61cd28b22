"""Weights, epochs, budgets and shares of languages; amounts that do not fit are an error."""

from typing import Any

import pytest

from cpt_merge.core.config import parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.data.mixture import describe, mixture
from cpt_merge.data.sources import Corpus


def corpus(*sources: dict[str, Any], **settings: Any) -> Corpus:
    listed = [
        {"path": f"{number}.txt", "language": "ko", **source}
        for number, source in enumerate(sources)
    ]
    return parse_section(Corpus, {"sources": listed, **settings}, "corpus")


def tokens_of(corpus: Corpus, available: list[int | None], total: int) -> list[float]:
    shares = mixture(corpus, available, total)
    assert sum(share.share for share in shares) == pytest.approx(1)
    for share in shares:
        assert share.share * total == pytest.approx(share.tokens)
    return [round(share.tokens, 6) for share in shares]


def test_weights_are_relative_and_one_if_not_set() -> None:
    assert tokens_of(corpus({"weight": 3}, {}), [10, 10], 1000) == [750, 250]


def test_budgets_and_epochs_come_first_and_weights_divide_the_rest() -> None:
    mixed = corpus({"tokens": 100}, {"epochs": 2.5}, {"weight": 3}, {"weight": 1})
    assert tokens_of(mixed, [50, 80, 1000, 1000], 1000) == [100, 200, 525, 175]
    assert [share.epochs for share in mixture(mixed, [50, 80, 1000, 1000], 1000)] == [
        2,
        2.5,
        0.525,
        0.175,
    ]


def test_a_language_has_its_share_whatever_its_sources() -> None:
    english = {"language": "en"}
    mixed = corpus(
        {}, {"weight": 4}, {**english, "tokens": 100}, english, shares={"ko": 0.85, "en": 0.15}
    )
    assert tokens_of(mixed, [None] * 4, 1000) == [170, 680, 100, 50]


def test_budgets_that_meet_the_run_to_a_step_are_scaled() -> None:
    assert tokens_of(corpus({"tokens": 600}, {"tokens": 400}), [10, 10], 1004) == [602.4, 401.6]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"tokens": 900}, {"epochs": 2}], "ask for 1,100 tokens, but training.tokens is 1,000"),
        ([{"tokens": 1000}, {}], "leave nothing for the sources with weights"),
        (
            [{"tokens": 300}, {"epochs": 2}],
            "ask for 500 tokens, but training.tokens is 1,000 and no source takes",
        ),
    ],
)
def test_contradictions(sources: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixture(corpus(*sources), [100] * len(sources), 1000)


def test_a_contradiction_within_a_language_is_named() -> None:
    mixed = corpus({"language": "en", "tokens": 200}, {}, shares={"en": 0.1, "ko": 0.9})
    with pytest.raises(UserError, match=r"ask for 200 tokens, but training.tokens is 100 to en"):
        mixture(mixed, [100, 100], 1000)


def test_epochs_of_a_source_that_is_not_tokenised_yet() -> None:
    with pytest.raises(
        UserError, match=r"epochs = 2, but its number of tokens is known only after"
    ):
        mixture(corpus({"epochs": 2}, {}), [None, None], 1000)


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ({"weight": 1, "tokens": 5}, {}, "has weight and tokens; set one of them"),
        ({}, {"shares": {"ko": 0.5}}, "sum to 0.5; they must be positive and sum to 1"),
        ({}, {"shares": {"en": 1.0}}, "names en but the sources are in ko"),
    ],
)
def test_what_a_recipe_cannot_say(
    source: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        corpus(source, **settings)


def test_amounts_are_no_part_of_the_text() -> None:
    one, other = corpus({"weight": 1}, {"tokens": 5}, shares={"ko": 1}), corpus({}, {"epochs": 2})
    assert one.text() == other.text()
    assert one.amounts() != other.amounts()


def test_a_line_for_each_source() -> None:
    lines = describe(mixture(corpus({"weight": 3}, {}), [10, 10], 1000))
    assert [line.split() for line in lines] == [
        ["ko:0", "75.00%", "750", "tokens", "75.00", "epochs"], ["ko:1", "25.00%", "250", "tokens", "25.00", "epochs"],
    ]  # fmt: skip
