"""A judge behind any endpoint with OpenAI's chat completions. Its answers are cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from operator import add
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import make_writable
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.core.redaction import without_secrets
from cpt_merge.evaluation.config import JudgeEndpointConfig, PriceConfig
from cpt_merge.evaluation.generate.endpoint import (
    Endpoint,
    EndpointAnswer,
    EndpointError,
    FirstFailure,
)

PATH = "chat/completions"
BATCH = 4  # prompts per parallel request: a batch waits for its slowest answer once
PATIENCE = 30.0  # seconds for a test request
NO_COMPLETION = "the endpoint's answer is no chat completion"


@dataclass(frozen=True)
class Usage:
    """What answers cost, with the requests that failed. Tokens are counted by the endpoint."""

    sent: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0  # requests that may have cost something and whose tokens are not known

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(add, astuple(self), astuple(other)))

    def cost(self, price: PriceConfig | None) -> float | None:
        """In the currency of the price; None without one, or if token counts are missing."""
        if price is None or self.uncounted:
            return None
        return (self.prompt_tokens * price.prompt + self.completion_tokens * price.completion) / 1e6


NO_USAGE = Usage()


@dataclass(frozen=True)
class Answer:
    """A judge's answer. `text` is None if there is none, for `reason`."""

    text: str | None
    reason: str = ""
    usage: Usage = NO_USAGE
    dead: bool = False  # the endpoint failed and may answer another time


class Judge:
    """Asks a judge. Threads can share it, and all processes of a job share the cache."""

    def __init__(
        self,
        config: JudgeEndpointConfig,
        cache: Path,
        at_once: int,
        name: str = "",
        section: str = "evaluation.judge",
    ) -> None:
        self.config, self._section = config, section
        self.name = name or config.model  # in metrics and tables
        self._cache, self._at_once, self._checked = cache, at_once, False
        self._gave_up = False  # during the last call of `ask`
        self._endpoint = Endpoint.of(config, section)

    def check(self) -> None:
        """Send a test request before hours are spent on replies.

        Raises `UserError` if the endpoint refuses it. One that cannot be reached now is only
        reported, since it may be up when the replies are there.
        """
        if self._checked:
            return
        self._checked = True
        make_writable(self._cache, "evaluation.judge.cache =")
        error = self._test()
        if error is not None and error.refused:
            advice = "" if error.misconfigured else f"; correct {self._section}"
            raise UserError(f"the judge refuses: {error}{advice}.")
        if error is not None:
            say(
                f"judge {self.name} does not answer now; it is asked again when the replies are "
                f"there: {error}"
            )

    def _test(self) -> EndpointError | None:
        """Send one request once, with a short timeout; None if it is answered."""
        timeout = min(self._endpoint.timeout, PATIENCE)
        try:
            replace(self._endpoint, attempts=1, timeout=timeout).post(
                PATH, self._payload("Say yes.")
            )
        except EndpointError as error:
            return error
        return None

    def ask(self, prompts: Sequence[str], ranks: Ranks) -> list[Answer]:
        """An answer for each prompt, in order, on every process. Equal prompts are asked once.

        When all attempts at one prompt have failed, nothing more is sent, and the next call starts
        with a test request.
        """
        unique = list(dict.fromkeys(prompts))
        size = BATCH * self._at_once
        batches = [unique[start : start + size] for start in range(0, len(unique), size)]
        error = self._test() if self._gave_up else None
        failure = FirstFailure(str(error) if error else "")
        with ThreadPoolExecutor(self._at_once) as pool:
            found = ranks.map(
                f"judge {self.name}",
                lambda batch: list(pool.map(lambda prompt: self._one(prompt, failure), batch)),
                batches,
            )
        self._gave_up = bool(failure.reason)
        answers = dict(zip(unique, (answer for batch in found for answer in batch), strict=True))
        given: list[Answer] = []
        for prompt in prompts:
            given.append(answers[prompt])
            answers[prompt] = replace(answers[prompt], usage=NO_USAGE)  # count it once
        return given

    def _payload(self, prompt: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"model": self.config.model, "messages": messages, **self.config.request}

    def _one(self, prompt: str, failure: FirstFailure) -> Answer:
        payload = self._payload(prompt)
        asked = json.dumps([self.config.url, payload], sort_keys=True, ensure_ascii=False)
        path = self._cache / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"
        cached = _read_cached(path)
        if cached is not None:
            return Answer(cached, usage=Usage(cached=1))
        if failure.reason:
            return Answer(None, failure.reason, dead=True)
        try:
            answer = self._endpoint.ask(PATH, payload)
        except EndpointError as error:
            if error.dead:
                failure.record(str(error))
            usage = Usage(error.sent, uncounted=error.uncounted)
            return Answer(None, str(error), usage, error.dead)
        text, usage = _text_of(answer.content), _usage_of(answer)
        if text is None:
            return Answer(None, NO_COMPLETION, usage)
        _write_cached(path, payload, text)
        return Answer(text, usage=usage)


def _text_of(completion: Any) -> str | None:
    """The text of {"choices": [{"message": {"content": "..."}}]}; None of anything else."""
    try:
        text = completion["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    # half a surrogate pair cannot be written to a file
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else None


def _usage_of(answer: EndpointAnswer) -> Usage:
    """The usage of an answer, and of the requests before it that got none."""
    counts = answer.content.get("usage") if isinstance(answer.content, dict) else None
    try:
        tokens = Usage(0, 0, int(counts["prompt_tokens"]), int(counts["completion_tokens"]))  # type: ignore[index]
    except (KeyError, TypeError, ValueError, OverflowError):
        tokens = Usage(uncounted=1)
    return tokens + Usage(answer.sent, uncounted=answer.uncounted)


def _read_cached(path: Path) -> str | None:
    """A cached answer; None if there is none that can be read."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _write_cached(path: Path, payload: dict[str, Any], text: str) -> None:
    # another thread or process may write the same answer now
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    request = without_secrets(payload)  # evaluation.judge.request may hold a key
    content = json.dumps({"request": request, "answer": text}, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"the judge's answer cannot be cached ({error}); correct evaluation.judge.cache."
        ) from None
