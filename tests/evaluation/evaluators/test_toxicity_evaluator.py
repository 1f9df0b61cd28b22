"""Toxicity of raw continuations: a real model, a real server; and how values become metrics."""

import json
from pathlib import Path

import pytest
import yaml

from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.config import EvaluationConfig, ToxicityConfig
from cpt_merge.evaluation.conversation import Exchange, Reply
from cpt_merge.evaluation.evaluators.evaluator import Metric
from cpt_merge.evaluation.evaluators.toxicity import (
    NO_PROMPTS,
    NO_SCORER,
    ToxicityEvaluator,
    _measurements,
)
from cpt_merge.evaluation.prompt_files import parse_beginning, read_conversations
from cpt_merge.evaluation.run import run
from cpt_merge.evaluation.scorers.scorer import Score, Scorer
from cpt_merge.evaluation.statistics import estimate
from cpt_merge.tracking import Tracker
from tests.evaluation.http_server import completion
from tests.evaluation.scorers.test_attributes import perspective

ROOT = Path(__file__).parents[3]
REAL = {"filename": "a.txt", "challenging": True, "prompt": {"text": "So I said", "toxicity": 0.1},
        "continuation": {"text": " hello"}}  # fmt: skip


class Fixed(Scorer):
    metric = Metric("fixed", "fixed", "mean fixed value", rising=False)

    def score(self, exchanges, ranks):
        return []


def test_the_expected_maximum_and_the_probability():
    prompts = [parse_beginning("en")({"prompt": text, "category": text}, "") for text in "abc"]
    asked = [Exchange(one, (Reply("x", True, 1),) * 2) for one in prompts]
    scores = [
        [Score(0.2, attributes={"INSULT": 0.9}), Score(0.6, attributes={"INSULT": 0.1})],
        [Score(0.1), Score(None, "the reply is empty")],
        [Score(None, "the reply is empty")] * 2,
    ]
    found = {
        (one.metric.name, one.group): estimate(one.parts)
        for one in _measurements(Fixed(), 2, asked, scores)
    }
    assert found["fixed_expected_max", ""].value == pytest.approx(0.35)
    assert found["fixed_expected_max", ""].n == 2, "a prompt without a value is left out"
    assert found["fixed_probability", ""].value == 0.5
    assert found["fixed_continuations", ""].value == pytest.approx((0.4 + 0.1) / 2)
    assert found["fixed_expected_max", "a"].value == 0.6
    assert found["fixed_expected_max", "INSULT"].value == 0.9
    assert not any(group == "c" for _, group in found)


def test_lines_of_real_toxicity_prompts_and_our_own(tmp_path):
    file = tmp_path / "p.jsonl"
    rows = [REAL, {**REAL, "challenging": False}, {"prompt": "He ", "category": "x"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = read_conversations(str(file), "key", parse_beginning("ko"), [], 9)
    assert [one.questions for one in found] == ["So I said", "So I said", "He "]
    assert [one.category for one in found] == ["challenging", None, "x"]
    for bad in (
        {"text": "He"},
        {"prompt": {"txt": "He"}},
        {"prompt": " "},
        [],
        {"prompt": "a", "category": 1},
        {"prompt": "a", "categry": "x"},
    ):
        file.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=r"p\.jsonl, line 1: "):
            read_conversations(str(file), "key", parse_beginning("ko"), [], 9)


def test_equal_samples_are_refused():
    with pytest.raises(ValueError, match="makes all samples equal"):
        ToxicityConfig(temperature=0)


def test_what_is_missing_is_named():
    config = EvaluationConfig(suites=["toxicity"])
    findings = ToxicityEvaluator([], [], config).measure(None, [])
    assert [one.reason for one in findings.not_run] == [NO_PROMPTS]


def the_papers_settings() -> dict:
    """The first YAML block of the section in docs/evaluation.md."""
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    section = text.partition("\n## The Chat Vector paper's protocol\n")[2]
    return yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])["evaluation"]


def test_the_papers_protocol_on_a_model(models_of_two_vocabularies, serve, tmp_path):
    """What docs/evaluation.md shows runs as it is, with other addresses and smaller numbers."""
    seen = []

    def behave(number, body):
        if "comment" in body:
            toxicity = 0.5 if len(body["comment"]["text"]) % 2 else 0.25
            return 200, perspective(body, toxicity)
        asked = body["messages"][0]["content"]
        seen.append(asked)
        return 200, completion("VERDICT: unsafe (insult)" if "unsafe" in asked else "SCORE: 7/10")

    url = serve(behave).url
    settings = the_papers_settings()
    questions, beginnings = tmp_path / "q.jsonl", tmp_path / "b.jsonl"
    questions.write_text('{"question_id": 1, "text": "為什麼？", "category": "generic"}')
    beginnings.write_text(
        "\n".join(json.dumps({**REAL, "prompt": {"text": text}}) for text in ("他說", "我"))
    )
    settings["judge"] |= {
        "url": url,
        "questions": f"vicuna:zh_tw:{questions}",
        "cache": str(tmp_path / "cache"),
    }
    settings["safety"]["attributes"] |= {"url": url, "attributes": ["TOXICITY", "INSULT"]}
    settings["safety"] |= {"prompts": "built-in"}
    settings["toxicity"] |= {
        "prompts": {"zh_tw": str(beginnings)},
        "samples": 3,
        "max_characters": 4,
    }
    config = EvaluationConfig(
        **settings, languages=["zh_tw"], max_prompts=2, max_characters=8, batch_size=4
    )
    run(config, models_of_two_vocabularies, {}, None, tmp_path / "out", Tracker())
    results = json.loads((tmp_path / "out/results.json").read_text())
    found = results["models"]["chat"]["scores"]["zh_tw"]
    assert (found["judge_mark"]["value"], found["judge_mark_system"]["value"]) == (7, 7)
    assert found["judge_unsafe"]["value"] == 1
    assert {"in_language", "continuations_in_language", "continuations_empty"} <= found.keys()
    assert 0.25 <= found["attribute_expected_max"]["value"] <= 0.5
    assert found["attribute_expected_max"]["n"] == 2
    assert found["attribute_probability"]["value"] in (0, 0.5, 1)
    assert "INSULT" in results["models"]["chat"]["breakdowns"]["zh_tw"]["attribute_expected_max"]
    assert results["models"]["chat"]["differences"]["zh_tw"]["attribute_expected_max"]["n"] == 2
    text = settings["judge"]["system_prompt"]["zh_tw"]
    assert [f"[system]\n{text}" in one for one in seen if "SCORE" in one].count(True) == 2
    assert all("gets at most 3" in one for one in seen if "SCORE" in one), "one rule for both"
    again = run(config, models_of_two_vocabularies, {}, None, tmp_path / "again", Tracker())
    assert again["chat/zh_tw/attribute_expected_max"] == round(
        found["attribute_expected_max"]["value"], 4
    )


def test_without_a_scorer_the_shares_are_still_reported(models_of_two_vocabularies, tmp_path):
    beginnings = tmp_path / "b.jsonl"
    beginnings.write_text(json.dumps(REAL))
    config = EvaluationConfig(
        suites=["toxicity"],
        toxicity={"prompts": {"en": str(beginnings)}, "samples": 2, "max_characters": 4},
    )
    model = {"base": models_of_two_vocabularies["base"]}
    found = run(config, model, {}, None, tmp_path / "out", Tracker())
    assert found.keys() == {"base/en/continuations_empty", "base/en/continuations_in_language"}, (
        "a base model needs no chat template"
    )
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["models"]["base"]["not_run"] == {"toxicity": NO_SCORER}
