"""Instruction following: the four shares, and how a sample describes a failure."""

import pytest

from cpt_merge.evaluation.checks import parse_check
from cpt_merge.evaluation.conversation import ANY_LANGUAGE, Exchange, Reply, prompt
from cpt_merge.evaluation.evaluators.instructions import CHECKS_STRICT, InstructionsEvaluator
from cpt_merge.evaluation.prompt_files import parse_instruction, read_conversations
from cpt_merge.evaluation.statistics import estimate


def exchange(language, reply, *rows):
    checks = [parse_check(row, "test") for row in rows]
    return Exchange(
        prompt(language, [{"role": "user", "content": "?"}], checks), (Reply(reply, True, 5),)
    )


EXCHANGES = [
    exchange("ko", "네. 좋아요.", {"name": "sentences", "exactly": 2}, {"name": "no_commas"}),
    exchange("ko", "물론이죠:\n사과", {"name": "no_commas"}, {"name": "one_of", "words": ["사과"]}),
    exchange("ko", "", {"name": "no_commas"}),
    exchange("zh_tw", "好，好。", {"name": "no_commas"}),
]


def values(findings, language):
    return {
        (one.metric.name, one.group): estimate(one.parts).value
        for one in findings.measurements
        if one.language == language
    }


def test_shares_of_prompts_and_of_checks_strict_and_loose():
    found = values(InstructionsEvaluator([]).measure(None, EXCHANGES), "ko")
    assert found["instructions", ""] == pytest.approx(1 / 3)
    assert found["instruction_checks", ""] == pytest.approx(3 / 5)
    assert found["instructions_loose", ""] == pytest.approx(
        2 / 3
    )  # without its first line the second is right
    assert found["instruction_checks_loose", ""] == pytest.approx(4 / 5)
    assert found["instruction_checks", "no_commas"] == pytest.approx(2 / 3)


def test_each_language_has_its_own_metric_and_samples_name_what_failed():
    findings = InstructionsEvaluator([]).measure(None, EXCHANGES)
    assert values(findings, "zh_tw")["instructions", ""] == 0
    assert [verdict.why for verdict in findings.scores] == [
        [], ["one_of (words ['사과'])"], ["no_commas: the reply is empty"], ["no_commas"],
    ]  # fmt: skip
    assert findings.scores[1].scores[CHECKS_STRICT.name] == 0.5


def test_checks_decide_the_language_of_a_reply():
    asked = [
        exchange("zh_tw", "", {"name": "language", "language": "en"}), exchange("ko", "", {"name": "json_only"}),
        exchange("ko", "", {"name": "no_commas"}),
    ]  # fmt: skip
    assert [one.conversation.reply_language(0) for one in asked] == ["en", ANY_LANGUAGE, "ko"]


@pytest.mark.parametrize("language", ["zh_tw", "zh_cn", "ko", "en"])
def test_the_built_in_prompts(language):
    found = read_conversations("built-in", "key", parse_instruction, [language], 99, "instructions")
    texts = [one.questions for one in found]
    assert len(set(texts)) == len(found) >= 50
    assert len({check.name for one in found for check in one.turns[0].checks}) >= 20
    speaking = [one for one in found if one.reply_language(0) == language]
    for one in speaking:  # who answers in English follows no instruction of a Korean prompt
        assert {"language", "script"} & {check.name for check in one.turns[0].checks}
