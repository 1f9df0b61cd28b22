"""Attributes of texts, against a real server that speaks the Perspective API's protocol."""

import json

import pytest

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.config import AttributesConfig
from cpt_merge.evaluation.conversation import Exchange, Reply, prompt
from cpt_merge.evaluation.scorers.attributes import AttributesScorer
from tests.distributed import free_port

ALONE = Ranks()


def perspective(body, value=None):
    """How a text ends decides: `vile 0.7` is toxic with 0.7, and an insult with half of it."""
    toxicity = float(body["comment"]["text"].split()[-1]) if value is None else value
    values = {"TOXICITY": toxicity, "INSULT": toxicity / 2 if value is None else value}
    return json.dumps({
        "attributeScores": {
            name: {"summaryScore": {"value": values[name], "type": "PROBABILITY"}}
            for name in body["requestedAttributes"]
        }
    })  # fmt: skip


def score(url, texts, language="zh_tw", **settings):
    config = AttributesConfig(
        url=url, attributes=["TOXICITY", "INSULT"], attempts=2, key_variable="A_KEY", **settings
    )
    asked = prompt(language, [{"role": "user", "content": "?"}])
    exchanges = [Exchange(asked, (Reply(text, True, 3),)) for text in texts]
    return AttributesScorer(config).score(exchanges, ALONE)


def test_the_first_attribute_is_the_value(serve):
    server = serve(lambda number, body: (200, perspective(body)))
    found = score(server.url, ["vile 0.75", "", "kind 0"])
    assert [one.value for one in found] == [0.75, None, 0.0]
    assert found[0].attributes == {"INSULT": 0.375}
    path, body = server.asked[0]
    assert path == "/v1/comments:analyze"
    assert (body["languages"], body["doNotStore"]) == (["zh"], True)
    assert len(server.asked) == 2, "an empty reply is not sent"


def test_the_key_is_in_a_header_and_in_no_url(serve, monkeypatch):
    monkeypatch.setenv("A_KEY", "a-secret-key")
    server = serve(lambda number, body: (200, perspective(body)))
    score(server.url, ["kind 0"])
    assert server.asked[0][0] == "/v1/comments:analyze"
    assert server.headers[0]["X-Goog-Api-Key"] == "a-secret-key"
    assert server.keys == [None]


@pytest.mark.parametrize("answer", ["[]", "{}", '{"attributeScores": {"TOXICITY": {}}}', "<html>"])
def test_an_answer_without_the_attributes_is_no_score(serve, answer):
    (found,) = score(serve(lambda number, body: (200, answer)).url, ["kind 0"])
    assert found.value is None
    assert "lacks the attributes" in found.reason or "not JSON" in found.reason


@pytest.mark.parametrize("value", [1.5, -0.1, "0.5"])
def test_a_value_that_is_no_probability_is_no_score(serve, value):
    server = serve(lambda number, body: (200, perspective(body, value)))
    (found,) = score(server.url, ["kind 0"])
    assert (found.value, found.dead) == (None, False)


def test_a_dead_endpoint_gets_no_more_requests():
    found = score(f"http://127.0.0.1:{free_port()}", ["kind 0"] * 40, at_once=2)
    assert {one.value for one in found} == {None}
    assert all(one.dead for one in found)
