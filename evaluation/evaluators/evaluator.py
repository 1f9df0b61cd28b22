"""What a facet is: it says what it needs, and makes figures of it.

    needs conversations    `conversations()` names them; all facets' conversations are answered together, in batches
    needs text, or the model itself (its directory, its tokenizer)       `measure` gets it as the `Subject`

`measure` runs on every process, so it must give the same on each, or divide its work by `subject.division`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from cpt_merge.evaluation.chat_template import ChatTemplate
from cpt_merge.evaluation.conversation import Conversation, Exchange
from cpt_merge.evaluation.division import Division
from cpt_merge.evaluation.models import LoadedModel
from cpt_merge.evaluation.statistics import Parts


@dataclass(frozen=True)
class Figure:
    """One number that is reported of each model and language."""

    name: str  # in results.json, and in the tracker: eval/MODEL/LANGUAGE/NAME
    heading: str  # of its column on the terminal
    meaning: str
    rising: bool = True  # whether more is better
    share: bool = True  # shown in percent


@dataclass(frozen=True)
class Measured:
    """What a figure of one model is made of, in one language; `group` for a part of it: a turn, a category."""

    figure: Figure
    language: str
    parts: Parts
    group: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a facet found of one conversation. A value is None where it could not be had."""

    scores: Mapping[str, float | None]
    why: list[str] = field(default_factory=list)  # what failed, or what a judge said, a line each


@dataclass(frozen=True)
class NotRun:
    """A figure that could not be had, and why: it is reported as such, never as zero."""

    figure: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """All that a facet found of one model. `verdicts` are in the order of the exchanges that it was given."""

    measured: list[Measured]
    verdicts: list[Verdict] = field(default_factory=list)
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
    division: Division
    marks: Sequence[str] = ()  # of the chat template
    template: ChatTemplate | None = None  # that it is spoken to in; `measure` in run.py sets it


class Facet(ABC):
    """One side of a model that is measured."""

    name: ClassVar[str]
    figures: Sequence[Figure]  # all that it may report, in the order they are shown
    reads_all: ClassVar[bool] = (
        False  # whether it is given the replies to every facet's conversations
    )

    def conversations(self) -> list[Conversation]:
        """What it wants to be answered; nothing if it needs none."""
        return []

    def needs_template(self) -> bool:
        """Whether the model is spoken to in a chat template."""
        return bool(self.conversations())

    @abstractmethod
    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """The figures, of the replies to its own conversations (or to all, see `reads_all`)."""

    def compare(
        self, division: Division, exchanges: Sequence[Exchange], baseline: Sequence[Exchange]
    ) -> Findings | None:
        """What can be said only beside the baseline's replies to the same conversations; None if nothing."""
        return None


def shares_of_exchanges(
    figure: Figure,
    exchanges: Sequence[Exchange],
    parts: Sequence[tuple[float, float] | None],
    group: str = "",
) -> list[Measured]:
    """A figure in each language, from one pair (top, bottom) per conversation: sum of tops over sum of bottoms.

    A conversation is what is drawn by the bootstrap, since its replies depend on each other. None leaves it out.
    """
    found: dict[str, Parts] = {}
    for unit, (exchange, pair) in enumerate(zip(exchanges, parts, strict=True)):
        if pair is not None and pair[1] > 0:
            found.setdefault(exchange.conversation.language, {})[unit] = pair
    return [Measured(figure, language, units, group) for language, units in found.items()]


def by_category(
    figure: Figure, exchanges: Sequence[Exchange], parts: Sequence[tuple[float, float] | None]
) -> list[Measured]:
    """`shares_of_exchanges` of all, and of those of each category."""
    measured = shares_of_exchanges(figure, exchanges, parts)
    for category in sorted({exchange.conversation.category or "" for exchange in exchanges} - {""}):
        of_category = [
            part if exchange.conversation.category == category else None
            for exchange, part in zip(exchanges, parts, strict=True)
        ]
        measured += shares_of_exchanges(figure, exchanges, of_category, group=category)
    return measured
