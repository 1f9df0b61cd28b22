"""The evaluation stage: bits per byte and chat facets of several models, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.progress import say, timed
from core.sources import Corpus
from evaluation.bits_per_byte import measure_documents
from evaluation.chat_template import ChatTemplate, read_chat_template, render, template_for
from evaluation.config import EvaluationConfig
from evaluation.division import Division, divided_work
from evaluation.facets import judge
from evaluation.generate import generate
from evaluation.models import LoadedModel, load_model, shared_context
from evaluation.prompts import Prompt, heldout_documents, read_prompts
from evaluation.report import flat, report
from evaluation.results import ModelResult, Sample, score
from tracking import Tracker


def run(
    config: EvaluationConfig,
    models: Mapping[str, Path],
    corpus: Corpus,
    chat_template_from: Path,
    out: Path,
    tracker: Tracker,
) -> dict[str, Any]:
    """Evaluate `models` (name -> Hugging Face directory, in the order they are shown) and write `out`.

    Models without a chat template are asked in that of `chat_template_from`. Any number of processes may call this
    together; the results do not depend on how many. Writes results.json, samples.jsonl and figures (rank 0), and
    returns the figures by `model/language/figure` (every rank).
    """
    config = config.model_copy(update={"context": shared_context(models, config.context)})
    prompts = read_prompts(config)
    documents = heldout_documents(config, corpus)
    chat = read_chat_template(chat_template_from) if prompts else None
    if not prompts:
        say("evaluation.prompts is not set: bits per byte only, no replies")
    with divided_work() as division:
        results = [
            evaluate_model(name, directory, config, documents, prompts, chat, division)
            for name, directory in models.items()
        ]
    scores = score(results, config.seed)
    if division.world.is_main:
        report(config, models, results, scores, out, tracker)
    return flat(scores)


def evaluate_model(
    name: str,
    directory: Path,
    config: EvaluationConfig,
    documents: Mapping[str, list[str]],
    prompts: list[Prompt],
    chat: ChatTemplate | None,
    division: Division,
) -> ModelResult:
    """One model, on every process. It is loaded here and gone afterwards, so that memory holds one at a time."""
    with timed(f"{name}: loading {directory}"):
        loaded = load_model(name, directory, division.world.local_rank)
    bits = {
        language: measure_documents(loaded, texts, config, division, f"{name}: bits per byte, {language}")
        for language, texts in documents.items()
    }
    if chat is None:
        return ModelResult(name, bits, [], 0.0)
    samples, speed = ask(loaded, template_for(loaded, directory, chat), prompts, config, division)
    return ModelResult(name, bits, samples, speed)


def ask(
    loaded: LoadedModel, template: ChatTemplate, prompts: list[Prompt], config: EvaluationConfig, division: Division
) -> tuple[list[Sample], float]:
    """Put every prompt to a model and judge the replies. Returns the samples, and generated tokens per second."""
    texts = [render(loaded.tokenizer, template.template, prompt.messages) for prompt in prompts]
    generation = generate(loaded, texts, template.end_tokens, config, division)
    samples = [
        Sample(prompt, reply, judge(reply, prompt.language, template.marks))
        for prompt, reply in zip(prompts, generation.replies, strict=True)
    ]
    return samples, generation.tokens_per_second
