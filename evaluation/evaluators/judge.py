"""Open questions, marked by a judge: helpful, correct, in the user's language? Needs an endpoint (`evaluation.judge`).

    mark          each reply alone, 1 to 10, with the conversation up to it; the mean over the replies
    comparison    a model's whole conversation beside the baseline's, twice, with the places swapped. A model wins if it
                  is preferred in both places; a judge that changes its mind with the places has called a tie

An empty reply gets the lowest mark, and loses against any that is not empty, without the judge being asked. What the
judge said nothing usable about is left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt_merge.core.distributed import Ranks
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
    unique,
)
from cpt_merge.evaluation.judge.agreement import kappa, rank_correlation
from cpt_merge.evaluation.judge.client import Judge
from cpt_merge.evaluation.judge.prompts import fill, transcript
from cpt_merge.evaluation.judge.verdicts import (
    LOWEST,
    JudgeVerdict,
    judge_all,
    left_out,
    read_choice,
    read_mark,
    usage_details,
)

MARK, COMPARISON = "judge_mark", "judge_preferred"
CLOSE = 1.0  # marks that differ by no more agree
CHOICES = ("A", "B", "tie")
WIN, TIE, LOSS = 1.0, 0.5, 0.0
EMPTY = "the reply is empty"

Place = tuple[int, int]  # conversation, turn
Verdicts = dict[Place, JudgeVerdict[float]]


@dataclass(frozen=True)
class JudgePanel:
    """Who judges, in what ways and words."""

    judges: Sequence[Judge]  # one, or two whose agreement is reported
    modes: Sequence[str]
    prompts: Mapping[str, str]


class JudgeEvaluator(Evaluator):
    """Marks, and comparisons with the baseline.

    Without a bench its metrics are not run, for `reason`.
    """

    name = "judge"

    def __init__(
        self, conversations: Sequence[Conversation], bench: JudgePanel | None, reason: str = ""
    ) -> None:
        self._conversations, self._bench, self._reason = list(conversations), bench, reason
        self._marks = mark_metrics(bench.judges) if bench and "mark" in bench.modes else []
        self._comparisons = (
            comparison_metrics(bench.judges) if bench and "comparison" in bench.modes else []
        )
        self.metrics = [*self._marks, *self._comparisons]

    def conversations(self) -> list[Conversation]:
        """The questions."""
        return self._conversations

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """The marks."""
        if self._bench is None:
            return Findings([], not_run=[NotRun(MARK, self._reason)])
        if not self._marks:
            return Findings([])
        found = [
            mark(judge, self._bench.prompts["mark"], exchanges, subject.ranks)
            for judge in self._bench.judges
        ]
        findings = findings_of(exchanges, self._marks, found, tolerance=CLOSE)
        for turn in range(max(len(one.replies) for one in exchanges)):
            parts = _parts(
                exchanges,
                {place: one for place, one in known(found[0][0]).items() if place[1] == turn},
            )
            findings.measurements.extend(
                shares_of_exchanges(self._marks[0], exchanges, parts, group=f"turn {turn + 1}")
            )
        return findings

    def compare(
        self, ranks: Ranks, exchanges: Sequence[Exchange], baseline: Sequence[Exchange]
    ) -> Findings | None:
        """The comparisons."""
        if self._bench is None or not self._comparisons:
            return None
        prompt = self._bench.prompts["comparison"]
        found = [prefer(judge, prompt, exchanges, baseline, ranks) for judge in self._bench.judges]
        return findings_of(exchanges, self._comparisons, found, tolerance=0.0)


def mark_metrics(judges: Sequence[Judge]) -> list[Metric]:
    """The metric of each judge, and that of their agreement."""
    own = [
        Metric(name, f"mark, {judge.name}", f"mean mark by {judge.name}, 1 to 10", share=False)
        for name, judge in zip((MARK, f"{MARK}_second"), judges, strict=False)
    ]
    agreement = Metric(
        f"{MARK}_agreement", "marks agree", "replies whose two marks differ by at most 1"
    )
    return [*own, *([agreement] if len(own) > 1 else [])]


def comparison_metrics(judges: Sequence[Judge]) -> list[Metric]:
    """The metric of each judge, and that of their agreement."""
    own = [
        Metric(
            name, f"preferred, {judge.name}",
            f"conversations that {judge.name} prefers to the baseline's; ties count half",
        )
        for name, judge in zip((COMPARISON, f"{COMPARISON}_second"), judges, strict=False)
    ]  # fmt: skip
    agreement = Metric(
        f"{COMPARISON}_agreement", "judges agree", "conversations on which both judges say the same"
    )
    return [*own, *([agreement] if len(own) > 1 else [])]


def mark(
    judge: Judge, prompt: str, exchanges: Sequence[Exchange], ranks: Ranks
) -> tuple[Verdicts, Mapping[str, Any]]:
    """A judge's mark for every reply, and what it took."""
    places = [
        (place, turn) for place, one in enumerate(exchanges) for turn in range(len(one.replies))
    ]
    asked = [(place, turn) for place, turn in places if exchanges[place].replies[turn].text.strip()]
    prompts = []
    for place, turn in asked:
        conversation = exchanges[place].conversation
        shown = {"conversation": transcript(exchanges[place], turn + 1)}
        prompts.append(fill(prompt, conversation.language, shown, conversation.reference(turn)))
    judged = judge_all(judge, prompts, read_mark, ranks)
    silent = JudgeVerdict(LOWEST, EMPTY) if _speaks(judged) else JudgeVerdict[float](None, EMPTY)
    verdicts = dict.fromkeys(places, silent) | dict(zip(asked, judged, strict=True))
    return verdicts, usage_details(judge, judged)


