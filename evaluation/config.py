"""The recipe's `evaluation` section."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, Literal

import regex
from pydantic import ValidationInfo, field_validator

from cpt_merge.core.config import Section, key
from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language

Suite = Literal["language", "form", "chat", "knowledge", "safety"]
BUILT_IN = "built-in"


class ClassifierConfig(Section):
    """A text classification model of the Hugging Face kind."""

    model: str = key(..., "directory or hub id of a sequence classification model")
    labels: list[str] = key(["toxic"], "its labels that count as toxic", min_length=1)


class ModerationConfig(Section):
    """An OpenAI-compatible moderation endpoint (POST URL/moderations)."""

    url: str = key(
        ..., "base of the endpoint, such as https://api.openai.com/v1", pattern="^https?://"
    )
    model: str = key(..., "name of the moderation model")
    key_variable: str = key(
        "OPENAI_API_KEY", "environment variable that holds the key; without it none is sent"
    )
    timeout: float = key(30.0, "longest wait for one answer", unit="seconds", gt=0)
    attempts: int = key(
        5, "attempts at one reply, with growing pauses; then the endpoint counts as dead", ge=1
    )


class SafetyConfig(Section):
    """What is asked for safety's sake, and who scores the replies."""

    prompts: str = key(
        BUILT_IN,
        'jsonl file of prompts, {"language", "messages", "category"} a line; built-in: a few that provoke',
    )
    lists: dict[str, str] = key(
        {}, "word list of a language instead of the built-in one, a file with a word a line"
    )
    classifier: ClassifierConfig | None = key(None, "a classification model that scores as well")
    moderation: ModerationConfig | None = key(None, "a moderation endpoint that scores as well")


class PriceConfig(Section):
    """What tokens cost, in any currency."""

    prompt: float = key(..., "of what is sent", unit="per million tokens", ge=0)
    completion: float = key(..., "of what is answered", unit="per million tokens", ge=0)


class JudgePromptsConfig(Section):
    """What a judge is asked, instead of the built-in prompts (evaluation/judge/prompts.py)."""

    mark: str | None = key(
        None,
        "for a mark: text with {conversation}, {language}, {reference}; the answer ends with a line SCORE: 7",
    )
    comparison: str | None = key(
        None,
        "for a comparison: text with {conversation_a}, {conversation_b}, ...; it ends with VERDICT: A, B or tie",
    )
    safety: str | None = key(
        None,
        "for safety: text with {conversation}, {language}; it ends with VERDICT: safe or unsafe",
    )

    @field_validator("mark", "comparison", "safety")
    @classmethod
    def _shows_the_replies(cls, prompt: str | None, info: ValidationInfo) -> str | None:
        needed = (
            ["{conversation_a}", "{conversation_b}"]
            if info.field_name == "comparison"
            else ["{conversation}"]
        )
        missing = [name for name in needed if prompt is not None and name not in prompt]
        if missing:
            raise ValueError(f"it has no {' and '.join(missing)}; say where they belong")
        return prompt


class JudgeEndpointConfig(Section):
    """A language model behind an OpenAI-compatible endpoint (POST URL/chat/completions)."""

    url: str = key(
        ..., "base of the endpoint, such as http://localhost:8000/v1", pattern="^https?://"
    )
    model: str = key(..., "name of the model that judges", min_length=1)
    key_variable: str = key(
        "OPENAI_API_KEY", "environment variable that holds the key; without it none is sent"
    )
    timeout: float = key(120.0, "longest wait for one answer", unit="seconds", gt=0)
    attempts: int = key(
        5, "attempts at one prompt, with growing pauses; then the endpoint counts as dead", ge=1
    )
    request: dict[str, Any] = key(
        {"temperature": 0, "max_tokens": 1024}, "further fields of every request"
    )
    price: PriceConfig | None = key(None, "what tokens cost; without it no cost is reported")


class JudgeConfig(JudgeEndpointConfig):
    """A judge of replies, and what it judges."""

    questions: str | None = key(
        None,
        'chat: jsonl file of open questions, {"language", "turns": ["..."], "category", "reference"} a line',
    )
    modes: list[Literal["mark", "comparison"]] = key(
        ["mark"], "mark: 1 to 10 for each reply; comparison: with the baseline's replies, both in either place",
        min_length=1,
    )  # fmt: skip
    prompts: JudgePromptsConfig = key(JudgePromptsConfig(), "prompts")
    second: JudgeEndpointConfig | None = key(
        None, "a second judge that is asked the same: do the two agree?"
    )
    at_once: int = key(
        8, "requests of one process that wait for an answer together", unit="requests", ge=1
    )
    cache: str = key("~/.cache/cpt-merge/judge", "folder where answers are kept, by what was asked")


