"""The evaluation stage: the evaluators of the chosen suites, on several models, side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cpt_merge.core.distributed import Ranks, joined
from cpt_merge.core.hub import model_directory
from cpt_merge.evaluation.chat_template import (
    ChatTemplate,
    check_prompts,
    first_template,
    read_chat_template,
    template_for,
)
from cpt_merge.evaluation.compare import (
    choose_baseline,
    compare_replies,
    metrics_by_evaluator,
    summarise,
)
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Exchange
from cpt_merge.evaluation.evaluators.evaluator import Evaluator, Findings, Subject
from cpt_merge.evaluation.generate.conversations import converse
from cpt_merge.evaluation.generate.engines import engine_for
from cpt_merge.evaluation.gpus import divide_gpus
from cpt_merge.evaluation.heldout import Text
from cpt_merge.evaluation.kept import KeptResults
from cpt_merge.evaluation.measured import Measured
from cpt_merge.evaluation.models import LanguageModel, shared_context
from cpt_merge.evaluation.outputs import report
from cpt_merge.evaluation.results import ModelResult, Sample, add_scores
from cpt_merge.evaluation.suites import Setup, check_judges, make_evaluators
from cpt_merge.tracking import Tracker


def evaluate(
    models: Mapping[str, str | Path],
    config: EvaluationConfig | None = None,
    *,
    text: Text | None = None,
    chat_template_from: str | Path | None = None,
    out: str | Path | None = None,
) -> dict[str, float]:
    """Evaluate models from Python, for instance in a notebook.

        config = EvaluationConfig(suites=["chat"], languages=["ko"])
        evaluate({"base": "base/", "merged": "merged/"}, config)

    `models` are directories or hub ids by the name under which they are shown; `config` is a
    recipe's `evaluation` section (default: its suite `form`, or `language` and `form` if there is
    text); `text` gives a file of held-out text by language, for bits per byte. Models without a
    chat template are prompted in that of `chat_template_from`, or of the first model that has one.
    Returns every metric as `model/language/metric` -> value; `out` gets results.json, samples.jsonl
    and figures as well. Raises `UserError` for whatever cannot be evaluated.
    """
    if config is None:
        config = EvaluationConfig(suites=["language", "form"] if text else ["form"])
    directories = {name: model_directory(str(path)) for name, path in models.items()}
    template = model_directory(str(chat_template_from)) if chat_template_from else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(out) if out is not None else Path(temporary) / "evaluation"
        return run(config, directories, text or {}, template, folder, Tracker())


def run(
    config: EvaluationConfig,
    models: Mapping[str, Path],
    text: Text,
    chat_template_from: Path | None,
    out: Path,
    tracker: Tracker,
    trained_on: int | None = None,
) -> dict[str, Any]:
    """Evaluate `models` (name -> Hugging Face directory, shown in this order) and write `out`.

    Models without a chat template are prompted in that of `chat_template_from`, or of the first
    model that has one. `trained_on` is the length of the sequences of continued pretraining, if it
    is known. Any number of processes may call this together; the results do not depend on
    how many. Rank 0 writes results.json, samples.jsonl and figures. Returns the metrics by
    `model/language/metric` on every rank.
    """
    baseline = choose_baseline(list(models), config.baseline)
    config.check_models(list(models))
    config.check_vllm()
    config.check_keys()
    context = shared_context(models, config.context, trained_on)
    config = config.model_copy(update={"context": context})
    setup = Setup(config, text)
    evaluators = make_evaluators(setup)
    chat = None
    if config.chat_template_kwargs or any(one.needs_template() for one in evaluators):
        chat = (
            read_chat_template(chat_template_from, config)
            if chat_template_from
            else first_template(models, config)
        )
        asked = [one for evaluator in evaluators for one in evaluator.conversations]
        check_prompts(models, chat, asked, config)
    check_judges(setup, evaluators)
    kept = KeptResults.of(config, text, chat, out)
    with joined() as ranks:
        found = []
        for name, directory in models.items():
            result = ranks.broadcast(partial(kept.read, name, directory))
            if result is None or result.failed:  # after a failure, its replies are evaluated again
                result = evaluate_model(name, directory, config, evaluators, chat, ranks, result)
                if ranks.is_main:
                    kept.keep(result, directory)
            found.append(result)
        found = compare_replies(found, evaluators, baseline, ranks)
    results = summarise(found, metrics_by_evaluator(evaluators), baseline, config.seed)
    if ranks.is_main:
        report(config, models, results, out, tracker)
        Measured.of(config, evaluators, results, models).write(out)
        if not results.failed:
            kept.clear()
    return results.flat()


def evaluate_model(
    name: str,
    directory: Path,
    config: EvaluationConfig,
    evaluators: Sequence[Evaluator],
    chat: ChatTemplate | None,
    ranks: Ranks,
    before: ModelResult | None = None,
) -> ModelResult:
    """Open one model, measure it and release it, so that memory holds one model at a time.

    All processes call this. If `before` is given, its replies are used.
    """
    gpus, ranks = divide_gpus(directory, config.gpus_per_model, ranks)
    model = LanguageModel.open(name, directory, gpus)
    template = template_for(model, directory, chat, config) if chat else None
    engine = engine_for(model, directory, gpus, ranks, config)
    try:
        return measure(Subject(engine, directory, template), config, evaluators, before)
    finally:
        engine.close()


def measure(
    subject: Subject,
    config: EvaluationConfig,
    evaluators: Sequence[Evaluator],
    before: ModelResult | None = None,
) -> ModelResult:
    """Let all evaluators measure a model in memory; their conversations are answered together.

    If `before` is given, its replies are used.
    """
    asked = [(one.name, conversation) for one in evaluators for conversation in one.conversations]
    exchanges: list[Exchange] = []
    speed = 0.0
    if before is not None:
        exchanges, speed = [sample.exchange for sample in before.samples], before.tokens_per_second
    elif asked and subject.template is not None:
        conversations = [conversation for _, conversation in asked]
        generation = converse(subject.engine, subject.template, conversations, config)
        exchanges, speed = generation.exchanges, generation.tokens_per_second
    samples = [
        Sample(name, exchange, {}, []) for (name, _), exchange in zip(asked, exchanges, strict=True)
    ]
    findings: dict[str, Findings] = {}
    for evaluator in sorted(evaluators, key=lambda one: not one.generates):
        if not evaluator.generates:
            subject.engine.close()  # what follows may need the memory for weights of its own
        read = [one for one in samples if evaluator.reads_all or one.evaluator == evaluator.name]
        found = evaluator.measure(subject, [sample.exchange for sample in read])
        add_scores(read, found)
        findings[evaluator.name] = found
    in_order = [findings[evaluator.name] for evaluator in evaluators]
    return ModelResult(subject.model.name, in_order, samples, speed)
