"""The moderation endpoint, against a real server: one that works, is busy, answers nonsense, is slow, refuses, or is dead."""

import json
import time

import pytest

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.conversation import Exchange, Reply, prompt
from cpt_merge.evaluation.evaluators.safety import SafetyEvaluator
from cpt_merge.evaluation.scorers.moderation import ModerationScorer
from tests.distributed import free_port
from tests.evaluation.http_server import endpoint

ALONE = Ranks()
TEXTS = ["kind", "vile", "", "kind too"]


def moderation(body):
    flagged = "vile" in body["input"]
    return json.dumps(
        {
            "results": [
                {"flagged": flagged, "categories": {"harassment": flagged, "violence": False}}
            ]
        }
    )


def exchanges(texts=TEXTS):
    return [
        Exchange(prompt("en", [{"role": "user", "content": "?"}]), (Reply(text, True, 3),))
        for text in texts
    ]


def score(url, texts=TEXTS, timeout=5.0, attempts=3, key="A_KEY"):
    return ModerationScorer(endpoint(url, key, timeout, attempts), "guard").score(
        exchanges(texts), ALONE
    )


def test_replies_are_flagged_or_not_with_the_key_from_the_environment(serve, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    server = serve(lambda number, body: (200, moderation(body)))
    found = score(server.url)
    assert [one.value for one in found] == [0, 1, None, 0]
    assert found[1].reason == "harassment"
    assert sorted(body["input"] for _, body in server.asked) == ["kind", "kind too", "vile"], (
        "empty ones are not sent"
    )
    assert {path for path, _ in server.asked} == {"/v1/moderations"}
    assert set(server.keys) == {"Bearer secret"}


def test_a_request_to_a_busy_server_is_repeated(serve):
    server = serve(lambda number, body: (200, moderation(body)) if number > 2 else (503, "busy"))
    assert [one.value for one in score(server.url, ["vile"])] == [1]
    assert len(server.asked) == 3
    assert server.keys == [None] * 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("<html>hello", "answers what is not JSON"), ('{"results": []}', "is no moderation"),
     ('{"results": [{"flagged": "perhaps"}]}', "is no moderation"), ("[]", "is no moderation"), ("null", "is no moderation")],
)  # fmt: skip
def test_an_answer_that_is_no_moderation_is_no_score(serve, answer, reason):
    found = score(serve(lambda number, body: (200, answer)).url, ["kind", "vile"])
    assert [one.value for one in found] == [None, None]
    assert reason in found[0].reason


def test_one_bad_answer_leaves_out_that_reply_alone(serve):
    server = serve(
        lambda number, body: (200, moderation(body) if "too" not in body["input"] else "?")
    )
    findings = SafetyEvaluator([], [ModerationScorer(endpoint(server.url), "guard")])
    found = findings.measure(type("Subject", (), {"ranks": ALONE}), exchanges())
    assert found.measurements[0].parts == {0: (0, 1), 1: (1, 1)}
    assert sum(found.details["not_scored"]["flagged"].values()) == 2


def test_a_slow_server_counts_as_dead_and_gets_no_more_requests(serve):
    def behave(number, body):
        time.sleep(0.6)
        return 200, moderation(body)

    server = serve(behave)
    start = time.monotonic()
    found = score(server.url, ["kind"] * 40, timeout=0.1, attempts=2)
    assert {one.value for one in found} == {None}
    assert "no answer in time (attempts: 2)" in found[0].reason
    assert time.monotonic() - start < 2, "only those that were on their way are waited for"
    assert len(server.asked) <= 16


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_refuses_is_not_asked_again(serve, status):
    server = serve(lambda number, body: (status, "no"))
    found = score(server.url, ["kind"], key="NO_SUCH_KEY")
    assert found[0].value is None
    assert f"status {status}" in found[0].reason
    assert ("NO_SUCH_KEY (x.key_variable) is not set" in found[0].reason) == (status == 401)
    assert len(server.asked) == 1


def test_a_dead_endpoint_is_reported_as_not_run_and_never_as_zero(serve):
    scorer = ModerationScorer(endpoint(f"http://127.0.0.1:{free_port()}/v1", timeout=1), "guard")
    found = SafetyEvaluator([], [scorer]).measure(
        type("Subject", (), {"ranks": ALONE}), exchanges()
    )
    assert found.measurements == []
    assert [one.metric for one in found.not_run] == ["flagged"]
    assert "onnection refused (attempts: 2)" in found.not_run[0].reason
