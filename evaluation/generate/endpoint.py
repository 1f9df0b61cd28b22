"""Requests to an HTTP endpoint that speaks OpenAI's JSON, with retries. Keys come from environment
variables."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx2 as httpx  # the successor of httpx, which huggingface_hub uses as well

from cpt_merge.tracking.redaction import without_secrets

REFUSED = {401, 403, 404, 405}  # statuses that any request would get
BUSY = 429
RETRIED = {408, 409, 425, BUSY, 500, 502, 503, 504}  # statuses that may change in a moment
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds
BUSY_PAUSE = 4.0  # the first pause after status 429: rate limits are counted per minute
SHOWN_CHARACTERS = 200  # of the text that comes with an error


class EndpointError(Exception):
    """There is no usable answer.

    `dead`: the endpoint cannot be reached or refuses every request. `refused`: it answers that the
    request is wrong, so another attempt would not help.
    """

    def __init__(self, text: str, dead: bool, refused: bool = False) -> None:
        super().__init__(text)
        self.dead, self.refused = dead, refused


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
    http://localhost:8000/v1."""

    url: str
    key_variable: str  # environment variable with the key; if it is not set, no key is sent
    timeout: float  # seconds that one attempt may take
    attempts: int

    @cached_property
    def _client(self) -> httpx.Client:
        """Threads share it, and with it the open connections."""
        return httpx.Client(timeout=self.timeout)

    def post(self, path: str, payload: Mapping[str, Any]) -> Any:
        """The endpoint's answer, parsed from JSON. Raises `EndpointError` when no attempt
        succeeds."""
        address = f"{self.url}/{path}"
        for attempt in range(1, self.attempts + 1):
            try:
                status, answer, asked_pause = self._send(path, payload)
            except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
                late = isinstance(error, httpx.TimeoutException)
                reason = "no answer in time" if late else str(error) or type(error).__name__
                retried = dead = True
                pause = _pause(None, FIRST_PAUSE, attempt)
            else:
                if httpx.codes.is_success(status):
                    try:
                        return json.loads(answer)
                    except (ValueError, RecursionError):
                        text = f"{address} answers what is not JSON"
                        raise EndpointError(text, dead=False) from None
                retried = status in RETRIED
                reason, dead = self._refusal(status, answer), retried or status in REFUSED
                first = BUSY_PAUSE if status == BUSY else FIRST_PAUSE
                pause = _pause(asked_pause, first, attempt)
            if not retried or attempt == self.attempts:
                text = f"{address}: {without_secrets(reason)} (attempts: {attempt})"
                raise EndpointError(text, dead, refused=not retried)
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _send(self, path: str, payload: Mapping[str, Any]) -> tuple[int, bytes, str | None]:
        """Status, body and Retry-After. Raises httpx's errors, also if the whole takes longer than
        the timeout."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable, "").strip():
            headers["Authorization"] = f"Bearer {key}"
        end, body = time.monotonic() + self.timeout, b""
        with self._client.stream(
            "POST", f"{self.url.rstrip('/')}/{path}", content=json.dumps(payload), headers=headers
        ) as response:
            try:
                for part in response.iter_bytes():
                    body += part
                    if time.monotonic() > end:  # httpx limits each read only
                        raise httpx.ReadTimeout("the answer takes too long")
            except httpx.HTTPError:
                if response.is_success:
                    raise  # of an error, the status says enough
        return response.status_code, body, response.headers.get("Retry-After")

    def _refusal(self, status: int, answer: bytes) -> str:
        if status in (401, 403):
            is_set = "is set" if os.environ.get(self.key_variable) else "is not set"
            return (
                f"status {status}, the key is refused (environment variable "
                f"{self.key_variable} {is_set})"
            )
        text = without_secrets(" ".join(answer.decode(errors="replace").split()))
        shown = text[:SHOWN_CHARACTERS]  # cut last: half a secret is not recognised as one
        name = httpx.codes.get_reason_phrase(status)
        return " ".join(filter(None, [f"status {status}", name])) + (f", {shown}" if shown else "")


def _pause(asked: str | None, first: float, attempt: int) -> float:
    """Seconds until the next attempt: what the endpoint asks for, or twice as long each time."""
    try:
        pause = float(asked or "")
    except ValueError:
        pause = first * 2 ** (attempt - 1)
    return min(max(pause, 0.0), LONGEST_PAUSE) if math.isfinite(pause) else LONGEST_PAUSE
