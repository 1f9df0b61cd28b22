"""How a judge's verdict is read: the last line of its answer in the requested form.

A judge may reason before it, and repeat the form while it does. An answer without a verdict is
recorded and counted, and is no verdict of any kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Generic, TypeVar

import regex

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.judge.client import NO_USAGE, Judge, Usage

LOWEST, HIGHEST = 1.0, 10.0
NO_VERDICT = "the judge's answer holds no verdict"
# between a word and its value; no minus, no point, nothing that negates
BETWEEN = r"""[\s:：=*_"'「\[(]{0,4}"""
SHOWN_CHARACTERS = 500  # of an answer, in samples.jsonl; the cache has all of it

Value = TypeVar("Value")


@dataclass(frozen=True)
class JudgeVerdict(Generic[Value]):
    """A verdict. `value` is None if there is none, for `reason`."""

    value: Value | None
    reason: str = ""
    said: str = ""  # the whole answer
    usage: Usage = NO_USAGE
    dead: bool = False  # the endpoint failed

    @property
    def shown(self) -> str:
        """The answer for the samples, cut if it is long."""
        said = " ".join(self.said.split())
        return f"{said[:SHOWN_CHARACTERS]} …" if len(said) > SHOWN_CHARACTERS else said


def judge_all(
    judge: Judge, prompts: Sequence[str], read: Callable[[str], Value | None], ranks: Ranks
) -> list[JudgeVerdict[Value]]:
    """A verdict on each prompt, the same on every process."""
    found = []
    for answer in judge.ask(prompts, ranks):
        if answer.text is None:
            found.append(JudgeVerdict[Value](None, answer.reason, "", answer.usage, answer.dead))
        else:
            value = read(answer.text)
            reason = NO_VERDICT if value is None else ""
            found.append(JudgeVerdict(value, reason, answer.text, answer.usage))
    return found


def usage_details(judge: Judge, judged: Sequence[JudgeVerdict[Any]]) -> Mapping[str, Any]:
    """Requests, tokens and cost, for results.json."""
    usage = reduce(add, (one.usage for one in judged), NO_USAGE)
    cost = usage.cost(judge.config.price)
    return {
        "model": judge.name,
        "requests": usage.sent,
        "cached": usage.cached,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        **({"requests_without_token_counts": usage.uncounted} if usage.uncounted else {}),
        **({"cost": round(cost, 6)} if cost is not None else {}),
    }


def read_mark(answer: str) -> float | None:
    """The mark of a line like `SCORE: 7`, or of `[[7]]`; None if there is none within 1 to 10."""
    number = r"(\d+(?:\.\d+)?)(?:\s*/\s*10)?"
    found = _last(answer, rf"(?:SCORE|RATING){BETWEEN}{number}", rf"\[\[\s*{number}\s*\]\]")
    mark = float(found) if found else 0.0
    return mark if LOWEST <= mark <= HIGHEST else None


def read_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The choice of a line like `VERDICT: A`, or of `[[A]]`; None if there is none."""
    named = "|".join(map(regex.escape, choices))
    found = _last(answer, rf"VERDICT{BETWEEN}({named})", rf"\[\[\s*({named})\s*\]\]")
    return next(
        (choice for choice in choices if found and choice.casefold() == found.casefold()), None
    )


def _last(answer: str, line: str, brackets: str) -> str | None:
    """The value of the last match: a line that holds nothing else, or double brackets anywhere."""
    pattern = rf"^[\s*_#>`]*{line}[\s*_.`]*$|{brackets}"
    found = list(regex.finditer(pattern, answer, regex.MULTILINE | regex.IGNORECASE))
    return (found[-1][1] or found[-1][2]) if found else None
