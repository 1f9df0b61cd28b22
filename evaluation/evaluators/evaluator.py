"""What an evaluator is: it says what it asks a model, and turns the replies into metrics.

An evaluator that needs replies names its conversations; those of all evaluators are answered
together, so that batches are full. One that needs the model itself gets it as the `Subject`.
`measure` runs on every process: it must give the same result on each, or divide its work by
`subject.ranks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.chat_template import ChatTemplate
from cpt_merge.evaluation.conversation import Conversation, Exchange
from cpt_merge.evaluation.generate.engine import Engine
from cpt_merge.evaluation.models import LanguageModel
from cpt_merge.evaluation.statistics import Parts


@dataclass(frozen=True)
class Metric:
    """One number that is reported for each model and language."""

    name: str  # in results.json, and in the tracker: eval/MODEL/LANGUAGE/NAME
    heading: str  # of its column on the terminal
    meaning: str
    rising: bool = True  # whether more is better
    share: bool = True  # shown in percent


@dataclass(frozen=True)
class Measurement:
    """A metric of one model in one language; `group` names a part of it, such as a turn or a
    category."""

    metric: Metric
    language: str
    parts: Parts
    group: str = ""


@dataclass(frozen=True)
class ConversationScores:
    """What an evaluator found in one conversation. A value is None where there is none."""

    scores: Mapping[str, float | None]
    why: list[str] = field(default_factory=list)  # a line for each failure or judge's answer


@dataclass(frozen=True)
class NotRun:
    """A metric without a value, and the reason. It is reported as such, never as zero."""

    metric: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """All that an evaluator found about one model."""

    measurements: list[Measurement]
    scores: list[ConversationScores] = field(default_factory=list)  # in the order of the exchanges
    not_run: list[NotRun] = field(default_factory=list)
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # for results.json
    failed: Sequence[str] = ()  # errors of endpoints, which may answer another time


@dataclass(frozen=True)
class Subject:
    """The model that is measured, who generates its replies, and how it is prompted. `directory` is
    None for a model in memory only."""

    engine: Engine
    directory: Path | None
    template: ChatTemplate | None = None  # None if no evaluator needs one

    @property
    def model(self) -> LanguageModel:
        """The model itself."""
        return self.engine.model

    @property
    def ranks(self) -> Ranks:
        """The processes that measure it together."""
        return self.engine.ranks

    @property
    def marks(self) -> Sequence[str]:
        """What the chat template writes around messages, and has no place in a reply."""
        return self.template.marks if self.template else ()


class Evaluator(ABC):
    """Measures one side of a model."""

    name: ClassVar[str]
    metrics: Sequence[Metric]  # all that it may report, in the order in which they are shown
    reads_all: ClassVar[bool] = False  # whether it gets the replies to all conversations
    generates: ClassVar[bool] = False  # whether `measure` itself asks the engine

    def __init__(self, conversations: Sequence[Conversation] = ()) -> None:
        self.conversations = list(conversations)  # that the model has to answer

    @property
    def asked(self) -> Any:
        """The prompts or texts that its units are, in their order, as JSON values."""
        return [asdict(one) for one in self.conversations]

    def needs_template(self) -> bool:
        """Whether the model is prompted in a chat template."""
        return bool(self.conversations)

    @abstractmethod
    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """The metrics, from the replies to its own conversations (to all of them with
        `reads_all`)."""

    def compare(
        self, ranks: Ranks, exchanges: Sequence[Exchange], baseline: Sequence[Exchange]
    ) -> Findings | None:
        """What depends on the baseline's replies to the same conversations as well; None if nothing
        does."""
        return None


def shares_of_exchanges(
    metric: Metric,
    exchanges: Sequence[Exchange],
    parts: Sequence[tuple[float, float] | None],
    group: str = "",
) -> list[Measurement]:
    """A metric in each language: sum of tops / sum of bottoms, from a pair for each conversation.

    Conversations are the units of intervals, since the replies within one depend on each other. A
    conversation whose pair is None is left out.
    """
    found: dict[str, Parts] = {}
    for unit, (exchange, pair) in enumerate(zip(exchanges, parts, strict=True)):
        if pair is not None and pair[1] > 0:
            found.setdefault(exchange.conversation.language, {})[unit] = pair
    return [Measurement(metric, language, units, group) for language, units in found.items()]


def by_category(
    metric: Metric, exchanges: Sequence[Exchange], parts: Sequence[tuple[float, float] | None]
) -> list[Measurement]:
    """`shares_of_exchanges` of all conversations, and of those of each category."""
    measurements = shares_of_exchanges(metric, exchanges, parts)
    categories = [exchange.conversation.category for exchange in exchanges]
    for category in sorted({one for one in categories if one}):
        of_category = [
            part if one == category else None for one, part in zip(categories, parts, strict=True)
        ]
        measurements += shares_of_exchanges(metric, exchanges, of_category, group=category)
    return measurements
