"""The evaluation stage: the evaluators of the recipe's suites, on several models, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cpt_merge.core.distributed import Ranks, joined
from cpt_merge.core.progress import timed
from cpt_merge.evaluation.chat_template import (
    ChatTemplate,
    check_prompts,
    first_template,
    read_chat_template,
    template_for,
)
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Exchange
from cpt_merge.evaluation.evaluators.evaluator import Evaluator, Findings, Subject
from cpt_merge.evaluation.generate.transformers import converse
from cpt_merge.evaluation.heldout import Text
from cpt_merge.evaluation.kept import KeptResults
from cpt_merge.evaluation.models import load_model, shared_context
from cpt_merge.evaluation.outputs import report
from cpt_merge.evaluation.results import ModelResult, Sample, choose_baseline, summarise
from cpt_merge.evaluation.suites import Setup, check_judges, make_evaluators
from cpt_merge.tracking import Tracker


def run(
    config: EvaluationConfig,
    models: Mapping[str, Path],
    text: Text,
    chat_template_from: Path | None,
    out: Path,
    tracker: Tracker,
) -> dict[str, Any]:
    """Evaluate `models` (name -> Hugging Face directory, in the order they are shown) and write `out`.

    Models without a chat template are asked in that of `chat_template_from`, or of the first model that has one. Any
    number of processes may call this together; the results do not depend on how many. Writes results.json,
    samples.jsonl and metrics (rank 0), and returns the metrics by `model/language/metric` (every rank).
    """
    choose_baseline(list(models), config.baseline)
    config = config.model_copy(update={"context": shared_context(models, config.context)})
    setup = Setup(config, text)
    evaluators = make_evaluators(setup)
    chat = None
    if any(evaluator.needs_template() for evaluator in evaluators):
        chat = (
            read_chat_template(chat_template_from) if chat_template_from else first_template(models)
        )
        check_prompts(
            models, chat, [asked for evaluator in evaluators for asked in evaluator.conversations()]
        )
    check_judges(setup, evaluators)
    kept = KeptResults.of(config, text, chat, out)
    with joined() as ranks:
        found = evaluate_models(models, config, evaluators, chat, ranks, kept)
        found = compare(found, evaluators, choose_baseline(list(models), config.baseline), ranks)
    results = summarise(found, evaluators, config.baseline, config.seed)
    if ranks.world.is_main:
        report(config, models, results, out, tracker)
        if not results.failed:
            kept.clear()
    return results.flat()


def evaluate_models(
    models: Mapping[str, Path],
    config: EvaluationConfig,
    evaluators: Sequence[Evaluator],
    chat: ChatTemplate | None,
    ranks: Ranks,
    kept: KeptResults,
) -> list[ModelResult]:
    """What is found of each model, or was found by an evaluation that was cut short.

    Where an endpoint failed then, all is measured again, of the replies that are there.
    """
    found = []
    for name, directory in models.items():
        result = ranks.broadcast(partial(kept.read, name, directory))
        if result is None or result.failed:
            result = evaluate_model(name, directory, config, evaluators, chat, ranks, result)
            if ranks.world.is_main:
                kept.keep(result, directory)
        found.append(result)
    return found


def evaluate_model(
    name: str,
    directory: Path,
    config: EvaluationConfig,
    evaluators: Sequence[Evaluator],
    chat: ChatTemplate | None,
    ranks: Ranks,
    before: ModelResult | None = None,
) -> ModelResult:
    """One model, on every process. It is loaded here and gone afterwards, so that memory holds one at a time.

    The replies of `before` are taken where it is given.
    """
    with timed(f"{name}: loading {directory}"):
        loaded = load_model(name, directory, ranks.world.local_rank)
    template = template_for(loaded, directory, chat) if chat else None
    subject = Subject(loaded, directory, ranks, template.marks if template else ())
    return measure(subject, template, config, evaluators, before)


def measure(
    subject: Subject,
    template: ChatTemplate | None,
    config: EvaluationConfig,
    evaluators: Sequence[Evaluator],
    before: ModelResult | None = None,
) -> ModelResult:
    """All evaluators of a model that is in memory: what they ask is answered together, and each makes its metrics of it.

    `template` is how it is spoken to; None if no evaluator needs one. If `before` is given, its replies are used.
    """
    subject = replace(subject, template=template)
    asked = {evaluator.name: evaluator.conversations() for evaluator in evaluators}
    conversations = [
        conversation for of_evaluator in asked.values() for conversation in of_evaluator
    ]
    exchanges: list[Exchange] = []
    speed = 0.0
    if before is not None:
        exchanges, speed = [sample.exchange for sample in before.samples], before.tokens_per_second
    elif conversations and template is not None:
        generation = converse(subject.loaded, template, conversations, config, subject.ranks)
        exchanges, speed = generation.exchanges, generation.tokens_per_second
    places = _places(asked)
    findings = [
        evaluator.measure(
            subject,
            exchanges
            if evaluator.reads_all
            else [exchanges[place] for place in places[evaluator.name]],
        )
        for evaluator in evaluators
    ]
    return ModelResult(
        subject.loaded.name, findings, _samples(evaluators, findings, places, exchanges), speed
    )


def compare(
    found: Sequence[ModelResult], evaluators: Sequence[Evaluator], baseline: str, ranks: Ranks
) -> list[ModelResult]:
    """The results, with what evaluators find of a model's replies beside the baseline's."""
    theirs = next(result for result in found if result.name == baseline)
    return [
        result if result is theirs else _compared(result, theirs, evaluators, ranks)
        for result in found
    ]


def _compared(
    result: ModelResult, baseline: ModelResult, evaluators: Sequence[Evaluator], ranks: Ranks
) -> ModelResult:
    findings = list(result.findings)
    for evaluator in evaluators:
        samples, theirs = result.samples_of(evaluator.name), baseline.samples_of(evaluator.name)
        compared = evaluator.compare(
            ranks, [one.exchange for one in samples], [one.exchange for one in theirs]
        )
        if compared is not None:
            findings.append(compared)
            _add_verdicts(samples, compared)
    return replace(result, findings=findings)


def _add_verdicts(samples: Sequence[Sample], findings: Findings) -> None:
    for sample, verdict in zip(samples, findings.verdicts, strict=bool(findings.verdicts)):
        sample.scores.update(verdict.scores)
        sample.why.extend(verdict.why)


def _places(asked: Mapping[str, Sequence[Any]]) -> dict[str, range]:
    """Where each evaluator's conversations are among all."""
    places, start = {}, 0
    for name, conversations in asked.items():
        places[name] = range(start, start + len(conversations))
        start += len(conversations)
    return places


def _samples(
    evaluators: Sequence[Evaluator],
    findings: Sequence[Findings],
    places: Mapping[str, range],
    exchanges: Sequence[Exchange],
) -> list[Sample]:
    """A sample per conversation, with the verdicts of its own evaluator and of those that read all."""
    samples = [
        Sample(name, exchanges[place], {}, [])
        for name, of_evaluator in places.items()
        for place in of_evaluator
    ]
    for evaluator, found in zip(evaluators, findings, strict=True):
        judged = (
            samples if evaluator.reads_all else [samples[place] for place in places[evaluator.name]]
        )
        _add_verdicts(judged, found)
    return samples
