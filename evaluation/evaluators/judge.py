"""Open questions whose replies a judge assesses; `evaluation.judge` names its endpoint.

    mark          each reply alone, from 1 to 10, with the conversation before it; the mean
    comparison    a model's whole conversation next to the baseline's, asked twice with the order
                  swapped. A model wins if it is preferred in both orders; a judge that changes its
                  mind with the order has called a tie

An empty reply gets the lowest mark, and loses against any other, without a request. Replies for
which the judge's answer holds no verdict are left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.config import JudgePatternsConfig
from cpt_merge.evaluation.conversation import Conversation, Exchange
from cpt_merge.evaluation.evaluators.evaluator import (
    ConversationScores,
    Evaluator,
    Findings,
    Measurement,
    Metric,
    NotRun,
    Subject,
    by_category,
    shares_of_exchanges,
)
from cpt_merge.evaluation.judge.client import Judge
from cpt_merge.evaluation.judge.prompts import fill, names_other_language, transcript
from cpt_merge.evaluation.judge.verdicts import (
    LOWEST,
    JudgeVerdict,
    judge_all,
    read_choice,
    read_mark,
    usage_details,
)
from cpt_merge.evaluation.scorers.scorer import EMPTY
from cpt_merge.evaluation.statistics import kappa, rank_correlation

MARK, COMPARISON = "judge_mark", "judge_preferred"
CLOSE = 1.0  # marks agree if they differ by no more
CHOICES = ("A", "B", "tie")
WIN, TIE, LOSS = 1.0, 0.5, 0.0

Place = tuple[int, int]  # conversation, turn
Verdicts = dict[Place, JudgeVerdict[float]]
Judged = tuple[Verdicts, Mapping[str, Any]]  # and what they cost


@dataclass(frozen=True)
class JudgePanel:
    """Who judges, in which modes, with which prompts."""

    judges: Sequence[Judge]  # one, or two whose agreement is reported
    modes: Sequence[str]
    prompts: Mapping[str, str]
    patterns: JudgePatternsConfig = field(default_factory=JudgePatternsConfig)


class JudgeEvaluator(Evaluator):
    """Marks, and comparisons with the baseline. Without a panel, they are not run for `reason`."""

    name = "judge"
    suffix: ClassVar[str] = ""  # of the names of metrics

    def __init__(
        self, conversations: Sequence[Conversation], panel: JudgePanel | None, reason: str = ""
    ) -> None:
        super().__init__(conversations)
        self._panel, self._reason = panel, reason
        marked = panel is not None and "mark" in panel.modes
        self._marks = _mark_metrics(panel.judges, self.suffix) if panel and marked else []
        compared = panel is not None and "comparison" in panel.modes
        self._comparisons = _comparison_metrics(panel.judges) if panel and compared else []
        self.metrics = [*self._marks, *self._comparisons]

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """The marks, overall and by turn."""
        if self._panel is None:
            return Findings([], not_run=[NotRun(MARK, self._reason)])
        if not self._marks:
            return Findings([])
        prompt, pattern = self._panel.prompts["mark"], self._panel.patterns.mark
        found = [
            mark(judge, prompt, exchanges, subject.ranks, pattern) for judge in self._panel.judges
        ]
        findings = _findings_of(exchanges, self._marks, found, tolerance=CLOSE)
        values = known(found[0][0])
        for turn in range(max(len(one.replies) for one in exchanges)):
            of_turn = {place: value for place, value in values.items() if place[1] == turn}
            findings.measurements.extend(
                shares_of_exchanges(
                    self._marks[0], exchanges, _parts(exchanges, of_turn), f"turn {turn + 1}"
                )
            )
        return findings

    def compare(
        self, ranks: Ranks, exchanges: Sequence[Exchange], baseline: Sequence[Exchange]
    ) -> Findings | None:
        """The comparisons."""
        if self._panel is None or not self._comparisons:
            return None
        prompt, pattern = self._panel.prompts["comparison"], self._panel.patterns.comparison
        found = [
            prefer(judge, prompt, exchanges, baseline, ranks, pattern)
            for judge in self._panel.judges
        ]
        return _findings_of(exchanges, self._comparisons, found, tolerance=0.0)


class JudgeSystemEvaluator(JudgeEvaluator):
    """Marks of replies to the same questions after a system prompt."""

    name = "judge_system"
    suffix = "_system"


def _mark_metrics(judges: Sequence[Judge], suffix: str) -> list[Metric]:
    """The metric of each judge, and that of their agreement."""
    mark, after = f"{MARK}{suffix}", ", after a system prompt" if suffix else ""
    own = [
        Metric(
            name,
            f"mark{suffix.replace('_', ' ')}, {judge.name}",
            f"mean mark by {judge.name}, 1 to 10{after}",
            share=False,
        )
        for name, judge in zip((mark, f"{mark}_second"), judges, strict=False)
    ]
    meaning = f"replies whose two marks differ by at most 1{after}"
    return [*own, Metric(f"{mark}_agreement", "marks agree", meaning)] if len(own) > 1 else own


def _comparison_metrics(judges: Sequence[Judge]) -> list[Metric]:
    """The metric of each judge, and that of their agreement."""
    own = [
        Metric(
            name,
            f"preferred, {judge.name}",
            f"conversations that {judge.name} prefers to the baseline's; ties count half",
        )
        for name, judge in zip((COMPARISON, f"{COMPARISON}_second"), judges, strict=False)
    ]
    meaning = "conversations on which both judges agree"
    agreement = Metric(f"{COMPARISON}_agreement", "judges agree", meaning)
    return [*own, agreement] if len(own) > 1 else own


def mark(
    judge: Judge,
    prompt: str,
    exchanges: Sequence[Exchange],
    ranks: Ranks,
    pattern: str | None = None,
) -> Judged:
    """A judge's mark for every reply."""
    places = [
        (place, turn) for place, one in enumerate(exchanges) for turn in range(len(one.replies))
    ]
    asked = [(place, turn) for place, turn in places if exchanges[place].replies[turn].text.strip()]
    prompts = []
    for place, turn in asked:
        conversation = exchanges[place].conversation
        shown = {"conversation": transcript(exchanges[place], turn + 1)}
        reference, named = conversation.reference(turn), names_other_language(conversation, turn)
        prompts.append(fill(prompt, conversation.language, shown, reference, named))
    judged = judge_all(judge, prompts, lambda answer: read_mark(answer, pattern), ranks)
    silent = JudgeVerdict(LOWEST if _works(judged) else None, EMPTY)
    verdicts = dict.fromkeys(places, silent) | dict(zip(asked, judged, strict=True))
    return verdicts, usage_details(judge, judged)


