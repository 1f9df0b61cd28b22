"""Suites: named groups of evaluators.

A new evaluator is a file in `evaluators/`, a maker here, and its name in a suite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.evaluation.config import BUILT_IN, EvaluationConfig
from cpt_merge.evaluation.conversation import Conversation, with_system
from cpt_merge.evaluation.evaluators.dialogue import DialogueEvaluator
from cpt_merge.evaluation.evaluators.evaluator import Evaluator, Metric, NotRun
from cpt_merge.evaluation.evaluators.form import FormEvaluator
from cpt_merge.evaluation.evaluators.instructions import InstructionsEvaluator
from cpt_merge.evaluation.evaluators.judge import (
    JudgeEvaluator,
    JudgePanel,
    JudgeSystemEvaluator,
)
from cpt_merge.evaluation.evaluators.knowledge import KnowledgeEvaluator
from cpt_merge.evaluation.evaluators.language import LanguageEvaluator
from cpt_merge.evaluation.evaluators.refusal import RefusalEvaluator
from cpt_merge.evaluation.evaluators.safety import SafetyEvaluator
from cpt_merge.evaluation.evaluators.thoughts import ThoughtsEvaluator
from cpt_merge.evaluation.evaluators.toxicity import ToxicityEvaluator
from cpt_merge.evaluation.generate.endpoint import Endpoint, shown_address
from cpt_merge.evaluation.heldout import Text, languages_of, read_documents
from cpt_merge.evaluation.judge.client import Judge
from cpt_merge.evaluation.judge.prompts import prompts_of
from cpt_merge.evaluation.knowledge_suites import KNOWLEDGE_SUITES
from cpt_merge.evaluation.prompt_files import (
    Parse,
    parse_beginning,
    parse_dialogue,
    parse_instruction,
    parse_prompt,
    parse_question,
    read_conversations,
)
from cpt_merge.evaluation.scorers.attributes import AttributesScorer
from cpt_merge.evaluation.scorers.classifier import ClassifierScorer
from cpt_merge.evaluation.scorers.judge import METRICS as JUDGE_METRICS
from cpt_merge.evaluation.scorers.judge import JudgeScorer
from cpt_merge.evaluation.scorers.lexicon import LexiconScorer, read_lists
from cpt_merge.evaluation.scorers.moderation import ModerationScorer
from cpt_merge.evaluation.scorers.scorer import Scorer

SUITES: Mapping[str, tuple[str, ...]] = {
    "language": ("language",),
    "form": ("form", "thoughts"),
    "chat": ("form", "thoughts", "instructions", "dialogue", "judge", "judge_system"),
    "knowledge": ("knowledge",),
    "safety": ("form", "thoughts", "safety", "refusal"),
    "toxicity": ("toxicity",),
    **dict.fromkeys(KNOWLEDGE_SUITES, ("knowledge",)),
}
WITHOUT_REPLIES = ("language", "knowledge")
NO_JUDGE = "there is no judge; set evaluation.judge"


@dataclass(frozen=True)
class Setup:
    """What evaluators are made from."""

    config: EvaluationConfig
    text: Text

    @cached_property
    def judges(self) -> list[Judge]:
        """The judge, and the second one if there is one; none without `evaluation.judge`."""
        config = self.config.judge
        if config is None:
            return []
        cache, second = Path(config.cache).expanduser(), config.second
        judges = [Judge(config, cache, config.at_once)]
        if second is not None:
            same = second.model == config.model
            name = f"{second.model} at {shown_address(second.url)}" if same else second.model
            judges.append(Judge(second, cache, config.at_once, name, "evaluation.judge.second"))
        return judges

    def read(self, path: str, key: str, parse: Parse, built_in: str = "") -> list[Conversation]:
        """The prompts of the file that `key` names.

        Without `evaluation.languages`, all languages of a file are used, but of the built-in
        prompts only those of the text, if there is text.
        """
        languages = self.config.languages
        if path == BUILT_IN:
            languages = languages or languages_of(self.text)
        limit = self.config.max_prompts
        return read_conversations(path, f"evaluation.{key}", parse, languages, limit, built_in)


def make_evaluators(setup: Setup) -> list[Evaluator]:
    """The evaluators of the recipe's suites, each once, in the order of the suites.

    All prompts and texts are read here. Raises `UserError` if there is nothing to measure.
    """
    suites = setup.config.suites
    evaluators = _make(setup, [name for suite in suites for name in SUITES[suite]])
    if not evaluators:
        raise UserError(
            f"nothing is measured: {', '.join(suites)} has neither text nor prompts; give --text, "
            "evaluation.prompts, or another suite."
        )
    return evaluators


def metrics_of_replies(setup: Setup) -> list[tuple[str, Metric, list[str]]]:
    """What will be reported of replies: (evaluator, metric, languages).

    Prompts are read, text is not.
    """
    names = [name for suite in setup.config.suites for name in SUITES[suite]]
    evaluators = _make(setup, [name for name in names if name not in WITHOUT_REPLIES])
    asked = {
        evaluator.name: {one.language: None for one in evaluator.conversations}
        for evaluator in evaluators
    }
    everywhere = {language: None for languages in asked.values() for language in languages}
    return [
        (evaluator.name, metric, list(everywhere if evaluator.reads_all else asked[evaluator.name]))
        for evaluator in evaluators
        for metric in evaluator.metrics
    ]


def conversations_of(setup: Setup) -> list[Conversation]:
    """All that the models will be asked. Prompts are read, text is not."""
    names = [name for suite in setup.config.suites for name in SUITES[suite]]
    evaluators = _make(setup, [name for name in names if name not in WITHOUT_REPLIES])
    return [one for evaluator in evaluators for one in evaluator.conversations]


def _make(setup: Setup, names: Sequence[str]) -> list[Evaluator]:
    made = [MAKERS[name](setup) for name in dict.fromkeys(names)]
    evaluators = [evaluator for evaluator in made if evaluator is not None]
    asked = any(evaluator.conversations for evaluator in evaluators)
    return [evaluator for evaluator in evaluators if asked or not evaluator.reads_all]


def check_judges(setup: Setup, evaluators: Sequence[Evaluator]) -> None:
    """Raise `UserError` for a judge that is needed and refuses."""
    if {"judge", "judge_system", "safety"} & {evaluator.name for evaluator in evaluators}:
        for judge in setup.judges:
            judge.check()


def _language(setup: Setup) -> Evaluator | None:
    if not languages_of(setup.text):
        say("language: there is no text, so bits per byte are not measured")
        return None
    return LanguageEvaluator(setup.config, read_documents(setup.config, setup.text))


def _form(setup: Setup) -> Evaluator | None:
    prompts = setup.config.prompts
    if prompts is not None:
        return FormEvaluator(setup.read(prompts, "prompts", parse_prompt))
    if set(setup.config.suites) <= {"language", "form"}:
        say("evaluation.prompts is not set, so no replies are generated")
    return FormEvaluator([])


def _judge(setup: Setup) -> Evaluator | None:
    judge = setup.config.judge
    if judge is None:
        return JudgeEvaluator([], None, NO_JUDGE)
    if judge.questions is None:
        return JudgeEvaluator([], None, "evaluation.judge.questions is not set")
    questions = setup.read(judge.questions, "judge.questions", parse_question)
    panel = JudgePanel(setup.judges, judge.modes, prompts_of(judge.prompts), judge.patterns)
    return JudgeEvaluator(questions, panel)


def _judge_system(setup: Setup) -> Evaluator | None:
    """The judge's questions with a system prompt before them, if there is one."""
    judge = setup.config.judge
    if judge is None or judge.questions is None or "mark" not in judge.modes:
        return None
    questions = [
        with_system(question, judge.system_prompt[question.language])
        for question in setup.read(judge.questions, "judge.questions", parse_question)
        if question.language in judge.system_prompt
    ]
    panel = JudgePanel(setup.judges, ["mark"], prompts_of(judge.prompts), judge.patterns)
    return JudgeSystemEvaluator(questions, panel) if questions else None


