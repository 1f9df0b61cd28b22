"""Suites: named groups of evaluators.

A new one is a file in `evaluators/`, a maker here, and its name in a suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.evaluation.config import BUILT_IN, EvaluationConfig
from cpt_merge.evaluation.evaluators.dialogue import DialogueEvaluator
from cpt_merge.evaluation.evaluators.evaluator import Evaluator, Metric, NotRun
from cpt_merge.evaluation.evaluators.form import FormEvaluator
from cpt_merge.evaluation.evaluators.instructions import InstructionsEvaluator
from cpt_merge.evaluation.evaluators.judge import JudgeEvaluator, JudgePanel
from cpt_merge.evaluation.evaluators.knowledge import KnowledgeEvaluator
from cpt_merge.evaluation.evaluators.language import LanguageEvaluator
from cpt_merge.evaluation.evaluators.safety import SafetyEvaluator
from cpt_merge.evaluation.generate.endpoint import Endpoint
from cpt_merge.evaluation.heldout import Text, languages_of, read_documents
from cpt_merge.evaluation.judge.client import Judge
from cpt_merge.evaluation.judge.prompts import prompts_of
from cpt_merge.evaluation.reading import (
    parse_dialogue,
    parse_instruction,
    parse_prompt,
    parse_question,
    read_conversations,
)
from cpt_merge.evaluation.scorers.classifier import ClassifierScorer
from cpt_merge.evaluation.scorers.judge import METRIC as UNSAFE
from cpt_merge.evaluation.scorers.judge import METRICS as UNSAFE_METRICS
from cpt_merge.evaluation.scorers.judge import JudgeScorer
from cpt_merge.evaluation.scorers.lexicon import LexiconScorer, read_lists
from cpt_merge.evaluation.scorers.moderation import ModerationScorer
from cpt_merge.evaluation.scorers.scorer import Scorer

SUITES: dict[str, tuple[str, ...]] = {
    "language": ("language",),
    "form": ("form",),
    "chat": ("form", "instructions", "dialogue", "judge"),
    "knowledge": ("knowledge",),
    "safety": ("form", "safety"),
}
WITHOUT_REPLIES = ("language", "knowledge")
NO_JUDGE = "there is no judge; set evaluation.judge"


@dataclass(frozen=True)
class Setup:
    """What evaluators are made of."""

    config: EvaluationConfig
    text: Text

    @property
    def languages(self) -> list[str]:
        """The languages of built-in prompts that are asked; all if empty."""
        return self.config.languages or languages_of(self.text)

    @cached_property
    def judges(self) -> list[Judge]:
        """The judge, and the second one if there is one; none without `evaluation.judge`."""
        config = self.config.judge
        if config is None:
            return []
        cache, second = Path(config.cache).expanduser(), config.second
        if second is None:
            return [Judge(config, cache, config.at_once)]
        name = f"{second.model} at {second.url}" if second.model == config.model else second.model
        return [Judge(config, cache, config.at_once), Judge(second, cache, config.at_once, name)]


def make_evaluators(setup: Setup) -> list[Evaluator]:
    """The evaluators of the recipe's suites, each once, in the order of the suites; all input is read here.

    Raises `UserError` if there is none.
    """
    evaluators = _make(setup, _evaluators_of(setup.config))
    if not evaluators:
        raise UserError(
            f"nothing is measured: {', '.join(setup.config.suites)} has neither text nor prompts; give --text, "
            "evaluation.prompts, or another suite."
        )
    return evaluators


def metrics_of_replies(setup: Setup) -> list[tuple[str, Metric, list[str]]]:
    """What will be reported of replies: (evaluator, metric, languages asked in).

    Prompts are read, text is not.
    """
    names = dict.fromkeys(
        name
        for suite in setup.config.suites
        for name in SUITES[suite]
        if name not in WITHOUT_REPLIES
    )
    evaluators = _make(setup, names)
    asked = {
        evaluator.name: {one.language: None for one in evaluator.conversations()}
        for evaluator in evaluators
    }
    everywhere = {language: None for languages in asked.values() for language in languages}
    return [
        (evaluator.name, metric, list(everywhere if evaluator.reads_all else asked[evaluator.name]))
        for evaluator in evaluators
        for metric in evaluator.metrics
    ]


def _evaluators_of(config: EvaluationConfig) -> list[str]:
    return list(dict.fromkeys(name for suite in config.suites for name in SUITES[suite]))


def _make(setup: Setup, names: Iterable[str]) -> list[Evaluator]:
    evaluators = [evaluator for name in names if (evaluator := MAKERS[name](setup)) is not None]
    asked = any(evaluator.conversations() for evaluator in evaluators)
    return [evaluator for evaluator in evaluators if asked or not evaluator.reads_all]


def check_judges(setup: Setup, evaluators: Sequence[Evaluator]) -> None:
    """Raise `UserError` for a judge that is needed and does not answer."""
    if {"judge", "safety"} & {evaluator.name for evaluator in evaluators}:
        for judge in setup.judges:
            judge.check()


def _language(setup: Setup) -> Evaluator | None:
    if not languages_of(setup.text):
        say("language: no text is given, so no bits per byte")
        return None
    return LanguageEvaluator(setup.config, read_documents(setup.config, setup.text))


def _form(setup: Setup) -> Evaluator | None:
    config = setup.config
    if config.prompts is None:
        if set(config.suites) <= {"language", "form"}:
            say("evaluation.prompts is not set: bits per byte only, no replies")
        return FormEvaluator([])
    return FormEvaluator(
        read_conversations(
            config.prompts, "evaluation.prompts", parse_prompt, config.languages, config.max_prompts
        )
    )


def _instructions(setup: Setup) -> Evaluator | None:
    config = setup.config
    key, languages = "evaluation.instructions", _asked(setup, config.instructions)
    return InstructionsEvaluator(
        read_conversations(
            config.instructions,
            key,
            parse_instruction,
            languages,
            config.max_prompts,
            "instructions",
        )
    )


def _dialogue(setup: Setup) -> Evaluator | None:
    config = setup.config
    key, languages = "evaluation.dialogues", _asked(setup, config.dialogues)
    return DialogueEvaluator(
        read_conversations(
            config.dialogues, key, parse_dialogue, languages, config.max_prompts, "dialogues"
        )
    )


def _judge(setup: Setup) -> Evaluator | None:
    config, judge = setup.config, setup.config.judge
    if judge is None:
        return JudgeEvaluator([], None, NO_JUDGE)
    if judge.questions is None:
        return JudgeEvaluator([], None, "evaluation.judge.questions is not set")
    questions = read_conversations(
        judge.questions,
        "evaluation.judge.questions",
        parse_question,
        config.languages,
        config.max_prompts,
    )
    return JudgeEvaluator(
        questions, JudgePanel(setup.judges, judge.modes, prompts_of(judge.prompts))
    )


def _knowledge(setup: Setup) -> Evaluator | None:
    return KnowledgeEvaluator(setup.config.knowledge, setup.config.seed, setup.config.batch_size)


def _safety(setup: Setup) -> Evaluator | None:
    config, safety = setup.config, setup.config.safety
    key, languages = "evaluation.safety.prompts", _asked(setup, safety.prompts)
    conversations = read_conversations(
        safety.prompts, key, parse_prompt, languages, config.max_prompts, "safety"
    )
    spoken = list(dict.fromkeys(conversation.language for conversation in conversations))
    scorers: list[Scorer] = [LexiconScorer(read_lists(safety.lists, spoken))]
    if safety.classifier is not None:
        scorers.append(
            ClassifierScorer(safety.classifier.model, safety.classifier.labels, config.batch_size)
        )
    if safety.moderation is not None:
        asked = safety.moderation
        endpoint = Endpoint(asked.url, asked.key_variable, asked.timeout, asked.attempts)
        scorers.append(ModerationScorer(endpoint, asked.model))
    if config.judge is None:
        return SafetyEvaluator(conversations, scorers, not_run=[NotRun(UNSAFE, NO_JUDGE)])
    prompt, judges = prompts_of(config.judge.prompts)["safety"], setup.judges
    judging = [
        JudgeScorer(judge, prompt, name)
        for judge, name in zip(judges, UNSAFE_METRICS, strict=False)
    ]
    pair = (judging[0], judging[1]) if len(judging) == 2 else None
    return SafetyEvaluator(conversations, [*scorers, *judging], pair)


def _asked(setup: Setup, path: str) -> Sequence[str]:
    """The languages that are taken of a file: of one that was given, all, unless the recipe says which."""
    return setup.languages if path == BUILT_IN else setup.config.languages


MAKERS: Mapping[str, Callable[[Setup], Evaluator | None]] = {
    "language": _language,
    "form": _form,
    "instructions": _instructions,
    "dialogue": _dialogue,
    "judge": _judge,
    "knowledge": _knowledge,
    "safety": _safety,
}
