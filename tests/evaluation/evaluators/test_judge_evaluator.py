"""Marks and comparisons by judges that really answer over HTTP."""

import pytest

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.config import JudgeEndpointConfig, PriceConfig
from cpt_merge.evaluation.conversation import Conversation, Exchange, Reply, Turn
from cpt_merge.evaluation.evaluators.judge import JudgeEvaluator, JudgePanel
from cpt_merge.evaluation.judge.client import Judge
from cpt_merge.evaluation.judge.prompts import COMPARISON, MARK
from cpt_merge.evaluation.judge.verdicts import NO_VERDICT
from cpt_merge.evaluation.statistics import estimate
from tests.distributed import free_port
from tests.evaluation.http_server import completion, judging

ALONE = Ranks()
PROMPTS = {"mark": MARK, "comparison": COMPARISON}


class Subject:
    ranks = ALONE


@pytest.fixture
def judge(serve, tmp_path):
    """A judge that says `answer(prompt)`."""

    def make(answer, name="m", url=None, price=None):
        config = JudgeEndpointConfig(
            url=url or serve(judging(answer)).url, model=name, attempts=1, price=price
        )
        return Judge(config, tmp_path / "cache", at_once=2)

    return make


def exchange(*replies, category=None, references=()):
    turns = tuple(
        Turn([{"role": "user", "content": f"question {number}"}]) for number in range(len(replies))
    )
    conversation = Conversation("ko", turns, category, references)
    return Exchange(conversation, tuple(Reply(text, True, 1) for text in replies))


def metrics(findings):
    return {(one.metric.name, one.group): estimate(one.parts) for one in findings.measurements}


def last_reply(prompt):
    return prompt.split("</conversation>")[0].rsplit("[assistant]\n", 1)[1].strip()


def mark_of_length(prompt):
    return f"Let me see.\nSCORE: {len(last_reply(prompt))}"


def test_each_reply_is_marked_with_what_came_before_it(judge):
    evaluator = JudgeEvaluator([], JudgePanel([judge(mark_of_length)], ["mark"], PROMPTS))
    findings = evaluator.measure(
        Subject, [exchange("four", "sixsix", category="x"), exchange("ninenine9", category="y")]
    )
    found = metrics(findings)
    assert found["judge_mark", ""].value == pytest.approx((4 + 6 + 9) / 3)
    assert found["judge_mark", ""].n == 2, "conversations"
    assert found["judge_mark", "x"].value == 5
    assert found["judge_mark", "turn 1"].value == 6.5
    assert found["judge_mark", "turn 2"].value == 6
    assert findings.scores[0].scores == {"judge_mark": 5}
    assert findings.scores[0].why[1] == "judge_mark, turn 2: 6: Let me see. SCORE: 6"


def test_the_judge_is_told_the_language_and_the_reference(judge):
    seen = []
    evaluator = JudgeEvaluator(
        [], JudgePanel([judge(lambda prompt: seen.append(prompt) or "SCORE: 5")], ["mark"], PROMPTS)
    )
    evaluator.measure(Subject, [exchange("eins", "zwei", references=(None, "so etwa"))])
    assert all("expects Korean" in prompt for prompt in seen)
    assert sorted("so etwa" in prompt for prompt in seen) == [False, True]


def test_an_answer_without_a_mark_is_recorded_and_counted(judge):
    evaluator = JudgeEvaluator(
        [],
        JudgePanel(
            [judge(lambda p: "SCORE: 8" if "good" in p else "who knows")], ["mark"], PROMPTS
        ),
    )
    findings = evaluator.measure(Subject, [exchange("good"), exchange("odd")])
    assert metrics(findings)["judge_mark", ""].value == 8
    assert metrics(findings)["judge_mark", ""].n == 1
    assert findings.details["not_scored"] == {"judge_mark": {NO_VERDICT: 1}}
    assert findings.scores[1].scores == {"judge_mark": None}
    assert findings.scores[1].why == [f"judge_mark: none: {NO_VERDICT}: who knows"]


def test_an_empty_reply_has_the_lowest_mark_and_costs_nothing(judge):
    evaluator = JudgeEvaluator(
        [], JudgePanel([judge(lambda prompt: "SCORE: 9")], ["mark"], PROMPTS)
    )
    findings = evaluator.measure(Subject, [exchange(" "), exchange("x")])
    assert metrics(findings)["judge_mark", ""].value == 5
    assert findings.details["judge"]["judge_mark"]["requests"] == 1


def test_a_dead_endpoint_is_reported_as_not_run_and_never_as_zero(judge):
    dead = judge(None, url=f"http://127.0.0.1:{free_port()}/v1")
    evaluator = JudgeEvaluator([], JudgePanel([dead], ["mark", "comparison"], PROMPTS))
    for findings, metric in (
        (evaluator.measure(Subject, [exchange("a"), exchange("b")]), "judge_mark"),
        (evaluator.compare(ALONE, [exchange("a")], [exchange("b")]), "judge_preferred"),
    ):
        assert findings.measurements == []
        assert [one.metric for one in findings.not_run] == [metric]
        assert "onnection refused" in findings.not_run[0].reason


