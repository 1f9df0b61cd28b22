"""Safety: a metric per scorer, by category; what could not be scored is reported and never zero."""

import pytest

from cpt_merge.evaluation.conversation import Conversation, Exchange, Reply, Turn
from cpt_merge.evaluation.evaluators.evaluator import Metric
from cpt_merge.evaluation.evaluators.safety import SafetyEvaluator
from cpt_merge.evaluation.prompt_files import parse_prompt, read_conversations
from cpt_merge.evaluation.scorers.lexicon import LexiconScorer
from cpt_merge.evaluation.scorers.scorer import Score, Scorer
from cpt_merge.evaluation.statistics import estimate


class Fixed(Scorer):
    metric = Metric("fixed", "fixed", "a scorer of the test", rising=False)

    def __init__(self, *scores):
        self.scores = scores

    def score(self, exchanges, ranks):
        return list(self.scores)


class Subject:
    ranks = None


def exchange(text, category=None, language="en"):
    turn = Turn([{"role": "user", "content": "?"}])
    return Exchange(Conversation(language, (turn,), category), (Reply(text, True, 3),))


EXCHANGES = [
    exchange("You idiot.", "insult"),
    exchange("No.", "insult"),
    exchange("", "plain"),
    exchange("Hi", "plain"),
]


def test_a_metric_per_scorer_and_by_category():
    scorers = [
        LexiconScorer({"en": ["idiot"]}),
        Fixed(*(Score(value) for value in (1.0, 0.5, 0.25, 0.25))),
    ]
    findings = SafetyEvaluator([], scorers).measure(Subject(), EXCHANGES)
    found = {(one.metric.name, one.group): estimate(one.parts) for one in findings.measurements}
    assert (found["lexicon_rate", ""].value, found["lexicon_rate", ""].n) == (
        pytest.approx(1 / 3),
        3,
    )
    assert found["lexicon_rate", "insult"].value == 0.5
    assert found["fixed", ""].value == 0.5
    assert findings.scores[0].scores == {"lexicon_rate": 1.0, "fixed": 1.0}
    assert findings.scores[0].why == ["lexicon_rate: holds 'idiot'"]
    assert findings.scores[2].scores["lexicon_rate"] is None, "an empty reply is not a harmless one"
    assert findings.details == {"not_scored": {"lexicon_rate": {"the reply is empty": 1}}}


def test_a_scorer_that_scored_nothing_was_not_run():
    dead = Score(None, "the endpoint is dead")
    findings = SafetyEvaluator([], [Fixed(dead, dead, dead, dead)]).measure(Subject(), EXCHANGES)
    assert findings.measurements == []
    assert [(one.metric, one.reason) for one in findings.not_run] == [
        ("fixed", "the endpoint is dead")
    ]
    silent = SafetyEvaluator([], [LexiconScorer({"en": ["idiot"]})]).measure(
        Subject(), [exchange("")]
    )
    assert [one.reason for one in silent.not_run] == ["all replies are empty"]


@pytest.mark.parametrize("language", ["zh_tw", "zh_cn", "ko", "en"])
def test_the_built_in_prompts_have_categories(language):
    found = read_conversations("built-in", "key", parse_prompt, [language], 99, "safety")
    assert len(found) >= 50
    assert len([one for one in found if one.safe]) >= 25
    assert len([one for one in found if one.safe is False]) >= 25
    assert {one.safe for one in found[:2]} == {True, False}, "any limit keeps some of both"
    unsafe = {"insult", "threat", "prejudice", "harm", "fraud", "privacy"}
    assert {one.category for one in found if not one.safe} == unsafe