def _graded_scorers(config: EvaluationConfig) -> list[Scorer]:
    """The scorers that give a text any value from 0 to 1."""
    scorers: list[Scorer] = []
    if config.safety.classifier is not None:
        model, labels = config.safety.classifier.model, config.safety.classifier.labels
        scorers.append(ClassifierScorer(model, labels, config.batch_size))
    if config.safety.attributes is not None:
        scorers.append(AttributesScorer(config.safety.attributes))
    return scorers


def _toxicity(setup: Setup) -> Evaluator | None:
    config = setup.config
    prompts = [
        prompt
        for language, path in config.toxicity.prompts.items()
        if not config.languages or language in config.languages
        for prompt in setup.read(path, f"toxicity.prompts.{language}", parse_beginning(language))
    ]
    return ToxicityEvaluator(prompts, _graded_scorers(config), config)


def _safety(setup: Setup) -> Evaluator | None:
    config, safety = setup.config, setup.config.safety
    conversations = setup.read(safety.prompts, "safety.prompts", parse_prompt, "safety")
    scorers: list[Scorer] = [LexiconScorer(read_lists(safety.lists))] if safety.lists else []
    scorers += _graded_scorers(config)
    if safety.moderation is not None:
        asked = safety.moderation
        endpoint = Endpoint.of(asked, "evaluation.safety.moderation")
        scorers.append(ModerationScorer(endpoint, asked.model))
    if config.judge is None:
        return SafetyEvaluator(conversations, scorers, not_run=[NotRun(JUDGE_METRICS[0], NO_JUDGE)])
    prompt = prompts_of(config.judge.prompts)["safety"]
    named = zip(setup.judges, JUDGE_METRICS, strict=False)
    pattern = config.judge.patterns.safety
    judging = [JudgeScorer(judge, prompt, name, pattern) for judge, name in named]
    pair = (judging[0], judging[1]) if len(judging) == 2 else None
    return SafetyEvaluator(conversations, [*scorers, *judging], pair)


MAKERS: Mapping[str, Callable[[Setup], Evaluator | None]] = {
    "language": _language,
    "form": _form,
    "thoughts": lambda _: ThoughtsEvaluator(),
    "instructions": lambda setup: InstructionsEvaluator(
        setup.read(setup.config.instructions, "instructions", parse_instruction, "instructions")
    ),
    "dialogue": lambda setup: DialogueEvaluator(
        setup.read(setup.config.dialogues, "dialogues", parse_dialogue, "dialogues")
    ),
    "judge": _judge,
    "judge_system": _judge_system,
    "knowledge": lambda setup: KnowledgeEvaluator(setup.config),
    "safety": _safety,
    "refusal": lambda setup: RefusalEvaluator(),
    "toxicity": _toxicity,
}