class KnowledgeConfig(Section):
    """Tasks of lm-eval; they need the extra `eval`."""

    tasks: dict[str, str] = key(
        {}, "lm-eval's tasks or groups, each with its language: {kmmlu: ko, mmlu: en}"
    )
    folder: str | None = key(None, "folder with further tasks, in lm-eval's YAML format")
    few_shot: int | None = key(
        None, "examples before a question; if not set: as many as the task says", ge=0
    )
    limit: int | None = key(
        None, "questions of each task, the first ones; if not set: all", unit="questions", gt=0
    )
    chat_template: bool = key(
        False, "ask in the chat template, examples as turns; false: plain text, as for base models"
    )

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: dict[str, str]) -> dict[str, str]:
        return dict(zip(tasks, known_languages(tasks.values()), strict=True))

    def check_installed(self) -> None:
        """Raises `UserError` if there are tasks and no lm-eval."""
        if self.tasks and find_spec("lm_eval") is None:
            raise UserError(
                "evaluation.knowledge needs lm-eval, which is not installed; "
                "run pip install -c constraints.txt -e '.[eval]', or leave out the suite."
            )


def known_languages(tags: Iterable[str]) -> list[str]:
    """The tags as they are written here. Raises `ValueError` for one that is not known."""
    try:
        return [find_language(tag).tag for tag in tags]
    except UserError as error:
        raise ValueError(str(error)) from None


OF_A_RECIPE = frozenset(("base", "chat", "cpt", "merged"))


class EvaluationConfig(Section):
    """What the models are asked, and how much text they are measured on."""

    suites: list[Suite] = key(
        ["language", "form"],
        "language: bits per byte of held-out text; form: do replies stop, stay in the language, keep the chat format; "
        "chat: form, instructions, dialogues, and open questions for a judge; "
        "knowledge: tasks of lm-eval; safety: form, and toxicity of replies that were provoked",
        min_length=1,
    )
    languages: list[str] = key(
        [],
        "languages that are asked about; if not set: the corpus's, of the built-in prompts, and all of a file",
    )
    prompts: str | None = key(
        None,
        'form, chat: jsonl file of prompts, {"language": "ko", "messages": [...]} a line; asked for their form',
    )
    instructions: str = key(
        BUILT_IN,
        'chat: jsonl file of prompts with checks, {"language", "messages", "checks"} a line; or built-in',
    )
    dialogues: str = key(
        BUILT_IN,
        'chat: jsonl file of dialogues, {"language", "turns": [{"user", "checks"}]} a line; or built-in',
    )
    safety: SafetyConfig = key(SafetyConfig(), "safety")
    knowledge: KnowledgeConfig = key(KnowledgeConfig(), "knowledge")
    judge: JudgeConfig | None = key(
        None, "chat: who marks or compares replies to open questions; safety: who calls them unsafe"
    )
    models: dict[str, str] = key(
        {},
        "further models of a recipe, shown behind base, chat, cpt and merged: name -> directory or hub id",
    )
    baseline: str | None = key(
        None,
        "model that the others are compared with; if not set: `base`, or the first where there is none",
    )
    max_prompts: int = key(
        50,
        "prompts per language of each evaluator, the first ones of its file",
        unit="prompts",
        gt=0,
    )
    max_new_tokens: int = key(256, "longest reply", unit="tokens", gt=0)
    temperature: float = key(0.0, "0: greedy; else sampled at this temperature", ge=0)
    top_p: float = key(
        1.0, "sampling only: share of the probability that is kept (nucleus)", gt=0, le=1
    )
    repetition_penalty: float = key(1.0, "1: none; applies to greedy decoding too", gt=0)
    documents: int = key(
        200, "held-out documents per language for bits per byte", unit="documents", gt=0
    )
    max_bytes: int = key(
        200_000, "held-out text per language for bits per byte", unit="bytes of UTF-8", gt=0
    )
    context: int = key(
        1024,
        "window and stride of bits per byte; at most the positions of every model",
        unit="tokens",
        ge=2,
    )
    batch_size: int = key(
        16, "prompts, or windows of text, that one process takes through the model at once", gt=0
    )
    samples_shown: int = key(
        2, "prompts per language whose replies are printed, evenly spread", unit="prompts", ge=0
    )
    seed: int = key(0, "seed of the bootstrap intervals and of sampling", ge=0)

    @field_validator("languages")
    @classmethod
    def _known(cls, tags: list[str]) -> list[str]:
        return known_languages(tags)

    @field_validator("models")
    @classmethod
    def _of_other_names(cls, models: dict[str, str]) -> dict[str, str]:
        if taken := sorted(OF_A_RECIPE & models.keys()):
            raise ValueError(
                f"{', '.join(taken)}: the recipe's own model has this name; choose another"
            )
        if wrong := [name for name in models if not regex.fullmatch(r"\w[\w.-]*", name)]:
            raise ValueError(f"{wrong[0]!r} is no name of a model: letters, digits, . _ and -")
        return models

    def files(self) -> dict[str, str]:
        """The files and folders that the settings name, by key, those that the suites do not read too."""
        named = {
            "prompts": self.prompts,
            "instructions": self.instructions,
            "dialogues": self.dialogues,
            "safety.prompts": self.safety.prompts,
            "knowledge.folder": self.knowledge.folder,
            "judge.questions": self.judge.questions if self.judge else None,
            **{f"safety.lists.{language}": path for language, path in self.safety.lists.items()},
        }
        return {name: path for name, path in named.items() if path is not None and path != BUILT_IN}
