"""Requests to an HTTP endpoint that speaks OpenAI's JSON, with retries."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import httpx2 as httpx  # the successor of httpx, which huggingface_hub uses as well
import regex

from cpt_merge.core.redaction import HIDDEN, SHORTEST, without_secrets
from cpt_merge.evaluation.config import AttributesConfig, JudgeEndpointConfig, ModerationConfig
from cpt_merge.evaluation.generate.config import ApiKey

KEY_REFUSED = {401, 403}
REFUSED = {*KEY_REFUSED, 404, 405}  # statuses that any request would get
BUSY = 429
RETRIED = {408, 409, 425, BUSY, 500, 502, 503, 504}  # statuses that may change in a moment
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds
BUSY_PAUSE = 4.0  # the first pause after status 429: rate limits are counted per minute
SHOWN_CHARACTERS = 200  # of the text that comes with an error
# names of errors that come with status 200, by the status that the same error has elsewhere
NAMED_ERRORS = {
    **{status.name.lower().replace("_", ""): int(status) for status in HTTPStatus if status >= 400},
    **{"ratelimitexceeded": BUSY, "ratelimiterror": BUSY},
    **{"servererror": 500, "overloaded": 503, "overloadederror": 503},
}
Section = AttributesConfig | JudgeEndpointConfig | ModerationConfig
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
IMPOSSIBLE = (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError)  # every time
BROKEN_OFF = (httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError)  # after the request
AUTHORIZATION = "Authorization"  # the header that holds `Bearer KEY`
LARGEST_ANSWER = 4 << 20  # bytes; an answer of a million tokens is shorter

logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs the address of every request


class EndpointError(Exception):
    """There is no usable answer.

    `dead`: the endpoint cannot be reached or refuses every request. `refused`: it answers that the
    request is wrong, so another attempt would not help. `status`: of its last answer; None without
    one. `sent` and `uncounted` are as in `EndpointAnswer`.
    """

    def __init__(
        self,
        text: str,
        dead: bool,
        refused: bool = False,
        status: int | None = None,
        sent: int = 0,
        uncounted: int = 0,
    ) -> None:
        super().__init__(text)
        self.dead, self.refused, self.status = dead, refused, status
        self.sent, self.uncounted = sent, uncounted

    @property
    def key_refused(self) -> bool:
        """Whether the endpoint wants another key; the text says where to set it."""
        return self.status in KEY_REFUSED

    @property
    def misconfigured(self) -> bool:
        """Whether the key or the URL is wrong; the text says where to set it."""
        moved = self.status is not None and httpx.codes.is_redirect(self.status)
        return self.key_refused or moved


@dataclass(frozen=True)
class EndpointAnswer:
    """An endpoint's JSON, and the requests that it took."""

    content: Any
    sent: int  # requests that reached the endpoint
    uncounted: int  # of these, what may have cost something without an answer that can be read


class FirstFailure:
    """The first failure of an endpoint, shared by threads; `reason` is empty until then."""

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        self._lock = threading.Lock()

    def record(self, reason: str) -> None:
        """Set the reason, unless there is one."""
        with self._lock:
            self.reason = self.reason or reason