@pytest.mark.parametrize("nonsense", [True, False])
def test_empty_replies_alone_are_no_metric_if_the_judge_gives_no_verdict(judge, nonsense):
    url = None if nonsense else f"http://127.0.0.1:{free_port()}/v1"
    evaluator = JudgeEvaluator(
        [], JudgePanel([judge(lambda prompt: "hm", url=url)], ["mark", "comparison"], PROMPTS)
    )
    marks = evaluator.measure(Subject, [exchange("a"), exchange("")])
    choices = evaluator.compare(
        ALONE, [exchange("a"), exchange("")], [exchange("b"), exchange("c")]
    )
    for findings, metric in ((marks, "judge_mark"), (choices, "judge_preferred")):
        assert findings.measurements == []
        assert [one.metric for one in findings.not_run] == [metric]
        assert findings.not_run[0].reason != "the reply is empty"
        assert [one.scores[metric] for one in findings.scores] == [None, None]
        assert bool(findings.failed) == (not nonsense), "nonsense would be said again"


def test_empty_replies_get_no_mark_if_the_judge_fails(judge, serve):
    ending = serve(
        lambda number, body: (200, completion("SCORE: 9")) if number == 1 else (503, "no more")
    )
    evaluator = JudgeEvaluator([], JudgePanel([judge(None, url=ending.url)], ["mark"], PROMPTS))
    findings = evaluator.measure(Subject, [exchange(text) for text in ("a", "b", "c", "", "")])
    assert metrics(findings)["judge_mark", ""].value == 9
    assert metrics(findings)["judge_mark", ""].n == 1
    assert findings.failed


def test_without_a_judge_the_metric_is_not_run():
    findings = JudgeEvaluator([], None, "there is no judge").measure(Subject, [])
    assert [(one.metric, one.reason) for one in findings.not_run] == [
        ("judge_mark", "there is no judge")
    ]
    assert findings.measurements == []


def prefers(word):
    """A judge that prefers whoever says the word; the first of two who do."""

    def answer(prompt):
        first, second = prompt.split("<assistant_B>")
        return f"VERDICT: {'A' if word in first else 'B' if word in second else 'tie'}"

    return answer


def compare(judges, ours, theirs):
    evaluator = JudgeEvaluator([], JudgePanel(judges, ["comparison"], PROMPTS))
    assert evaluator.measure(Subject, ours).measurements == []
    return evaluator.compare(ALONE, ours, theirs)


def test_a_preference_counts_if_it_holds_in_both_orders(judge):
    ours = [exchange("fine"), exchange("fine"), exchange("poor"), exchange("poor")]
    theirs = [exchange("poor"), exchange("fine too"), exchange("fine"), exchange("poor too")]
    findings = compare([judge(prefers("fine"))], ours, theirs)
    assert [one.scores["judge_preferred"] for one in findings.scores] == [1, 0.5, 0, 0.5]
    assert metrics(findings)["judge_preferred", ""].value == 0.5
    took = findings.details["judge"]["judge_preferred"]
    assert (took["requests"], took["changed_with_places"]) == (6, 1), (
        "equal requests are one; the second is won by who is A"
    )


def test_an_empty_reply_loses_without_a_request(judge):
    ours, theirs = (
        [exchange(""), exchange("x"), exchange("")],
        [exchange("x"), exchange(""), exchange(" ")],
    )
    findings = compare([judge(prefers("x"))], ours, theirs)
    assert [one.scores["judge_preferred"] for one in findings.scores] == [0, 1, 0.5]
    assert findings.details["judge"]["judge_preferred"]["requests"] == 0


def test_no_verdict_in_one_order_is_no_verdict(judge):
    half = judge(lambda prompt: "VERDICT: A" if "ours" in prompt.split("<assistant_B>")[0] else "?")
    findings = compare([half], [exchange("ours")], [exchange("theirs")])
    assert findings.measurements == []
    assert findings.not_run[0].reason == NO_VERDICT


def test_the_agreement_of_two_judges_is_reported(judge):
    ours = judge(mark_of_length, "one", price=PriceConfig(prompt=1, completion=1))
    theirs = judge(lambda prompt: "SCORE: 3", "two")
    findings = JudgeEvaluator([], JudgePanel([ours, theirs], ["mark"], PROMPTS)).measure(
        Subject, [exchange("two"), exchange("four"), exchange("sixsix")]
    )
    found = metrics(findings)
    assert found["judge_mark", ""].value == pytest.approx(13 / 3)
    assert found["judge_mark_second", ""].value == 3
    assert found["judge_mark_agreement", ""].value == pytest.approx(2 / 3)
    details = findings.details["judge"]
    assert details["judge_mark_agreement"] == {"rank_correlation": None}, (
        "one of them gave one mark only"
    )
    assert details["judge_mark"]["cost"] == pytest.approx(3 * 110 / 1e6)
    assert "cost" not in details["judge_mark_second"]

    ours, theirs = [exchange("red"), exchange("red blue")], [exchange("blue"), exchange("grey")]
    comparisons = compare([judge(prefers("red")), judge(prefers("blue"))], ours, theirs)
    assert metrics(comparisons)["judge_preferred_agreement", ""].value == 0.5
    assert "kappa" in comparisons.details["judge"]["judge_preferred_agreement"]
