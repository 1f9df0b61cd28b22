"""The judge's endpoint, against a real server: answers, cache, usage, and all that can go wrong."""

import json
import logging
import socket
import threading
import time
from contextlib import suppress

import pytest

from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.config import JudgeEndpointConfig, PriceConfig
from cpt_merge.evaluation.generate.endpoint import EndpointError, _pause
from cpt_merge.evaluation.judge.client import NO_COMPLETION, Judge, Usage
from tests.distributed import free_port
from tests.evaluation.http_server import completion, endpoint, judging

ALONE = Ranks()
PRICE = PriceConfig(prompt=2.0, completion=10.0)


@pytest.fixture
def make(tmp_path):
    def make(url, **settings):
        config = JudgeEndpointConfig(
            url=url, model="m", attempts=3, timeout=5, key_variable="A_KEY", **settings
        )
        return Judge(config, tmp_path / "cache", at_once=2)

    return make


def texts(answers):
    return [answer.text for answer in answers]


def test_answers_in_order_and_what_is_sent(serve, make, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    server = serve(judging(lambda prompt: prompt.upper()))
    judge = make(server.url, request={"temperature": 0, "max_completion_tokens": 9})
    assert texts(judge.ask(["a", "b", "c", "a"], ALONE)) == ["A", "B", "C", "A"]
    assert len(server.asked) == 3, "equal prompts are asked once"
    assert server.asked[0] == (
        "/v1/chat/completions",
        {
            "model": "m",
            "messages": server.asked[0][1]["messages"],
            "temperature": 0,
            "max_completion_tokens": 9,
        },
    )
    assert set(server.keys) == {"Bearer secret"}


def test_answers_to_earlier_requests_are_read_from_the_cache(serve, make, tmp_path):
    server = serve(judging(lambda prompt: "fine"))
    first, again = (make(server.url).ask(["a", "b"], ALONE) for _ in "12")
    assert texts(first) == texts(again)
    assert [one.usage for one in again] == [Usage(cached=1)] * 2
    assert len(server.asked) == 2
    make(server.url, request={"temperature": 1}).ask(["a"], ALONE)
    assert len(server.asked) == 3, "another request is another question"
    for file in (tmp_path / "cache").iterdir():
        file.write_text('{"request', encoding="utf-8")
    assert texts(make(server.url).ask(["a"], ALONE)) == ["fine"], (
        "one that cannot be read is asked again"
    )
    assert len(server.asked) == 4


def test_a_key_among_the_fields_of_a_request_is_sent_and_not_cached(serve, make, tmp_path):
    server = serve(judging(lambda prompt: "fine"))
    judge = make(server.url, request={"api_key": "quite-secret", "user": "u"})
    for _ in "12":
        assert texts(judge.ask(["a"], ALONE)) == ["fine"]
    [(_, body)] = server.asked
    assert body["api_key"] == "quite-secret"
    [cached] = (tmp_path / "cache").iterdir()
    assert "quite-secret" not in cached.read_text(encoding="utf-8")
    assert '"user": "u"' in cached.read_text(encoding="utf-8")


def test_tokens_and_cost(serve, make):
    server = serve(lambda number, body: (200, completion("x", (1000, 50))))
    answers = make(server.url).ask(["a", "b", "a"], ALONE)
    usage = answers[0].usage + answers[1].usage + answers[2].usage
    assert usage == Usage(sent=2, prompt_tokens=2000, completion_tokens=100)
    assert usage.cost(PRICE) == pytest.approx(0.005)
    assert usage.cost(None) is None
    silent = serve(lambda number, body: (200, completion("x", None)))
    (answer,) = make(silent.url).ask(["a"], ALONE)
    assert answer.usage == Usage(sent=1, uncounted=1)
    assert answer.usage.cost(PRICE) is None, "what is not known is not nothing"


def test_a_request_to_a_busy_endpoint_is_repeated(serve, make):
    server = serve(lambda number, body: (200, completion("late")) if number > 2 else (429, "busy"))
    assert texts(make(server.url).ask(["a"], ALONE)) == ["late"]
    assert len(server.asked) == 3


def test_the_pause_is_what_the_endpoint_asks_for_or_grows():
    assert [_pause(None, 0.5, attempt) for attempt in (1, 2, 3)] == [0.5, 1, 2]
    asked = {"3": 3, "1.5": 1.5, "600": 60, "nan": 60, "Wed, 21 Oct 2026 07:28:00 GMT": 0.5}
    assert {text: _pause(text, 0.5, 1) for text in asked} == asked


def test_the_text_of_an_endpoints_error_is_shown_without_secrets(serve, make, monkeypatch):
    monkeypatch.setenv("A_SECRET_KEY", "abcdefgh" * 4)
    said = "the key " + "x" * 170 + "abcdefgh" * 4 + " is wrong"
    (found,) = make(serve(lambda number, body: (400, said)).url).ask(["a"], ALONE)
    assert "status 400" in found.reason
    assert "the key xxx" in found.reason
    assert "abcdefgh" not in found.reason


def test_an_error_whose_text_breaks_off_is_treated_like_others():
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse():
        with suppress(OSError), listener.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")

    threading.Thread(target=refuse, daemon=True).start()
    with pytest.raises(EndpointError, match="status 503 Service Unavailable"):
        endpoint(
            f"http://127.0.0.1:{listener.getsockname()[1]}", "NO_KEY", timeout=2, attempts=1
        ).post("x", {})
    listener.close()


def test_half_a_surrogate_pair_in_an_answer_can_be_written(serve, make):
    broken = '{"choices": [{"message": {"content": "SCORE: 4 \\ud83d"}}]}'
    (found,) = make(serve(lambda number, body: (200, broken)).url).ask(["a"], ALONE)
    assert found.text == "SCORE: 4 ?"


def test_a_slow_stream_is_given_up_after_the_timeout():
    listener = socket.create_server(("127.0.0.1", 0))

    def drip():
        with suppress(OSError), listener.accept()[0] as connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.05)

    threading.Thread(target=drip, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(EndpointError, match="no answer in time"):
        endpoint(
            f"http://127.0.0.1:{listener.getsockname()[1]}", "NO_KEY", timeout=0.3, attempts=1
        ).post("x", {})
    assert time.monotonic() - started < 2
    listener.close()


@pytest.mark.parametrize(
    "answer", ["[" * 100_000, '{"usage": {"prompt_tokens": 1e999, "completion_tokens": 1}}']
)
def test_json_that_cannot_be_parsed_is_no_answer(serve, make, answer):
    (found,) = make(serve(lambda number, body: (200, answer)).url).ask(["a"], ALONE)
    assert found.text is None


@pytest.mark.parametrize(
    "answer", ["[]", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}', "3"]
)
def test_anything_but_a_completion_is_no_answer_and_is_not_cached(serve, make, tmp_path, answer):
    (found,) = make(serve(lambda number, body: (200, answer)).url).ask(["a"], ALONE)
    assert (found.text, found.reason, found.usage.sent) == (None, NO_COMPLETION, 1)
    assert not (tmp_path / "cache").exists()


def test_a_refused_prompt_does_not_affect_the_others(serve, make):
    def behave(number, body):
        return (
            (400, "filtered")
            if body["messages"][0]["content"] == "bad"
            else (200, completion("ok"))
        )

    found = make(serve(behave).url).ask(["good", "bad", "fine"], ALONE)
    assert texts(found) == ["ok", None, "ok"]
    assert "status 400" in found[1].reason


def test_a_dead_endpoint_gets_no_more_requests(make):
    found = make(f"http://127.0.0.1:{free_port()}/v1").ask(
        [str(number) for number in range(50)], ALONE
    )
    assert set(texts(found)) == {None}
    assert "onnection refused (attempts: 3)" in found[-1].reason


def test_an_endpoint_that_was_given_up_first_gets_a_test_request(serve, make):
    behave = [lambda number, body: (503, "busy")]
    server = serve(lambda number, body: behave[0](number, body))
    judge = make(server.url)
    assert texts(judge.ask(["a"], ALONE)) == [None]
    asked = len(server.asked)
    assert "status 503" in judge.ask(["a", "b", "c"], ALONE)[2].reason
    assert len(server.asked) == asked + 1
    behave[0] = judging(lambda prompt: "back")
    assert texts(judge.ask(["a", "b"], ALONE)) == ["back", "back"]


def test_the_judge_is_checked_before_hours_are_spent(serve, make, capsys):
    make(serve(judging(lambda prompt: "yes")).url).check()
    refusing = make(serve(lambda number, body: (404, json.dumps({"error": "no such model"}))).url)
    with pytest.raises(
        UserError, match=r"the judge refuses: .*status 404.*correct evaluation.judge"
    ):
        refusing.check()
    make(f"http://127.0.0.1:{free_port()}/v1").check()
    assert (
        "judge m does not answer now; it is asked again when the replies are there"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("", r"variable A_KEY \(evaluation\.judge\.second\.key_variable\) is not set; set it to"),
        ("old", r"the key in .* A_KEY \(evaluation\.judge\.second\.key_variable\) is refused"),
    ],
)
def test_a_judge_that_wants_another_key_names_where_to_set_it(
    serve, tmp_path, monkeypatch, key, said
):
    monkeypatch.setenv("A_KEY", key)
    url = serve(lambda number, body: (401, "unknown key")).url
    config = JudgeEndpointConfig(url=url, model="m", key_variable="A_KEY")
    judge = Judge(config, tmp_path, at_once=2, section="evaluation.judge.second")
    with pytest.raises(UserError, match=rf"status 401 Unauthorized, unknown key; .*{said}"):
        judge.check()


