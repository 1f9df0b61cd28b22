"""Requests to an HTTP endpoint that speaks OpenAI's JSON, with retries. Keys come from the environment, by name."""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpt_merge.tracking.redaction import without_secrets

REFUSED = {401, 403, 404, 405}  # statuses that any request would get
BUSY = 429
AGAIN = {408, 409, 425, BUSY, 500, 502, 503, 504}  # statuses that may be others in a moment
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds
BUSY_PAUSE = 4.0  # the first one after 429: limits are counted by the minute
CHUNK = 1 << 16  # bytes
SHOWN_CHARACTERS = 200  # of what an endpoint says to an error


class EndpointError(Exception):
    """No usable answer. `dead`: the endpoint cannot be reached, or refuses: it would not answer another one either.

    `refused`: it is there, and says that the request is wrong; another try is of no use.
    """

    def __init__(self, text: str, dead: bool, refused: bool = False) -> None:
        super().__init__(text)
        self.dead, self.refused = dead, refused


@dataclass(frozen=True)
class Endpoint:
    """Where requests go. `url` is the base, such as https://api.openai.com/v1 or http://localhost:8000/v1."""

    url: str
    key_variable: str  # name of the environment variable with the key; unset: no key is sent
    timeout: float  # seconds that one attempt may take
    attempts: int

    def post(self, path: str, payload: Mapping[str, Any]) -> Any:
        """The JSON that the endpoint answers. Raises `EndpointError` when no attempt succeeded."""
        for attempt in range(1, self.attempts + 1):
            try:
                return self._once(path, payload)
            except urllib.error.HTTPError as error:
                reason, again = self._refusal(error), error.code in AGAIN
                dead, refused = again or error.code in REFUSED, not again
                first = BUSY_PAUSE if error.code == BUSY else FIRST_PAUSE
                pause = _pause(error.headers.get("Retry-After"), first, attempt)
            except (OSError, http.client.HTTPException) as error:
                reason, again, dead, refused = _reason(error), True, True, False
                pause = _pause(None, FIRST_PAUSE, attempt)
            except (ValueError, RecursionError):
                raise EndpointError(
                    f"{self.url}/{path} answers what is not JSON", dead=False
                ) from None
            if not again or attempt == self.attempts:
                raise EndpointError(
                    f"{self.url}/{path}: {reason} (attempts: {attempt})", dead, refused
                )
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _once(self, path: str, payload: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/{path}", json.dumps(payload).encode(), headers, method="POST"
        )
        end, parts = time.monotonic() + self.timeout, list[bytes]()
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            while part := response.read1(CHUNK):
                parts.append(part)
                if time.monotonic() > end:  # the socket's own limit is that of a single read
                    raise TimeoutError
            if response.length:  # it broke off
                raise http.client.IncompleteRead(b"".join(parts), response.length)
        return json.loads(b"".join(parts))

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        if error.code in (401, 403):
            there = "is set" if os.environ.get(self.key_variable) else "is not set"
            return f"status {error.code}, the key is refused (environment variable {self.key_variable} {there})"
        try:
            said = " ".join(error.read1(CHUNK).decode(errors="replace").split())
        except (OSError, http.client.HTTPException):  # the status says enough
            said = ""
        said = without_secrets(said)[
            :SHOWN_CHARACTERS
        ]  # in this order: half a secret is not known for one
        return f"status {error.code} {error.reason}" + (f", {said}" if said else "")


def _pause(asked: str | None, first: float, attempt: int) -> float:
    """Seconds until the next attempt: what the endpoint asks for, or twice as long each time."""
    try:
        pause = float(asked or "")
    except ValueError:
        pause = first * 2 ** (attempt - 1)
    return min(max(pause, 0.0), LONGEST_PAUSE) if math.isfinite(pause) else LONGEST_PAUSE


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError):
        error = error.reason if isinstance(error.reason, Exception) else error
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
