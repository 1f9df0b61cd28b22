"""An evaluation of reasoning models: verdicts see the answers, samples keep the thoughts."""

import json

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Exchange, Reply, prompt
from cpt_merge.evaluation.judge.prompts import transcript
from cpt_merge.evaluation.run import run
from cpt_merge.tracking import Tracker, TrackingConfig, read_log, start_tracker
from tests.evaluation.thinkers import PLAIN, write_thinker


@pytest.fixture(scope="module")
def thinkers(tmp_path_factory):
    root = tmp_path_factory.mktemp("thinkers")
    answer = ["서울", "입니다.", "</s>"]
    return {
        "base": write_thinker(root / "base", answer, PLAIN),
        "chat": write_thinker(root / "chat", ["<think>", "Well, 병신", "</think>", *answer]),
        "endless": write_thinker(root / "endless", ["<think>", "음", "음"]),
        "hybrid": write_thinker(root / "hybrid", answer, after=["[/INST]", "</think>"]),
    }


@pytest.fixture
def settings(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    row = {"language": "ko", "messages": [{"role": "user", "content": "수도는?"}]}
    prompts.write_text(json.dumps(row), encoding="utf-8")
    return {"suites": ["form"], "prompts": str(prompts), "max_thought_tokens": 32}


def test_figures_verdicts_and_samples(thinkers, settings, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("병신", encoding="utf-8")
    safety = {"prompts": settings["prompts"], "lists": {"ko": str(words)}}
    config = EvaluationConfig(**(settings | {"suites": ["form", "safety"], "safety": safety}))
    tracker = start_tracker(
        TrackingConfig(mode="disabled"), "evaluation", "t", "g", tmp_path / "log", {}, "id"
    )
    found = run(config, thinkers, {}, None, tmp_path / "out", tracker)
    tracker.finish()
    assert found["chat/ko/chat"] == found["hybrid/ko/chat"] == found["base/ko/chat"] == 1
    assert (found["chat/ko/thinks"], found["chat/ko/endless_thought"]) == (1, 0)
    assert found["chat/ko/thought_tokens"] == 3
    assert found["chat/ko/lexicon_rate"] == 0  # the word is in the thought
    assert (found["hybrid/ko/thinks"], found["endless/ko/thinks"]) == (0, 1)
    assert (found["endless/ko/chat"], found["endless/ko/endless_thought"]) == (0, 1)
    assert "base/ko/thinks" not in found
    assert "hybrid/ko/thought_tokens" not in found  # no reply thinks

    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    by_model = {row["model"]: row for row in rows}
    assert by_model["chat"]["reply"] == "서울입니다."
    assert by_model["chat"]["replies"][0]["thought"] == "Well, 병신"
    assert "no answer, since the reply ended within a thought" in by_model["endless"]["why"][0]
    table = read_log(tmp_path / "log").tables["eval/samples"]
    cells = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    chat = next(one for one in cells if one["model"] == "chat")
    assert (chat["thought"], chat["reply"]) == ("Well, 병신", "서울입니다.")
    shown = " ".join(capsys.readouterr().err.split())
    assert "endless: 2 of 2 replies ended within a thought" in shown
    assert "(thought: Well, 병신) 서울입니다." in shown


def test_a_judge_sees_no_thought():
    reply = Reply("서울.", True, 9, thought="비밀", thought_tokens=3)
    exchange = Exchange(prompt("ko", [{"role": "user", "content": "?"}]), (reply,))
    assert transcript(exchange, 1) == "[user]\n?\n\n[assistant]\n서울."


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"chatt": {"enable_thinking": False}}, "names chatt, which is none of the models"),
        ({"chat": {"enable_thinkin": False}}, "no such variable; the nearest is enable_thinking"),
        ({"all": {"enable_thinkin": False}}, "no model's chat template has this variable"),
        ({"base": {"enable_thinking": False}}, "the chat template has no such variable"),
    ],
)
def test_variables_that_have_no_effect_are_refused(
    thinkers, settings, tmp_path, variables, message
):
    config = EvaluationConfig(**settings, chat_template_kwargs=variables)
    with pytest.raises(UserError, match=message):
        run(config, thinkers, {}, None, tmp_path / "out", Tracker())


def test_variables_of_the_evaluation_itself_are_refused():
    with pytest.raises(ValueError, match="tokenize is set by the evaluation"):
        EvaluationConfig(chat_template_kwargs={"all": {"tokenize": True}})


def test_variables_reach_the_template(tmp_path, settings):
    said = ["서울", "입니다.", "</s>"]
    model = write_thinker(tmp_path / "m", said, after=["</think>"])  # without it: nothing sensible
    thinks, quiet = (
        run(EvaluationConfig(**settings, chat_template_kwargs=given), {"m": model}, {}, None,
            tmp_path / "out", Tracker())
        for given in ({}, {"all": {"enable_thinking": False}})
    )  # fmt: skip
    assert (thinks["m/ko/chat"], quiet["m/ko/chat"]) == (0, 1)