def prefer(
    judge: Judge,
    prompt: str,
    exchanges: Sequence[Exchange],
    baseline: Sequence[Exchange],
    ranks: Ranks,
    pattern: str | None = None,
) -> Judged:
    """A judge's choice between each conversation and the baseline's, asked in both orders."""
    pairs = list(zip(exchanges, baseline, strict=True))
    asked = [
        place
        for place, (ours, theirs) in enumerate(pairs)
        if ours.text.strip() and theirs.text.strip()
    ]
    prompts = [_comparison(prompt, *pairs[place]) for place in asked]
    prompts += [_comparison(prompt, *reversed(pairs[place])) for place in asked]
    judged = judge_all(judge, prompts, lambda answer: read_choice(answer, CHOICES, pattern), ranks)
    both_orders = list(zip(judged[: len(asked)], judged[len(asked) :], strict=True))
    works = _works(judged)
    verdicts: Verdicts = {}
    for place, (ours, theirs) in enumerate(pairs):
        we, they = bool(ours.text.strip()), bool(theirs.text.strip())
        value = TIE if we == they else WIN if we else LOSS  # replaced below if both have text
        verdicts[place, 0] = JudgeVerdict(value if works else None, EMPTY)
    for place, both in zip(asked, both_orders, strict=True):
        verdicts[place, 0] = _both_places(*both)
    changed = sum(
        one.value == other.value != "tie" and one.value is not None for one, other in both_orders
    )
    return verdicts, {**usage_details(judge, judged), "changed_with_places": changed}


def _comparison(prompt: str, first: Exchange, second: Exchange) -> str:
    conversation, turns = first.conversation, len(first.conversation.turns)
    shown = {
        "conversation_a": transcript(first, turns),
        "conversation_b": transcript(second, turns),
    }
    reference, named = (
        conversation.reference(turns - 1),
        names_other_language(conversation, turns - 1),
    )
    return fill(prompt, conversation.language, shown, reference, named)


def _works(judged: Sequence[JudgeVerdict[Any]]) -> bool:
    """Whether a judge gave verdicts and did not fail; otherwise empty replies alone would count."""
    return not judged or (
        any(one.value is not None for one in judged) and not any(one.dead for one in judged)
    )


