"""The form of a reply: what can be checked whatever the prompt was.

`chat`, the headline, is the share of replies that end by themselves, are in the language that was
asked for, and keep the chat format. Each is a property of the reply alone, without a baseline. They
tell whether a model behaves like a chat model in the language, not whether what it says is true or
helpful.

This evaluator asks `evaluation.prompts` if it is set, and reads the replies to all other prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cpt_merge.evaluation.conversation import ANY_LANGUAGE, Exchange, Reply
from cpt_merge.evaluation.evaluators.evaluator import (
    ConversationScores,
    Evaluator,
    Findings,
    Metric,
    Subject,
    shares_of_exchanges,
)
from cpt_merge.evaluation.repetition import repetition
from cpt_merge.evaluation.reply_language import is_in_language

METRICS = (
    Metric(
        "chat",
        "chat",
        "replies that end by themselves, are in the language asked for and keep the chat format",
    ),
    Metric("stopped", "stopped", "replies that the model ended itself, before a limit"),
    Metric("in_language", "in language", "replies in the language and script asked for"),
    Metric("keeps_format", "format", "replies with text and without a mark of the chat template"),
    Metric(
        "repetition",
        "repetition",
        "runs of six words that occurred in the reply before",
        rising=False,
    ),
    Metric("empty", "empty", "replies without any text", rising=False),
)


class FormEvaluator(Evaluator):
    """The form of every reply."""

    name = "form"
    metrics = METRICS
    reads_all = True

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """Shares of all replies; a conversation counts with each of its replies."""
        forms = [forms_of(exchange, subject.marks) for exchange in exchanges]
        measurements = []
        for metric in METRICS:
            parts = [
                (sum(form[metric.name] for form in found), float(len(found))) for found in forms
            ]
            measurements += shares_of_exchanges(metric, exchanges, parts)
        return Findings(measurements, [ConversationScores(mean_values(found)) for found in forms])


def forms_of(exchange: Exchange, marks: Sequence[str]) -> list[dict[str, float]]:
    """The form of each reply in a conversation."""
    return [
        form_of(reply, exchange.conversation.reply_language(turn), marks)
        for turn, reply in enumerate(exchange.replies)
    ]


def mean_values(forms: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over a conversation."""
    return {name: sum(form[name] for form in forms) / len(forms) for name in forms[0]}


def form_of(reply: Reply, language: str, marks: Sequence[str]) -> dict[str, float]:
    """Every metric of a reply that should be in `language` or `any`; `marks` are the template's."""
    text, empty = reply.text, not reply.text.strip()
    in_language = not empty if language == ANY_LANGUAGE else is_in_language(text, language)
    keeps_format = not empty and not any(mark in text for mark in marks)
    return {
        "chat": float(reply.stopped and in_language and keeps_format),
        "stopped": float(reply.stopped),
        "in_language": float(in_language),
        "keeps_format": float(keeps_format),
        "repetition": repetition(text),
        "empty": float(empty),
    }
