"""How a judge's answer is read, and what it is asked."""

import pytest

from cpt_merge.evaluation.checks import parse_check
from cpt_merge.evaluation.config import JudgePatternsConfig, JudgePromptsConfig
from cpt_merge.evaluation.conversation import Conversation, Exchange, Reply, Turn
from cpt_merge.evaluation.judge.prompts import fill, names_other_language, prompts_of, transcript
from cpt_merge.evaluation.statistics import kappa, rank_correlation


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


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ("영어로 대답해 주세요: 서울은?", True), ("다음 문장을 영어로 번역해 줘.", True), ("영작해 줘.", True),
        ("請用英文回答。", True), ("把這句話翻譯成日語。", True), ("请用繁体字写。", True), ("Translate this into Korean.", False),
        ("Please answer in plain English.", True), ("English only: why?", True), ("서울은 어디에 있나요?", False), ("한국어로 대답해 줘.", False), ("이 한국어 문장을 영어로 옮겨 줘.", True),
        ("臺北在哪裡？", False), ("Where in Korea is Seoul?", False), ("영화 추천해 줘.", False), ("英國的首都是哪裡？", False),
    ],
)  # fmt: skip
def test_a_reply_in_the_language_that_was_asked_for_is_not_capped(request_, named):
    turns = (
        Turn([{"role": "user", "content": request_}]),
        Turn([{"role": "user", "content": "?"}]),
    )
    conversation = Conversation("ko", turns)
    assert [names_other_language(conversation, turn) for turn in (0, 1)] == [named, named]
    prompts = prompts_of(JudgePromptsConfig())
    for name, cap in (("mark", "at most 3"), ("comparison", "wrong language or script lose")):
        asked = fill(prompts[name], "ko", {}, None, named)
        assert (cap in asked) == (not named)
        assert "{" not in asked.replace("{conversation", ""), "every name is filled in"


def test_a_check_of_the_language_lifts_the_cap_too():
    check = parse_check({"name": "language", "language": "en"}, "here")
    conversation = Conversation("ko", (Turn([{"role": "user", "content": "?"}], (check,)),))
    assert names_other_language(conversation, 0)


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [("(", "no regular expression"), ("SCORE", "no group; put the verdict")],
)
def test_a_pattern_that_cannot_work_is_refused(pattern, sentence):
    with pytest.raises(ValueError, match=sentence):
        JudgePatternsConfig(mark=pattern)


def test_agreement_beyond_chance():
    assert kappa(["a", "a", "b", "b"], ["a", "a", "b", "b"]) == 1
    assert kappa(["a", "a", "b", "b"], ["a", "b", "a", "b"]) == 0
    assert kappa(["a", "a"], ["a", "a"]) is None, "not defined where all is the same"
    assert kappa([], []) is None
    assert rank_correlation([1, 2, 2, 9], [10, 20, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3], [5, 5, 5]) is None
