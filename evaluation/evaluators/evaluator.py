"""What a evaluator is: it says what it needs, and makes metrics of it.

    needs conversations    `conversations()` names them; all evaluators' conversations are answered together, in batches
    needs text, or the model itself (its directory, its tokenizer)       `measure` gets it as the `Subject`

`measure` runs on every process, so it must give the same on each, or divide its work by `subject.ranks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.chat_template import ChatTemplate
from cpt_merge.evaluation.conversation import Conversation, Exchange
from cpt_merge.evaluation.models import LoadedModel
from cpt_merge.evaluation.statistics import Parts


@dataclass(frozen=True)
class Metric:
    """One number that is reported of each model and language."""

    name: str  # in results.json, and in the tracker: eval/MODEL/LANGUAGE/NAME
    heading: str  # of its column on the terminal
    meaning: str
    rising: bool = True  # whether more is better
    share: bool = True  # shown in percent


@dataclass(frozen=True)
class Measurement:
    """What a metric of one model is made of, in one language; `group` for a part of it: a turn, a category."""

    metric: Metric
    language: str
    parts: Parts
    group: str = ""


@dataclass(frozen=True)
class ConversationScores:
    """What a evaluator found of one conversation. A value is None where it could not be had."""

    scores: Mapping[str, float | None]
    why: list[str] = field(default_factory=list)  # what failed, or what a judge said, a line each


@dataclass(frozen=True)
class NotRun:
    """A metric that could not be had, and why: it is reported as such, never as zero."""

    metric: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """All that a evaluator found of one model. `verdicts` are in the order of the exchanges that it was given."""

    measured: list[Measurement]
    verdicts: list[ConversationScores] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    details: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict
    )  # into results.json, under the model
    failed: Sequence[str] = ()  # what endpoints said that failed: another time they may answer


def unique(reasons: Sequence[str]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(reasons))


@dataclass(frozen=True)
class Subject:
    """The model that is measured. `directory` is None for one that lies on no disk."""

    loaded: LoadedModel
    directory: Path | None
    ranks: Ranks
    marks: Sequence[str] = ()  # of the chat template
    template: ChatTemplate | None = None  # that it is spoken to in; `measure` in run.py sets it


class Evaluator(ABC):
    """One side of a model that is measured."""

    name: ClassVar[str]
    metrics: Sequence[Metric]  # all that it may report, in the order they are shown
    reads_all: ClassVar[bool] = (
        False  # whether it is given the replies to every evaluator's conversations
    )

    def conversations(self) -> list[Conversation]:
        """What it wants to be answered; nothing if it needs none."""
        return []

    def needs_template(self) -> bool:
        """Whether the model is spoken to in a chat template."""
        return bool(self.conversations())

    @abstractmethod
    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """The metrics, of the replies to its own conversations (or to all, see `reads_all`)."""

    def compare(
        self, ranks: Ranks, exchanges: Sequence[Exchange], baseline: Sequence[Exchange]
    ) -> Findings | None:
        """What can be said only beside the baseline's replies to the same conversations; None if nothing."""
        return None


def shares_of_exchanges(
    metric: Metric,
    exchanges: Sequence[Exchange],
    parts: Sequence[tuple[float, float] | None],
    group: str = "",
) -> list[Measurement]:
    """A metric in each language, from one pair (top, bottom) per conversation: sum of tops over sum of bottoms.

    A conversation is what is drawn by the bootstrap, since its replies depend on each other. None leaves it out.
    """
    found: dict[str, Parts] = {}
    for unit, (exchange, pair) in enumerate(zip(exchanges, parts, strict=True)):
        if pair is not None and pair[1] > 0:
            found.setdefault(exchange.conversation.language, {})[unit] = pair
    return [Measurement(metric, language, units, group) for language, units in found.items()]


def by_category(
    metric: Metric, exchanges: Sequence[Exchange], parts: Sequence[tuple[float, float] | None]
) -> list[Measurement]:
    """`shares_of_exchanges` of all, and of those of each category."""
    measured = shares_of_exchanges(metric, exchanges, parts)
    for category in sorted({exchange.conversation.category or "" for exchange in exchanges} - {""}):
        of_category = [
            part if exchange.conversation.category == category else None
            for exchange, part in zip(exchanges, parts, strict=True)
        ]
        measured += shares_of_exchanges(metric, exchanges, of_category, group=category)
    return measured