def test_a_password_in_the_url_that_is_refused_is_not_called_a_key(serve, make):
    url = serve(lambda number, body: (403, "")).url.replace("://", "://someone:hunter22@")
    (found,) = make(url).ask(["a"], ALONE)
    assert found.reason.endswith(
        "the user or password in evaluation.judge.url is refused; correct it"
    )


@pytest.mark.parametrize(
    "error",
    [
        {"message": "the provider is busy", "code": 429},
        {"message": "the provider fails", "code": "502"},
        {"message": "busy", "type": "server_error", "code": None},
        {"message": "busy", "type": "ServiceUnavailable"},
    ],
)
def test_an_error_of_status_200_is_what_it_would_be_with_its_own_status(serve, make, error):
    answer = json.dumps({"error": error, "choices": None})
    server = serve(lambda number, body: (200, completion("late") if number > 2 else answer))
    (found,) = make(server.url).ask(["a"], ALONE)
    assert (found.text, found.usage.sent, found.usage.uncounted) == ("late", 3, 0)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ({"message": "no such model", "code": 404}, "status 404 Not Found, .*no such model"),
        ({"message": "filtered", "code": "content_filter"}, "status 200 OK, .*filtered"),
        ("filtered", 'status 200 OK, "filtered"'),
    ],
)
def test_other_errors_of_status_200_are_refusals_and_not_repeated(serve, make, error, said):
    server = serve(lambda number, body: (200, json.dumps({"error": error})))
    with pytest.raises(UserError, match=f"the judge refuses: .*{said}"):
        make(server.url).check()
    assert len(server.asked) == 1


