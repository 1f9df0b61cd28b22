"""A judge: any endpoint with OpenAI's chat completions.

Its answers are kept on disk by what was asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import make_writable
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.evaluation.config import JudgeEndpointConfig, PriceConfig
from cpt_merge.evaluation.generate.endpoint import Endpoint, EndpointError

PATH = "chat/completions"
BATCH = 4  # prompts per request at a time: a batch waits for its slowest only once in so many
PATIENCE = 30.0  # seconds for a word
NO_COMPLETION = "the endpoint's answer is no chat completion"


@dataclass(frozen=True)
class Usage:
    """What answers took.

    Tokens are those of requests that were sent, as the endpoint counted them.
    """

    sent: int = 0
    cached: int = 0  # answers that were on the disk
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0  # sent, and the endpoint did not say how many tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.sent + other.sent,
            self.cached + other.cached,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.uncounted + other.uncounted,
        )

    def cost(self, price: PriceConfig | None) -> float | None:
        """In the currency of the price; None without one, or if tokens are not known."""
        if price is None or self.uncounted:
            return None
        return (self.prompt_tokens * price.prompt + self.completion_tokens * price.completion) / 1e6


NO_USAGE = Usage()


@dataclass(frozen=True)
class Answer:
    """What the judge said. `text` is None where nothing could be had; `reason` says why."""

    text: str | None
    reason: str = ""
    usage: Usage = NO_USAGE
    dead: bool = False  # the endpoint failed: another time it may answer


class Judge:
    """Asks a judge. Safe for threads; every process of a job may have one and share the cache."""

    def __init__(
        self, config: JudgeEndpointConfig, cache: Path, at_once: int, name: str = ""
    ) -> None:
        self.config = config
        self.name = name or config.model  # in metrics and tables
        self._cache, self._at_once, self._checked = cache, at_once, False
        self._gave_up = False  # the last time that it was asked
        self._endpoint = Endpoint(config.url, config.key_variable, config.timeout, config.attempts)

    def check(self) -> None:
        """Ask for a word, before hours are spent on replies.

        Raises `UserError` for an endpoint that refuses. One that cannot be reached may be there
        later: that is said, and the judge's metrics are not run if it is not.
        """
        if self._checked:
            return
        self._checked = True
        make_writable(self._cache, "evaluation.judge.cache =")
        error = self._silence()
        if error is not None and error.refused:
            raise UserError(f"the judge refuses: {error}; correct evaluation.judge.")
        if error is not None:
            say(
                f"judge {self.name} does not answer now, and is asked again when the replies are there: {error}"
            )

    def _silence(self) -> EndpointError | None:
        """None if the judge says a word, at once and in short time; else why it does not."""
        try:
            replace(self._endpoint, attempts=1, timeout=min(self._endpoint.timeout, PATIENCE)).post(
                PATH, self._payload("Say yes.")
            )
        except EndpointError as error:
            return error
        return None

    def ask(self, prompts: Sequence[str], ranks: Ranks) -> list[Answer]:
        """An answer for each prompt, in order, the same on every process; equal prompts are asked once.

        When all attempts at one prompt have failed, nothing more is sent; the next call first asks for a word.
        """
        unique = list(dict.fromkeys(prompts))
        size = BATCH * self._at_once
        batches = [unique[start : start + size] for start in range(0, len(unique), size)]
        broken = _Broken()
        if self._gave_up and (error := self._silence()):
            broken.set(str(error))
        with ThreadPoolExecutor(self._at_once) as pool:
            found = ranks.map(
                f"judge {self.name}",
                lambda batch: list(pool.map(lambda prompt: self._one(prompt, broken), batch)),
                batches,
            )
        self._gave_up = bool(broken.reason)
        answers = dict(zip(unique, (answer for batch in found for answer in batch), strict=True))
        given: list[Answer] = []
        for prompt in prompts:
            given.append(answers[prompt])
            answers[prompt] = replace(answers[prompt], usage=NO_USAGE)  # counted once
        return given

    def _payload(self, prompt: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"model": self.config.model, "messages": messages, **self.config.request}

    def _one(self, prompt: str, broken: _Broken) -> Answer:
        payload = self._payload(prompt)
        asked = json.dumps([self.config.url, payload], sort_keys=True, ensure_ascii=False)
        path = self._cache / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"
        kept = read_kept(path)
        if kept is not None:
            return Answer(kept, usage=Usage(cached=1))
        if broken.reason:
            return Answer(None, broken.reason, dead=True)
        try:
            completion = self._endpoint.post(PATH, payload)
        except EndpointError as error:
            if error.dead:
                broken.set(str(error))
            return Answer(None, str(error), dead=error.dead)
        text, usage = text_of(completion), usage_of(completion)
        if text is None:
            return Answer(None, NO_COMPLETION, usage)
        keep(path, payload, text)
        return Answer(text, usage=usage)


class _Broken:
    """Why an endpoint is given up, shared by threads; empty while it is not."""

    def __init__(self) -> None:
        self.reason = ""
        self._lock = threading.Lock()

    def set(self, reason: str) -> None:
        with self._lock:
            self.reason = self.reason or reason


def text_of(completion: Any) -> str | None:
    """The text of {"choices": [{"message": {"content": "..."}}]}; None of anything else."""
    try:
        text = completion["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    # half a surrogate pair can be written nowhere
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else None


def usage_of(completion: Any) -> Usage:
    """Of one request that was sent."""
    counts = completion.get("usage") if isinstance(completion, dict) else None
    try:
        return Usage(1, 0, int(counts["prompt_tokens"]), int(counts["completion_tokens"]))  # type: ignore[index]
    except (KeyError, TypeError, ValueError, OverflowError):
        return Usage(1, uncounted=1)


def read_kept(path: Path) -> str | None:
    """An answer that was kept; None if there is none that can be read."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return text if isinstance(text, str) else None


def keep(path: Path, payload: dict[str, Any], text: str) -> None:
    """Write an answer, with what was asked, for whoever asks the same."""
    beside = path.with_suffix(
        f".{os.getpid()}-{threading.get_ident()}"
    )  # others may write the same one now
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(
            json.dumps({"request": payload, "answer": text}, ensure_ascii=False), encoding="utf-8"
        )
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"the judge's answer cannot be kept ({error}); correct evaluation.judge.cache."
        ) from None
