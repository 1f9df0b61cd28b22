"""Knowledge: any tasks of lm-eval (EleutherAI's evaluation harness), on the model in memory.

lm-eval makes the prompts, scores the answers and defines the metrics. Here its requests are divided
over the processes, and its values per question become metrics with intervals and paired
differences like all others. A group of tasks is reported as the mean over all its questions, and by
task. A metric that is no mean over questions (a perplexity) has no values per question, so it is
only in results.json under `knowledge`, as lm-eval reports it.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted, say, timed
from cpt_merge.data.readers.json_records import read_json
from cpt_merge.data.readers.rows import BadRow
from cpt_merge.evaluation.chat_template import ChatTemplate, own_template
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Exchange
from cpt_merge.evaluation.evaluators.evaluator import (
    Evaluator,
    Findings,
    Measurement,
    Metric,
    NotRun,
    Subject,
)
from cpt_merge.evaluation.generate.lm_eval import answer_requests
from cpt_merge.evaluation.generate.transformers import TransformersEngine
from cpt_merge.evaluation.knowledge_suites import LmEvalTask
from cpt_merge.evaluation.models import LanguageModel, batches_by_length
from cpt_merge.evaluation.statistics import Parts

CHUNK = 8  # batches per call of lm-eval, which sorts them and computes shared contexts once
JSON_FAILURE = re.compile(r"Failed to load JSON from file '(.+)' with error ")  # of `datasets`
IN_TEMPLATE = "_chat"  # at the end of the names of what is asked in the chat template
NO_TASKS = "no tasks are named; set evaluation.knowledge.tasks"


class KnowledgeEvaluator(Evaluator):
    """Every metric of every task that is a mean over questions. It needs the extra `eval`."""

    name = "knowledge"

    def __init__(self, config: EvaluationConfig) -> None:
        """Load the tasks with their data. Raises `UserError` for one that lm-eval cannot load."""
        super().__init__()
        self._config = config
        self.metrics: list[Metric] = []  # known when the first model is measured
        self._loaded = load_tasks(config)

    def needs_template(self) -> bool:
        """Whether a model may be asked in a template that is not its own."""
        return bool(self._loaded) and self._config.knowledge.needs_template

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """Run every task."""
        if not self._loaded:
            return Findings([], not_run=[NotRun(self.name, NO_TASKS)])
        measured: list[Measurement] = []
        details: dict[str, Any] = {}
        model, own = subject.model.name, bool(subject.model.tokenizer.chat_template)
        for in_template in self._config.knowledge.in_template(model, own):
            say(f"{model}: questions are asked {'in the chat template' if in_template else 'raw'}")
            found, reported_values = self._ask(subject, in_template)
            measured += found
            details |= reported_values
        known = {metric.name: metric for metric in self.metrics}
        self.metrics = list((known | {one.metric.name: one.metric for one in measured}).values())
        return Findings(measured, details={"knowledge": details})

    def _ask(
        self, subject: Subject, in_template: bool
    ) -> tuple[list[Measurement], dict[str, dict[str, Any]]]:
        """The metrics of every task, and lm-eval's own values."""
        from lm_eval.evaluator import evaluate

        template = (subject.template or self._own_template(subject)) if in_template else None
        model = _lm_eval_model(subject.model, subject.ranks, self._config, template)
        measured: list[Measurement] = []
        details: dict[str, dict[str, Any]] = {}
        for task, loaded in self._loaded.items():
            tasks = counted(len(loaded["tasks"]), "task")
            say(f"{subject.model.name}: {task.name} ({tasks} of lm-eval)")
            results = evaluate(
                model,
                loaded,
                limit=self._config.knowledge.limit,
                bootstrap_iters=0,
                apply_chat_template=in_template,
                fewshot_as_multiturn=in_template,
            )
            found = metrics_of(task.name, task.language, results, in_template)
            if not found:
                say(
                    f"{task.name}: no metric is a mean over questions; lm-eval's values are in "
                    "results.json under `knowledge`"
                )
            measured += found
            details[task.name + IN_TEMPLATE * in_template] = reported(results)
        return measured, details

    def _own_template(self, subject: Subject) -> ChatTemplate:
        """The model's own."""
        assert subject.directory is not None, "only a sweep has none, and its models have templates"
        model = subject.model
        return own_template(model.tokenizer, subject.directory, self._config, model.name)