def prefer(
    judge: Judge,
    prompt: str,
    exchanges: Sequence[Exchange],
    baseline: Sequence[Exchange],
    ranks: Ranks,
) -> tuple[Verdicts, Mapping[str, Any]]:
    """A judge's choice between each conversation and the baseline's, in both orders, and what it took."""
    pairs = list(zip(exchanges, baseline, strict=True))
    asked = [
        place
        for place, (ours, theirs) in enumerate(pairs)
        if ours.text.strip() and theirs.text.strip()
    ]
    prompts = [_comparison(prompt, *pairs[place]) for place in asked]
    prompts += [_comparison(prompt, *reversed(pairs[place])) for place in asked]
    judged = judge_all(judge, prompts, lambda answer: read_choice(answer, CHOICES), ranks)
    both_orders = list(zip(judged[: len(asked)], judged[len(asked) :], strict=True))
    verdicts = {
        (place, 0): _of_silence(*pair) if _speaks(judged) else JudgeVerdict[float](None, EMPTY)
        for place, pair in enumerate(pairs)
    }
    verdicts |= {
        (place, 0): both_places(*both) for place, both in zip(asked, both_orders, strict=True)
    }
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
    return fill(prompt, conversation.language, shown, conversation.reference(turns - 1))


def _speaks(judged: Sequence[JudgeVerdict[Any]]) -> bool:
    """Whether a judge was there to the end and said something usable: else empty replies would make its metric."""
    return not judged or (
        any(one.value is not None for one in judged) and not any(one.dead for one in judged)
    )


def _of_silence(ours: Exchange, theirs: Exchange) -> JudgeVerdict[float]:
    """Where at least one has said nothing."""
    we, they = bool(ours.text.strip()), bool(theirs.text.strip())
    return JudgeVerdict(TIE if we == they else WIN if we else LOSS, EMPTY)


def both_places(in_order: JudgeVerdict[str], swapped: JudgeVerdict[str]) -> JudgeVerdict[float]:
    """The model was A in `in_order` and B in `swapped`.

    Preferred in both: a win; in neither: a loss; else a tie.
    """
    said = f"as A: {in_order.said} as B: {swapped.said}"
    if in_order.value is None or swapped.value is None:
        return JudgeVerdict(
            None, in_order.reason or swapped.reason, said, dead=in_order.dead or swapped.dead
        )
    return JudgeVerdict(
        {("A", "B"): WIN, ("B", "A"): LOSS}.get((in_order.value, swapped.value), TIE), "", said
    )