def _both_places(in_order: JudgeVerdict[str], swapped: JudgeVerdict[str]) -> JudgeVerdict[float]:
    """The verdict of two orders: the model was A in `in_order` and B in `swapped`."""
    said = f"as A: {in_order.said} as B: {swapped.said}"
    if in_order.value is None or swapped.value is None:
        reason = in_order.reason or swapped.reason
        return JudgeVerdict(None, reason, said, dead=in_order.dead or swapped.dead)
    outcomes = {("A", "B"): WIN, ("B", "A"): LOSS}
    return JudgeVerdict(outcomes.get((in_order.value, swapped.value), TIE), "", said)


def _findings_of(
    exchanges: Sequence[Exchange],
    metrics: Sequence[Metric],
    found: Sequence[Judged],
    tolerance: float,
) -> Findings:
    """The metric of each judge; verdicts of two judges agree if they differ by `tolerance`."""
    measurements: list[Measurement] = []
    not_run: list[NotRun] = []
    failed: list[str] = []
    details: dict[str, dict[str, Any]] = {"judge": {}, "not_scored": {}}
    for metric, (verdicts, took) in zip(metrics, found, strict=False):
        measurements += by_category(metric, exchanges, _parts(exchanges, known(verdicts)))
        details["judge"][metric.name] = took
        missing = dict(Counter(one.reason for one in verdicts.values() if one.value is None))
        failed += [one.reason for one in verdicts.values() if one.dead]
        if missing and not known(verdicts):
            reason = next(reason for reason in (*missing, EMPTY) if reason != EMPTY)
            not_run.append(NotRun(metric.name, reason))
        elif missing:
            details["not_scored"][metric.name] = missing
    if len(found) > 1:
        agreed, statistic = agreement(answered(found[0][0]), answered(found[1][0]), tolerance)
        measurements += by_category(metrics[-1], exchanges, _parts(exchanges, agreed))
        details["judge"][metrics[-1].name] = statistic
    verdicts_of = [verdicts for verdicts, _ in found]
    scores = [_scores(metrics, verdicts_of, place) for place in range(len(exchanges))]
    details = {name: value for name, value in details.items() if value}
    return Findings(measurements, scores, not_run, details, list(dict.fromkeys(failed)))


def known(verdicts: Verdicts) -> dict[Place, float]:
    """The verdicts that have a value."""
    return {place: one.value for place, one in verdicts.items() if one.value is not None}


def answered(verdicts: Verdicts) -> dict[Place, float]:
    """The verdicts that have a value and come from the judge, not from an empty reply."""
    return {
        place: value for place, value in known(verdicts).items() if verdicts[place].reason != EMPTY
    }


def agreement(
    ours: Mapping[Place, float], theirs: Mapping[Place, float], tolerance: float
) -> tuple[dict[Place, float], dict[str, float | None]]:
    """1 for each verdict of both judges that differs by at most `tolerance`, 0 for the others.

    Also a statistic over all: Spearman's correlation of marks, or Cohen's kappa of choices.
    """
    both = [place for place in ours if place in theirs]
    one, other = [ours[place] for place in both], [theirs[place] for place in both]
    agreed = {place: float(abs(ours[place] - theirs[place]) <= tolerance) for place in both}
    if tolerance:
        return agreed, {"rank_correlation": rank_correlation(one, other)}
    return agreed, {"kappa": kappa(one, other)}


def _parts(
    exchanges: Sequence[Exchange], values: Mapping[Place, float]
) -> list[tuple[float, float] | None]:
    """(sum, number) over the turns of each conversation."""
    of_each: list[list[float]] = [[] for _ in exchanges]
    for (place, _), value in values.items():
        of_each[place].append(value)
    return [(sum(found), float(len(found))) if found else None for found in of_each]


def _scores(metrics: Sequence[Metric], found: Sequence[Verdicts], place: int) -> ConversationScores:
    """One conversation's scores, with a line for every verdict."""
    scores: dict[str, float | None] = {}
    why = []
    for metric, verdicts in zip(metrics, found, strict=False):
        of_turns = {turn: one for (at, turn), one in verdicts.items() if at == place}
        values = [one.value for one in of_turns.values() if one.value is not None]
        scores[metric.name] = sum(values) / len(values) if values else None
        for turn, one in of_turns.items():
            value = "none" if one.value is None else f"{one.value:g}"
            where = f"{metric.name}, turn {turn + 1}" if len(of_turns) > 1 else metric.name
            why.append(": ".join(filter(None, (where, value, one.reason, one.shown))))
    return ConversationScores(scores, why)