def load_tasks(config: EvaluationConfig) -> dict[LmEvalTask, Any]:
    """The tasks of the chosen suites; each is lm-eval's own mapping of tasks and groups."""
    tasks, knowledge = config.lm_eval_tasks, config.knowledge
    if not tasks:
        return {}
    config.check_lm_eval()
    with timed("knowledge: lm-eval and its tasks"):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.tasks import TaskManager

        folder = Path(knowledge.folder).expanduser() if knowledge.folder else None
        if folder and not folder.is_dir():
            raise UserError(
                f"evaluation.knowledge.folder = {folder} is no folder; name one with YAML tasks."
            )
        manager = TaskManager(include_path=folder)
        return {
            task: _load(
                manager,
                task.name,
                task.few_shot if knowledge.few_shot is None else knowledge.few_shot,
                config.seed,
            )
            for task in tasks
        }


def _load(manager: Any, name: str, few_shot: int | None, seed: int) -> Any:
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f"similar are {', '.join(close)}" if close else "`lm-eval ls tasks` lists them"
        raise UserError(f"evaluation.knowledge.tasks: lm-eval has no task {name}; {hint}.")
    try:
        with _json_errors():
            loaded = manager.load([name])
    except UserError as error:
        raise UserError(f"evaluation.knowledge.tasks: {name}: {error}") from None
    except Exception as error:  # of the hub, datasets or the task itself: any kind
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(
            f"evaluation.knowledge.tasks: {name} cannot be loaded ({reason}); correct it, or leave "
            f"it out with evaluation.knowledge.without=[{name}]."
        ) from error
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        if few_shot is not None and default != 0:  # a task with 0 must have no examples
            task.set_config(key="num_fewshot", value=few_shot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


@contextmanager
def _json_errors() -> Iterator[None]:
    """Name file and line of what `datasets` cannot read as JSON lines. Raises `UserError`.

    `datasets` logs the name of the file and raises an error that counts bytes.
    """
    logger, files = logging.getLogger("datasets.packaged_modules.json.json"), list[str]()

    def hold_back(record: logging.LogRecord) -> bool:
        found = JSON_FAILURE.match(record.getMessage())
        files.extend(found.groups() if found else ())
        return not found

    logger.addFilter(hold_back)
    try:
        yield
    except Exception:
        for file in filter(Path.is_file, map(Path, files)):
            for number, row in read_json(file):
                if isinstance(row, BadRow):
                    raise UserError(f"{file}: line {number} {row.reason}; fix it.") from None
        raise
    finally:
        logger.removeFilter(hold_back)


def _lm_eval_model(
    model: LanguageModel, ranks: Ranks, config: EvaluationConfig, template: ChatTemplate | None
) -> Any:
    """The model with lm-eval's interface; each process computes its share and gets all answers."""
    from lm_eval.models.huggingface import HFLM

    class DividedModel(HFLM):  # type: ignore[misc, unused-ignore]
        """Divides chunks of requests of similar length over the processes, as replies are."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            if template and any(template.begins_thought(one.args[0]) for one in requests):
                say(
                    f"{model.name}: its chat template opens a thought, and lm-eval scores the "
                    "choices within it; evaluation.chat_template_kwargs may switch thinking off"
                )
            return self._divided(super().loglikelihood, requests)

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[Any]:
            return self._divided(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            if template is not None and template.thoughts is not None:
                return answer_requests(TransformersEngine(model, ranks), template, requests, config)
            return self._divided(super().generate_until, requests)

        def _divided(self, answer: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
            chunks = batches_by_length(
                [len(request.args[0]) for request in requests], CHUNK * config.batch_size
            )
            found = ranks.map(
                f"{model.name}: knowledge",
                lambda chunk: answer([requests[place] for place in chunk], disable_tqdm=True),
                chunks,
            )
            answers: dict[int, Any] = {}
            for chunk, of_chunk in zip(chunks, found, strict=True):
                answers.update(zip(chunk, of_chunk, strict=True))
            return [answers[place] for place in range(len(requests))]

    positions = model.positions if model.positions < sys.maxsize else None
    tokenizer = copy.deepcopy(model.tokenizer)  # lm-eval gives it a padding token
    options: dict[str, Any] = {}
    if template is not None:
        tokenizer.chat_template = template.template
        options["chat_template_args"] = dict(template.variables)
    return DividedModel(
        model.loaded,
        backend="causal",  # wrappers of a text decoder, too
        tokenizer=tokenizer,
        batch_size=config.batch_size,
        max_length=positions,
        **options,
    )


def metrics_of(
    name: str, language: str, results: Mapping[str, Any], in_template: bool = False
) -> list[Measurement]:
    """The metrics of a task, or of a group of them, from lm-eval's results."""
    leaves = {leaf: means(results, leaf) for leaf in results["samples"]}
    measured = []
    for key in dict.fromkeys(key for found in leaves.values() for key in found):
        metric = _metric(name, key, results, leaves, in_template)
        all_parts: Parts = {}
        for leaf, found in leaves.items():
            start = len(all_parts)
            parts: Parts = {
                start + place: (value, 1.0) for place, value in enumerate(found.get(key, []))
            }
            all_parts |= parts
            if len(leaves) > 1 and parts:
                measured.append(Measurement(metric, language, parts, group=leaf))
        measured.append(Measurement(metric, language, all_parts))
    return measured


def _metric(
    name: str,
    key: str,
    results: Mapping[str, Any],
    leaves: Mapping[str, Mapping[str, list[float]]],
    in_template: bool,
) -> Metric:
    plain = key.partition(",")[0]
    title = key.removesuffix(",none").replace(",", "_")
    rising = [results["higher_is_better"].get(leaf, {}).get(plain) for leaf in leaves]
    values = [value for found in leaves.values() for value in found.get(key, [])]
    share = all(0 <= value <= 1 for value in values)
    meaning = f"lm-eval's {title} of {name}, mean over questions"
    end, how = (IN_TEMPLATE, ", asked in the chat template") if in_template else ("", "")
    heading = f"{name} {title}{end.replace('_', ' ')}"
    return Metric(f"{name}_{title}{end}", heading, meaning + how, False not in rising, share)


def means(results: Mapping[str, Any], leaf: str) -> dict[str, list[float]]:
    """The values per question of one task by "metric,filter", for metrics that are their mean."""
    found: dict[str, list[float]] = {}
    for sample in results["samples"][leaf]:
        for key in sample["metrics"]:
            value = sample[key]
            is_number = isinstance(value, bool | int | float) or hasattr(value, "item")
            number = float(value) if is_number else math.nan
            found.setdefault(f"{key},{sample['filter']}", []).append(number)
    reported = results["results"][leaf]
    return {
        key: values
        for key, values in found.items()
        if isinstance(reported.get(key), int | float)
        and math.isclose(sum(values) / len(values), reported[key], rel_tol=1e-6, abs_tol=1e-9)
    }


def reported(results: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's values for every task and group, with the task's version and examples shown."""
    return {
        name: {
            **{
                key: value
                for key, value in found.items()
                if isinstance(value, int | float) and "stderr" not in key
            },
            "version": results["versions"].get(name),
            "few_shot": results["n-shot"].get(name),
        }
        for name, found in results["results"].items()
    }