@dataclass(frozen=True)
class Endpoint:
    """Where requests go. `url` is the base, such as https://api.openai.com/v1 or
    http://localhost:8000/v1. It may hold a password or a query with a key: these go to the endpoint
    and into no message. Redirects are not followed, because they would carry the key elsewhere."""

    url: str
    key: ApiKey
    timeout: float  # seconds that one attempt may take
    attempts: int
    setting: str  # the recipe's key of the URL
    key_header: str = AUTHORIZATION

    @classmethod
    def of(cls, given: Section, name: str, key_header: str = AUTHORIZATION) -> Endpoint:
        """The endpoint of a section of the recipe with this name."""
        key = ApiKey(given.key_variable, f"{name}.key_variable")
        return cls(given.url, key, given.timeout, given.attempts, f"{name}.url", key_header)

    @cached_property
    def _client(self) -> httpx.Client:
        """Threads share it, and with it the open connections. No proxy leads to this machine."""
        here = urlsplit(self.url).hostname in LOOPBACK
        return httpx.Client(timeout=self.timeout, follow_redirects=False, trust_env=not here)

    def post(self, path: str, payload: Mapping[str, Any]) -> Any:
        """The endpoint's answer, parsed from JSON. Raises `EndpointError` when no attempt
        succeeds."""
        return self.ask(path, payload).content

    def get(self, path: str) -> Any:
        """The same for a GET request."""
        return self.ask(path, None).content

    def ask(self, path: str, payload: Mapping[str, Any] | None) -> EndpointAnswer:
        """The same, with the number of requests that it took. Without a payload it is a GET."""
        address, sent, uncounted = shown_address(self._address(path)), 0, 0
        for attempt in range(1, self.attempts + 1):
            status: int | None = None
            headers: Mapping[str, str] = {}
            try:
                status, answer, headers = self._send(path, payload)
            except (httpx.HTTPError, *IMPOSSIBLE) as error:
                reached = isinstance(error, BROKEN_OFF)
                sent, uncounted = sent + reached, uncounted + reached
                reason = self._reason(error)
                retried, refused, dead = not isinstance(error, IMPOSSIBLE), False, True
            else:
                sent += 1
                if httpx.codes.is_success(status):
                    content, reason = _parse(answer)
                    if reason:
                        text, uncounted = f"{address} {reason}", uncounted + 1
                        raise EndpointError(text, False, False, status, sent, uncounted)
                    if not (found := _error_in(content)):
                        return EndpointAnswer(content, sent, uncounted)
                    status, answer = _status_of(found) or status, _as_bytes(found)
                retried, refused = status in RETRIED, status not in RETRIED
                moved = httpx.codes.is_redirect(status)
                reason = self._refusal(status, answer, headers.get("Location") if moved else None)
                dead = retried or moved or status in REFUSED
            if not retried or attempt == self.attempts:
                text = f"{address}: {reason}" + (f" (attempts: {attempt})" if attempt > 1 else "")
                raise EndpointError(text, dead, refused, status, sent, uncounted)
            first = BUSY_PAUSE if status == BUSY else FIRST_PAUSE
            time.sleep(_pause(headers.get("Retry-After"), first, attempt))
        raise AssertionError("unreachable")

    def _address(self, path: str) -> str:
        """The URL of a path; the base's query stays behind it."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{path}"))

    def _send(
        self, path: str, payload: Mapping[str, Any] | None
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Status, body and headers. The body ends a little above `LARGEST_ANSWER`.

        Raises httpx's errors, also if the whole takes longer than the timeout.
        """
        headers = {"Content-Type": "application/json"}
        if key := self.key.value:
            bearer = self.key_header == AUTHORIZATION
            headers[self.key_header] = f"Bearer {key}" if bearer else key
        end, body = time.monotonic() + self.timeout, bytearray()
        method, content = ("GET", None) if payload is None else ("POST", json.dumps(payload))
        with self._client.stream(
            method, self._address(path), content=content, headers=headers
        ) as response:
            try:
                for part in response.iter_bytes():
                    body += part
                    if len(body) > LARGEST_ANSWER:
                        break
                    if time.monotonic() > end:  # httpx limits each read only
                        raise httpx.ReadTimeout("the answer takes too long")
            except httpx.HTTPError:
                if response.is_success:
                    raise  # of an error, the status says enough
        return response.status_code, bytes(body), response.headers

    def _reason(self, error: Exception) -> str:
        if isinstance(error, httpx.TimeoutException):
            return "no answer in time"
        return self._hidden(str(error) or type(error).__name__)

    def _refusal(self, status: int, answer: bytes, location: str | None) -> str:
        if location is not None:
            return (
                f"status {status}, it redirects to {shown_address(location)}, and requests with a "
                f"key are not redirected; set {self.setting} to the endpoint's own URL"
            )
        text = self._hidden(" ".join(answer[:LARGEST_ANSWER].decode(errors="replace").split()))
        shown = text[:SHOWN_CHARACTERS]  # cut last: half a secret is not recognised as one
        name = httpx.codes.get_reason_phrase(status)
        said = " ".join(filter(None, [f"status {status}", name])) + (f", {shown}" if shown else "")
        return said + (f"; {self._key_advice()}" if status in KEY_REFUSED else "")

    def _key_advice(self) -> str:
        parts = urlsplit(self.url)
        if parts.username or parts.password:  # httpx sends these, and no other key
            return f"the user or password in {self.setting} is refused; correct it"
        variable = f"the environment variable {self.key.variable} ({self.key.setting})"
        if self.key.value:
            return f"the key in {variable} is refused; correct it"
        return f"{variable} is not set; set it to a key of the endpoint"

    def _hidden(self, text: str) -> str:
        """A text without secrets, the key and what the URL holds among them."""
        parts = urlsplit(self.url)
        words = [parts.username or "", *(value for _, value in parse_qsl(parts.query))]
        secrets = [
            self.key.value,
            parts.password or "",
            *(one for one in words if len(one) >= SHORTEST),
        ]
        for secret in filter(None, (*secrets, *map(unquote, secrets))):
            text = text.replace(secret, HIDDEN)
        return str(without_secrets(text))


def shown_address(url: str) -> str:
    """A URL without user, password, query and fragment."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def _parse(answer: bytes) -> tuple[Any, str]:
    """The JSON of an answer, or what the answer does instead."""
    if len(answer) > LARGEST_ANSWER:
        return None, f"answers with more than {LARGEST_ANSWER >> 20} MiB"
    try:
        return json.loads(answer), ""
    except (ValueError, RecursionError):
        return None, "answers what is not JSON"


def _error_in(content: Any) -> Any:
    """What gateways send as an answer of status 200 although it is an error; else nothing."""
    if not isinstance(content, dict):
        return None
    return content if content.get("object") == "error" else content.get("error")


def _as_bytes(error: Any) -> bytes:
    return json.dumps(error, ensure_ascii=False).encode(errors="replace")


def _status_of(error: Any) -> int | None:
    """The HTTP status that an error within an answer names, by number or in words."""
    given = error if isinstance(error, dict) else {}
    for value in (given.get(name) for name in ("status", "code", "type")):
        text = str(value)
        if text.isdecimal() and 400 <= int(text) < 600:
            return int(text)
        if status := NAMED_ERRORS.get(regex.sub(r"[\W_]+", "", text).lower()):
            return status
    return None


def _pause(asked: str | None, first: float, attempt: int) -> float:
    """Seconds until the next attempt: what the endpoint asks for, or twice as long each time."""
    try:
        pause = float(asked or "")
    except ValueError:
        pause = first * 2 ** (attempt - 1)
    return min(max(pause, 0.0), LONGEST_PAUSE) if math.isfinite(pause) else LONGEST_PAUSE