def test_an_address_that_cannot_be_asked_is_asked_once():
    with pytest.raises(EndpointError) as error:
        endpoint("http://" + "a" * 70 + ".example", attempts=3).post("x", {})
    assert "attempts" not in str(error.value)


def test_a_cache_folder_that_cannot_be_written_is_an_error(serve, make, tmp_path):
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be cached .*; correct evaluation.judge.cache"):
        make(serve(judging(lambda prompt: "x")).url).ask(["a"], ALONE)


def test_a_cache_that_cannot_be_written_is_reported_before_any_request(serve, tmp_path):
    (tmp_path / "file").write_text("")
    config = JudgeEndpointConfig(url=serve(judging(lambda prompt: "yes")).url, model="m")
    with pytest.raises(UserError, match=r"evaluation.judge.cache = .*file/cache cannot be written"):
        Judge(config, tmp_path / "file" / "cache", at_once=2).check()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_never_carries_the_key(serve, make, monkeypatch, status):
    monkeypatch.setenv("A_KEY", "secret-key")
    other = serve(judging(lambda prompt: "SCORE: 10"))
    place = other.url.replace("http://", "http://me:hunter22@") + "/chat/completions?key=abcdefgh"
    server = serve(lambda number, body: (status, "", {"Location": place}))
    found = make(server.url).ask(["a", "b", "c"], ALONE)
    assert other.asked == []
    assert texts(found) == [None] * 3
    assert f"status {status}, it redirects to {other.url}/chat/completions" in found[0].reason
    assert "hunter22" not in found[0].reason
    assert "abcdefgh" not in found[0].reason
    assert all(one.dead for one in found), "it is wrong for every request"
    with pytest.raises(
        UserError, match=r"judge refuses: .* set evaluation.judge.url to the endpoint's own URL\.$"
    ):
        make(server.url).check()


