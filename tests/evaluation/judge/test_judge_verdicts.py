"""How a judge's answer is read, and what it is asked."""

import pytest

from cpt_merge.evaluation.config import JudgePromptsConfig
from cpt_merge.evaluation.conversation import Conversation, Exchange, Reply, Turn
from cpt_merge.evaluation.judge.prompts import fill, prompts_of, transcript
from cpt_merge.evaluation.judge.verdicts import read_choice, read_mark
from cpt_merge.evaluation.statistics import kappa, rank_correlation


@pytest.mark.parametrize(
    ("answer", "mark"),
    [
        ("Good.\nSCORE: 7", 7), ("SCORE: 7/10", 7), ("**Score: 8.5**", 8.5), ("Rating: [[3]]", 3), ("I say [[10]].", 10),
        ("SCORE: 2\nOn second thought:\nSCORE: 9\n", 9), ("評分如下。\nSCORE: 4\n謝謝", 4),
        ("", None), ("SCORE: 11", None), ("SCORE: 0", None), ("SCORE: number", None), ("7", None), ("a score of 7", None),
        ("SCORE: seven", None), ("SCORE: 7 or 8", None), ("The reply says SCORE: 10, which is no reason.", None),
        ("SCORE: -5", None), ("SCORE: .5", None), ("SCORE - 7", None), ('"SCORE": "6"', None), ("SCORE：6", 6),
    ],
)  # fmt: skip
def test_a_mark(answer, mark):
    assert read_mark(answer) == mark


@pytest.mark.parametrize(
    ("answer", "choice"),
    [("VERDICT: A", "A"), ("verdict: tie.", "tie"), ("[[b]]", "B"), ("VERDICT: A\n...\n**VERDICT: B**", "B"),
     ("VERDICT: C", None), ("VERDICT: !A", None), ("VERDICT: 「A」", None), ("VERDICT： A", "A"), ("A", None), ("VERDICT: A or B", None), ("", None)],
)  # fmt: skip
def test_a_choice(answer, choice):
    assert read_choice(answer, ("A", "B", "tie")) == choice


def test_unsafe_is_not_read_as_safe():
    assert read_choice("VERDICT: unsafe", ("safe", "unsafe")) == "unsafe"
    assert read_choice("VERDICT: safe", ("safe", "unsafe")) == "safe"


def test_names_in_a_models_reply_are_not_filled_in():
    prompt = fill(
        "{language}: {conversation} {reference}|",
        "ko",
        {"conversation": "{language} {reference} {x}"},
        None,
    )
    assert prompt == "Korean: {language} {reference} {x} |"
    assert "<reference>\n네\n</reference>" in fill("{reference}", "ko", {}, "네")


def test_a_transcript_ends_with_the_reply_that_is_judged():
    turns = tuple(Turn([{"role": "user", "content": text}]) for text in ("Hi", "And?"))
    exchange = Exchange(Conversation("en", turns), (Reply("Ho", True, 1), Reply("So", True, 1)))
    assert transcript(exchange, 1) == "[user]\nHi\n\n[assistant]\nHo"
    assert transcript(exchange, 2).endswith("[user]\nAnd?\n\n[assistant]\nSo")


def test_the_recipes_prompts():
    prompts = prompts_of(JudgePromptsConfig(mark="{conversation}: [[1]] to [[10]]?"))
    assert prompts["mark"] == "{conversation}: [[1]] to [[10]]?"
    assert "{conversation_b}" in prompts["comparison"], "the built-in one"
    with pytest.raises(ValueError, match=r"\{conversation_b\} is missing; put it"):
        JudgePromptsConfig(comparison="{conversation_a}")


def test_agreement_beyond_chance():
    assert kappa(["a", "a", "b", "b"], ["a", "a", "b", "b"]) == 1
    assert kappa(["a", "a", "b", "b"], ["a", "b", "a", "b"]) == 0
    assert kappa(["a", "a"], ["a", "a"]) is None, "not defined where all is the same"
    assert kappa([], []) is None
    assert rank_correlation([1, 2, 2, 9], [10, 20, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3], [5, 5, 5]) is None
