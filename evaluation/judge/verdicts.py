"""Verdicts of a judge, from its answers.

An answer without a verdict, such as a mark outside the scale, is recorded and counted, and is no
verdict of any kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Generic, TypeVar

from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.judge.client import NO_USAGE, Judge, Usage
from cpt_merge.evaluation.judge.reading import (
    SCALE,
    by_pattern,
    choice_in,
    mark_in,
    named_choice,
)

LOWEST, HIGHEST = 1.0, float(SCALE)
NO_VERDICT = "the judge's answer holds no verdict"
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


def read_mark(answer: str, pattern: str | None = None) -> float | None:
    """The mark of an answer, or what a recipe's pattern finds; None if it is none from 1 to 10."""
    mark = mark_in(answer) if pattern is None else _number(_matched(answer, pattern))
    return mark if mark is not None and LOWEST <= mark <= HIGHEST else None


def read_choice(answer: str, choices: Sequence[str], pattern: str | None = None) -> str | None:
    """The choice of an answer, or what a recipe's pattern finds; None if there is none."""
    if pattern is None:
        return choice_in(answer, choices)
    said = _matched(answer, pattern)
    return None if said is None else named_choice(said, choices)


def _matched(answer: str, pattern: str) -> str | None:
    try:
        return by_pattern(answer, pattern)
    except TimeoutError:
        raise UserError(
            f"the pattern {pattern!r} of evaluation.judge.patterns takes too long for a judge's "
            "answer; simplify it."
        ) from None


def _number(said: str | None) -> float | None:
    try:
        return float(said) if said is not None else None
    except ValueError:
        return None