@pytest.mark.parametrize("answer", ["<html>hello", "", "{", "\ufffd"])
def test_an_answer_that_is_no_json_counts_as_a_request_and_its_cost_is_unknown(serve, make, answer):
    (found,) = make(serve(lambda number, body: (200, answer)).url).ask(["a"], ALONE)
    assert "answers what is not JSON" in found.reason
    assert found.usage == Usage(sent=1, uncounted=1)
    assert found.usage.cost(PRICE) is None


def test_requests_that_failed_count_and_those_that_were_refused_cost_nothing(serve, make):
    def behave(number, body):
        return (503, "busy") if number < 3 else (200, completion("late", (1000, 10)))

    (found,) = make(serve(behave).url).ask(["a"], ALONE)
    assert found.usage == Usage(sent=3, prompt_tokens=1000, completion_tokens=10)
    (found,) = make(serve(lambda number, body: (400, "no")).url).ask(["a"], ALONE)
    assert found.usage == Usage(sent=1)
    (found,) = make(f"http://127.0.0.1:{free_port()}/v1").ask(["a"], ALONE)
    assert found.usage == Usage(), "nothing has reached the endpoint"


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_has_a_largest_size(status):
    listener = socket.create_server(("127.0.0.1", 0))
    sent = []

    def flood():
        with suppress(OSError), listener.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(f"HTTP/1.1 {status} X\r\n\r\n".encode())
            for _ in range(1000):
                sent.append(connection.send(b"x" * (1 << 20)))

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    said = "more than 4 MiB" if status == 200 else "status 500 Internal Server Error, xxx"
    with pytest.raises(EndpointError, match=said) as raised:
        endpoint(url, "NO_KEY", timeout=30, attempts=1).post("x", {})
    assert raised.value.uncounted == (status == 200)
    thread.join()
    listener.close()
    assert sum(sent) < 100 << 20, "the rest is not read"


def test_what_a_url_holds_goes_to_the_endpoint_and_into_no_message(
    serve, make, caplog, monkeypatch
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("A_KEY", "the-key-of-the-judge")
    said = "no access for hunter22, query-value and the-key-of-the-judge"
    server = serve(lambda number, body: (400, said))
    url = server.url.replace("http://", "http://someone:hunter22@") + "/?key=query-value&v=1"
    (found,) = make(url).ask(["a"], ALONE)
    assert server.asked[0][0] == "/v1/chat/completions?key=query-value&v=1"
    assert server.keys == ["Basic c29tZW9uZTpodW50ZXIyMg=="], "what the URL says comes first"
    assert (
        f"{server.url}/chat/completions: status 400 Bad Request, no access for ***" in found.reason
    )
    (dead,) = make(f"http://someone:hunter22@127.0.0.1:{free_port()}/?key=query-value").ask(
        ["a"], ALONE
    )
    for text in (found.reason, dead.reason, caplog.text):
        assert not [one for one in ("hunter22", "query-value", "the-key") if one in text], text
