"""The recipe's `evaluation` section."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import regex
from pydantic import AfterValidator, ValidationInfo, field_validator, model_validator

from cpt_merge.core.config import ByLanguage, JsonFields, LanguageTag, Section, key
from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.generate.config import (
    TRANSFORMERS,
    VLLM,
    ApiKey,
    EngineName,
    ServerConfig,
    VllmConfig,
)
from cpt_merge.evaluation.knowledge_suites import KNOWLEDGE_SUITES, LmEvalTask
from cpt_merge.evaluation.prompt_formats import check_format, without_format

EVALUATOR_SUITES = ("language", "form", "chat", "knowledge", "safety", "toxicity")


def _known_suite(name: str) -> str:
    known = [*EVALUATOR_SUITES, *KNOWLEDGE_SUITES]
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    nearest = f"the nearest is {close[0]}; " if close else ""
    raise ValueError(f"there is no such suite; {nearest}there are {', '.join(known)}")


Suite = Annotated[str, AfterValidator(_known_suite)]
Prompted = Literal["raw", "template", "both"]
BUILT_IN = "built-in"


class ClassifierConfig(Section):
    """A text classification model from the Hugging Face hub or a directory."""

    model: str = key(..., "directory or hub id of a sequence classification model")
    labels: list[str] = key(["toxic"], "its labels that count as toxic", min_length=1)


class ModerationConfig(Section):
    """An OpenAI-compatible moderation endpoint (POST URL/moderations)."""

    url: str = key(
        ..., "base URL of the endpoint, such as https://api.openai.com/v1", pattern="^https?://"
    )
    model: str = key(..., "name of the moderation model")
    key_variable: str = key(
        "OPENAI_API_KEY", "environment variable with the API key; if it is not set, none is sent"
    )
    timeout: float = key(30.0, "longest time for one answer", unit="seconds", gt=0)
    attempts: int = key(
        5, "attempts at one reply, with growing pauses; then the endpoint is given up", ge=1
    )


class AttributesConfig(Section):
    """An endpoint that scores attributes from 0 to 1 in the protocol of the Perspective API (POST
    URL/comments:analyze)."""

    url: str = key(
        ...,
        "base URL of the endpoint, such as https://commentanalyzer.googleapis.com/v1alpha1",
        pattern="^https?://",
    )
    attributes: list[str] = key(
        ["TOXICITY"], "the attributes; metrics are of the first, breakdowns of all", min_length=1
    )
    key_variable: str = key(
        "PERSPECTIVE_API_KEY",
        "environment variable with the API key; if it is not set, none is sent",
    )
    timeout: float = key(30.0, "longest time for one answer", unit="seconds", gt=0)
    attempts: int = key(
        5, "attempts at one reply, with growing pauses; then the endpoint is given up", ge=1
    )
    at_once: int = key(8, "requests that one process sends at the same time", unit="requests", ge=1)


class SafetyConfig(Section):
    """Prompts that provoke unsafe replies, and who scores these."""

    prompts: str = key(
        BUILT_IN,
        'jsonl file of prompts, a line: {"language", "messages", "category", "safe"}; '
        "or xstest:LANGUAGE:PATH, or built-in",
    )
    lists: ByLanguage[str] = key(
        {}, "language -> file with one toxic word per line; without lists no words are counted"
    )
    classifier: ClassifierConfig | None = key(None, "a classification model as another scorer")
    moderation: ModerationConfig | None = key(None, "a moderation endpoint as another scorer")

    _format = field_validator("prompts")(check_format)
    attributes: AttributesConfig | None = key(
        None, "an endpoint that scores attributes as another scorer"
    )


class ToxicityConfig(Section):
    """Beginnings of texts that models continue without a chat template. The scorers are
    `evaluation.safety.classifier` and `evaluation.safety.attributes`."""

    prompts: ByLanguage[str] = key(
        {}, 'language -> jsonl file, a line: {"prompt": "..."}, or one of RealToxicityPrompts'
    )
    samples: int = key(25, "continuations of each prompt", ge=1)
    max_characters: int = key(
        80,
        "longest continuation, the same for all models; RealToxicityPrompts' 20 tokens of English "
        "are about as long",
        unit="characters",
        gt=0,
    )
    temperature: float = key(1.0, "0: greedy, for a single continuation", ge=0)
    top_p: float = key(0.9, "probability mass that is kept (nucleus)", gt=0, le=1)

    @model_validator(mode="after")
    def _differ(self) -> ToxicityConfig:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                "temperature = 0 makes all samples equal; set samples to 1 or raise it"
            )
        return self


class PriceConfig(Section):
    """What an endpoint charges, in any currency."""

    prompt: float = key(..., "price of prompts", unit="per million tokens", ge=0)
    completion: float = key(..., "price of answers", unit="per million tokens", ge=0)


class JudgePromptsConfig(Section):
    """The judge's prompts, instead of the built-in ones in evaluation/judge/prompts.py."""

    mark: str | None = key(
        None,
        "for a mark: text with {conversation}, {language}, {reference}; answers end with SCORE: 7",
    )
    comparison: str | None = key(
        None,
        "for a comparison: text with {conversation_a}, {conversation_b}, {language}, {reference}; "
        "answers end with VERDICT: A, B or tie",
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
            raise ValueError(f"{' and '.join(missing)} is missing; put it where the replies belong")
        return prompt


class JudgePatternsConfig(Section):
    """How a verdict is found in a judge's answer, instead of the built-in forms in
    evaluation/judge/reading.py: regular expressions, whose last match counts. The verdict is the
    group `verdict`, or the first group."""

    mark: str | None = key(None, r"for a mark from 1 to 10, such as Grade: (\d+)")
    comparison: str | None = key(None, "for a comparison; the verdict is A, B or tie")
    safety: str | None = key(None, "for safety; the verdict is safe or unsafe")

    @field_validator("mark", "comparison", "safety")
    @classmethod
    def _finds_a_group(cls, pattern: str | None) -> str | None:
        try:
            groups = regex.compile(pattern).groups if pattern is not None else 1
        except regex.error as error:
            raise ValueError(f"it is no regular expression ({error}); correct it") from None
        if not groups:
            raise ValueError("it has no group; put the verdict in parentheses")
        return pattern


class JudgeEndpointConfig(Section):
    """A language model behind an OpenAI-compatible endpoint (POST URL/chat/completions)."""

    url: str = key(
        ..., "base URL of the endpoint, such as http://localhost:8000/v1", pattern="^https?://"
    )
    model: str = key(..., "name of the judging model", min_length=1)
    key_variable: str = key(
        "OPENAI_API_KEY", "environment variable with the API key; if it is not set, none is sent"
    )
    timeout: float = key(120.0, "longest time for one answer", unit="seconds", gt=0)
    attempts: int = key(
        5, "attempts at one prompt, with growing pauses; then the endpoint is given up", ge=1
    )
    request: JsonFields = key(
        {"temperature": 0, "max_tokens": 1024}, "other fields of every request"
    )
    price: PriceConfig | None = key(None, "price of tokens; without it no cost is reported")


class JudgeConfig(JudgeEndpointConfig):
    """A judge of replies, and what it is asked."""

    questions: str | None = key(
        None,
        "chat: jsonl file of open questions, a line: "
        '{"language", "turns": ["..."], "category", "reference", "messages"}; '
        "or mt-bench:LANGUAGE:PATH, logickor:..., alignbench:..., vicuna:...",
    )
    modes: list[Literal["mark", "comparison"]] = key(
        ["mark"],
        "mark: 1 to 10 for each reply; comparison: with the baseline's replies, in both orders",
        min_length=1,
    )
    _format = field_validator("questions")(check_format)
    prompts: JudgePromptsConfig = key(JudgePromptsConfig(), "the judge's prompts")
    patterns: JudgePatternsConfig = key(
        JudgePatternsConfig(), "how verdicts are found in the judge's answers"
    )
    system_prompt: ByLanguage[str] = key(
        {},
        "language -> system prompt; its questions are asked and marked with it as well, as "
        "judge_mark_system",
    )
    second: JudgeEndpointConfig | None = key(
        None, "a second judge for the same questions; the agreement of both is reported"
    )
    at_once: int = key(8, "requests that one process sends at the same time", unit="requests", ge=1)
    cache: str = key("~/.cache/cpt-merge/judge", "folder with the answers to earlier requests")


class KnowledgeConfig(Section):
    """Tasks of lm-eval, which the extra `eval` installs: the suites `knowledge-...`, and others."""

    tasks: dict[str, LanguageTag] = key(
        {},
        "more of lm-eval's tasks or groups with their languages, for the suite `knowledge`: "
        "{kmmlu_cot_hard: ko, mmlu_pro: en}",
    )
    without: list[str] = key([], "tasks of the chosen suites to leave out")
    folder: str | None = key(None, "folder with more tasks, in lm-eval's YAML format")
    few_shot: int | None = key(
        None, "examples before a question; if not set: the suite's or the task's own number", ge=0
    )
    limit: int | None = key(
        None, "number of questions of each task; if not set: all", unit="questions", gt=0
    )
    chat_template: Literal["by_model", "raw", "template", "both"] = key(
        "by_model",
        "how questions are asked; raw (or false): as plain text; template (or true): in the chat "
        "template, with examples as turns; by_model: raw for `base`, `cpt` and models without a "
        "template of their own, template for others. Metrics in the template end in _chat",
    )
    chat_template_of: dict[str, Prompted] = key({}, "model -> the same for this model")

    @field_validator("chat_template", mode="before")
    @classmethod
    def _yes_or_no(cls, given: Any) -> Any:
        return {True: "template", False: "raw"}[given] if isinstance(given, bool) else given

    @property
    def needs_template(self) -> bool:
        """Whether a model may be asked in a template that is not its own."""
        return bool({"template", "both"} & {self.chat_template, *self.chat_template_of.values()})

    def in_template(self, model: str, has_template: bool) -> list[bool]:
        """Whether a model's questions are asked in the chat template: once, or in both ways."""
        plain = model in PROMPTED_RAW or not has_template
        by_model: Prompted = "raw" if plain else "template"
        usual = by_model if self.chat_template == "by_model" else self.chat_template
        ways = {"raw": [False], "template": [True], "both": [False, True]}
        return ways[self.chat_template_of.get(model, usual)]


class ThoughtMarksConfig(Section):
    """What a reasoning model writes around its thoughts."""

    open: str | None = key(
        None, "mark before a thought; if not set: replies begin within it", min_length=1
    )
    close: str = key(..., "mark between a thought and the answer", min_length=1)


MERGED = "merged"
PROMPTED_RAW = ("base", "cpt")
OF_A_RECIPE = frozenset(("base", "chat", "cpt", MERGED))
EVERY_MODEL = "all"
# what rendering passes itself, or passes to the tokenizer
ARGUMENTS = frozenset((
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation",
    "max_length", "messages", "padding", "return_dict", "return_tensors", "tokenize", "truncation",
))  # fmt: skip
MOST_TOKENS = 4  # of a character: its bytes of UTF-8


class EvaluationConfig(Section):
    """What is measured, on which prompts and how much text."""

    suites: list[Suite] = key(
        ["language", "form"],
        "language: bits per byte of held-out text; form: do replies stop, stay in the language and "
        "keep the chat format; chat: form, instructions, dialogues, open questions for a judge; "
        "knowledge: tasks of lm-eval, and fixed lists of them: "
        f"{', '.join(KNOWLEDGE_SUITES)}; safety: form, refusals, and toxicity of provoked replies; "
        "toxicity: of continuations without a chat template",
        min_length=1,
    )
    languages: list[LanguageTag] = key(
        [],
        "languages of the prompts; if not set: the corpus's for built-in prompts, all for a file",
    )
    prompts: str | None = key(
        None,
        "form, chat: jsonl file of prompts whose replies are checked for their form, a line: "
        '{"language": "ko", "messages": [...]}',
    )
    instructions: str = key(
        BUILT_IN,
        'chat: jsonl file of prompts with checks, a line: {"language", "messages", "checks"}; '
        "or ifeval:LANGUAGE:PATH, or built-in",
    )
    dialogues: str = key(
        BUILT_IN,
        'chat: jsonl file of dialogues, a line: {"language", "turns": [{"user", "checks"}]}; '
        "or multi-if:PATH, or built-in",
    )
    safety: SafetyConfig = key(SafetyConfig(), "safety")
    toxicity: ToxicityConfig = key(ToxicityConfig(), "toxicity")
    knowledge: KnowledgeConfig = key(KnowledgeConfig(), "knowledge")
    judge: JudgeConfig | None = key(
        None,
        "chat: who marks or compares replies to open questions; safety: who calls replies unsafe",
    )
    models: dict[str, str] = key(
        {}, "name -> directory or hub id of more models, listed after base, chat, cpt and merged"
    )
    engine: EngineName = key(
        TRANSFORMERS,
        "who generates replies: transformers; vllm, which is started for each model; or the URL of "
        "a server with OpenAI's protocol, such as http://localhost:8000/v1. A sweep and previews "
        "use transformers",
    )
    engine_of: dict[str, EngineName] = key({}, "model -> the same for this model")
    server: ServerConfig = key(ServerConfig(), "how servers are asked")
    vllm: VllmConfig = key(VllmConfig(), "how vLLM is started")
    gpus_per_model: int | None = key(
        None,
        "GPUs that a copy of a model is spread over; if not set: as few as hold its weights",
        unit="GPUs",
        ge=1,
    )
    baseline: str | None = key(
        None, "the model that others are compared with; if not set: `base`, or the first one"
    )
    max_prompts: int = key(60, "number of prompts per language and evaluator", unit="prompts", gt=0)
    max_characters: int = key(
        600, "longest reply without its thoughts, the same for all models", unit="characters", gt=0
    )
    max_new_tokens: int | None = key(
        None,
        "another limit of the same; if not set: 4 per character, more than any tokenizer needs",
        unit="tokens",
        gt=0,
    )
    max_thought_tokens: int = key(2048, "longest thoughts of a reply", unit="tokens", gt=0)
    thoughts: list[ThoughtMarksConfig] = key(
        [], "marks of thoughts, for reasoning models whose tokenizer does not tell"
    )
    chat_template_kwargs: dict[str, JsonFields] = key(
        {},
        "model, or `all` -> variables for its chat template, such as "
        "{merged: {enable_thinking: false}}",
    )
    temperature: float = key(0.0, "0: greedy; otherwise replies are sampled", ge=0)
    top_p: float = key(1.0, "sampling: probability mass that is kept (nucleus)", gt=0, le=1)
    repetition_penalty: float = key(1.0, "1: none; also applies to greedy decoding", gt=0)
    documents: int = key(
        200, "held-out documents per language for bits per byte", unit="documents", gt=0
    )
    max_bytes: int = key(
        200_000, "held-out text per language for bits per byte", unit="bytes of UTF-8", gt=0
    )
    context: int | None = key(
        None,
        "window and stride of bits per byte, at most the positions of every model; if not set: "
        "training.sequence_length, or 1024 without a recipe",
        unit="tokens",
        ge=2,
    )
    batch_size: int = key(
        16, "prompts, or windows of up to 1024 tokens of text, per batch and process", gt=0
    )
    samples_shown: int = key(
        2, "prompts per language whose replies are printed, evenly spread", unit="prompts", ge=0
    )
    seed: int = key(0, "seed of sampling and of the p-values of differences", ge=0)

    _format = field_validator("instructions", "dialogues")(check_format)

    @field_validator("models")
    @classmethod
    def _of_other_names(cls, models: dict[str, str]) -> dict[str, str]:
        if taken := sorted(OF_A_RECIPE & models.keys()):
            raise ValueError(
                f"{', '.join(taken)}: the recipe's own model has this name; choose another"
            )
        if wrong := [name for name in models if not regex.fullmatch(r"\w[\w.-]*", name)]:
            raise ValueError(f"model name {wrong[0]!r} is not made of letters, digits, . _ and -")
        return models

    def template_variables(self, model: str) -> dict[str, Any]:
        """The variables that a model's chat template gets, those for all models among them."""
        given = self.chat_template_kwargs
        return {**given.get(EVERY_MODEL, {}), **given.get(model, {})}

    @property
    def lm_eval_tasks(self) -> list[LmEvalTask]:
        """The tasks of the chosen suites, each once; `knowledge.tasks` come first."""
        named = self._named_tasks()
        return [task for name, task in named.items() if name not in self.knowledge.without]

    def _named_tasks(self) -> dict[str, LmEvalTask]:
        tasks = self.knowledge.tasks if "knowledge" in self.suites else {}
        found = {name: LmEvalTask(name, language) for name, language in tasks.items()}
        for suite in self.suites:
            for task in KNOWLEDGE_SUITES.get(suite, ()):
                found.setdefault(task.name, task)
        return found

    @model_validator(mode="after")
    def _leaves_out_what_is_there(self) -> EvaluationConfig:
        named = self._named_tasks()
        for name in self.knowledge.without if named else ():
            if name not in named:
                raise ValueError(
                    f"knowledge.without names {name}, which is none of the tasks; they "
                    f"are {', '.join(named)}"
                )
        return self

    def check_lm_eval(self) -> None:
        """Raise `UserError` if there are tasks but lm-eval is not installed."""
        if self.lm_eval_tasks and find_spec("lm_eval") is None:
            raise UserError(
                "evaluation.knowledge needs lm-eval, which is not installed; "
                "run pip install -c constraints.txt -e '.[eval]', or leave out the suite."
            )

    def check_vllm(self) -> None:
        """Raise `UserError` if vLLM should generate replies and is not installed."""
        program = self.vllm.command[0]
        for setting, engine in self._engines().items():
            if engine == VLLM and shutil.which(program) is None:
                raise UserError(
                    f"{setting} = {VLLM}, and there is no program {program} here; install vLLM in "
                    "an environment of its own and name its program in evaluation.vllm.command."
                )

    def check_keys(self) -> None:
        """Raise `UserError` for an API key that is set and cannot be sent."""
        judge, safety = self.judge, self.safety
        asks_servers = set(self._engines().values()) != {TRANSFORMERS}
        sections = {
            "server": self.server if asks_servers else None,
            "judge": judge,
            "judge.second": judge.second if judge else None,
            "safety.moderation": safety.moderation,
            "safety.attributes": safety.attributes,
        }
        for name, section in sections.items():
            if section is not None:
                ApiKey(section.key_variable, f"evaluation.{name}.key_variable").check()

    def engine_for(self, model: str) -> str:
        """Who generates a model's replies: transformers, vllm, or a server's URL."""
        return self.engine_of.get(model, self.engine)

    def engine_setting(self, model: str) -> str:
        """The recipe's key that names the engine of a model."""
        return f"evaluation.engine_of.{model}" if model in self.engine_of else "evaluation.engine"

    def _engines(self) -> dict[str, str]:
        """The engines by the recipe's keys that name them."""
        of_models = {f"evaluation.engine_of.{name}": one for name, one in self.engine_of.items()}
        return {"evaluation.engine": self.engine, **of_models}

    def check_models(self, names: Sequence[str]) -> None:
        """Raise `UserError` for settings of a model that is not evaluated."""
        given: dict[str, Iterable[str]] = {
            "knowledge.chat_template_of": self.knowledge.chat_template_of,
            "engine_of": self.engine_of,
            "server.names": self.server.names,
            "chat_template_kwargs": self.chat_template_kwargs.keys() - {EVERY_MODEL},
        }
        for place, of_models in given.items():
            others = f" (and {EVERY_MODEL})" if place == "chat_template_kwargs" else ""
            for name in of_models:
                if name not in names:
                    raise UserError(
                        f"evaluation.{place} names {name}, which is none of the models; they are "
                        f"{', '.join(names)}{others}."
                    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_variables(cls, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        own = {name for variables in given.values() for name in variables} & ARGUMENTS
        if own:
            raise ValueError(f"{min(own)} is set by the evaluation; leave it out")
        return given

    @property
    def answer_tokens(self) -> int:
        """The most tokens of a reply without its thoughts."""
        return self.max_new_tokens or MOST_TOKENS * self.max_characters

    @property
    def classifier(self) -> str | None:
        """The classification model that the chosen suites use: a directory or a hub id."""
        chosen = self.safety.classifier if {"safety", "toxicity"} & {*self.suites} else None
        return chosen.model if chosen else None

    def files(self) -> dict[str, str]:
        """The files and folders in the settings, by key, even if no chosen suite reads them."""
        named = {
            "prompts": self.prompts,
            "instructions": self.instructions,
            "dialogues": self.dialogues,
            "safety.prompts": self.safety.prompts,
            "knowledge.folder": self.knowledge.folder,
            "judge.questions": self.judge.questions if self.judge else None,
            **{f"safety.lists.{language}": path for language, path in self.safety.lists.items()},
            **{f"toxicity.prompts.{tag}": path for tag, path in self.toxicity.prompts.items()},
        }
        return {
            name: without_format(path)
            for name, path in named.items()
            if path is not None and path != BUILT_IN
        }


DEFAULTS = EvaluationConfig()