def findings_of(
    exchanges: Sequence[Exchange],
    metrics: Sequence[Metric],
    found: Sequence[tuple[Verdicts, Mapping[str, Any]]],
    tolerance: float,
) -> Findings:
    """The metric of each judge; of two, how often their verdicts differ by no more than `tolerance`."""
    measured: list[Measurement] = []
    not_run: list[NotRun] = []
    failed: list[str] = []
    details: dict[str, dict[str, Any]] = {"judge": {}, "not_scored": {}}
    for metric, (verdicts, took) in zip(metrics, found, strict=False):
        measured += by_category(metric, exchanges, _parts(exchanges, known(verdicts)))
        details["judge"][metric.name] = took
        missing = left_out(list(verdicts.values()))
        failed += [one.reason for one in verdicts.values() if one.dead]
        if missing and not known(verdicts):
            not_run.append(
                NotRun(metric.name, next(reason for reason in (*missing, EMPTY) if reason != EMPTY))
            )
        elif missing:
            details["not_scored"][metric.name] = missing
    if len(found) > 1:
        agreed, statistic = agreement(spoken(found[0][0]), spoken(found[1][0]), tolerance)
        measured += by_category(metrics[-1], exchanges, _parts(exchanges, agreed))
        details["judge"][metrics[-1].name] = statistic
    by_place = [
        _verdict(metrics, [verdicts for verdicts, _ in found], place)
        for place in range(len(exchanges))
    ]
    return Findings(
        measured,
        by_place,
        not_run,
        {name: value for name, value in details.items() if value},
        unique(failed),
    )


def known(verdicts: Verdicts) -> dict[Place, float]:
    """Those that there are."""
    return {place: one.value for place, one in verdicts.items() if one.value is not None}


def spoken(verdicts: Verdicts) -> dict[Place, float]:
    """Those that the judge was asked for."""
    return {
        place: value for place, value in known(verdicts).items() if verdicts[place].reason != EMPTY
    }


def agreement(
    ours: Mapping[Place, float], theirs: Mapping[Place, float], tolerance: float
) -> tuple[dict[Place, float], dict[str, float | None]]:
    """Of what both judges have judged: 1 where they differ by no more than `tolerance`; and a statistic of all."""
    both = [place for place in ours if place in theirs]
    one, other = [ours[place] for place in both], [theirs[place] for place in both]
    statistic = (
        {"rank_correlation": rank_correlation(one, other)}
        if tolerance
        else {"kappa": kappa(one, other)}
    )
    return {
        place: float(abs(ours[place] - theirs[place]) <= tolerance) for place in both
    }, statistic


def _parts(
    exchanges: Sequence[Exchange], values: Mapping[Place, float]
) -> list[tuple[float, float] | None]:
    """By conversation: (sum, number) over its turns."""
    of_each: list[list[float]] = [[] for _ in exchanges]
    for (place, _), value in values.items():
        of_each[place].append(value)
    return [(sum(found), float(len(found))) if found else None for found in of_each]


def _verdict(
    metrics: Sequence[Metric], found: Sequence[Verdicts], place: int
) -> ConversationScores:
    scores: dict[str, float | None] = {}
    why = []
    for metric, verdicts in zip(metrics, found, strict=False):
        of_turns = {turn: one for (at, turn), one in verdicts.items() if at == place}
        values = [one.value for one in of_turns.values() if one.value is not None]
        scores[metric.name] = sum(values) / len(values) if values else None
        for turn, one in of_turns.items():
            value = "none" if one.value is None else f"{one.value:g}"
            where = f"{metric.name}, turn {turn + 1}" if len(of_turns) > 1 else metric.name
            why.append(": ".join(part for part in (where, value, one.reason, one.shown) if part))
    return ConversationScores(scores, why)
