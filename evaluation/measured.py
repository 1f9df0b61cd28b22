"""measured.json: a finished evaluation with the value of every prompt and document.

results.json has means and intervals; from this file `cpt-merge compare` pairs the models of several
evaluations prompt by prompt, without asking them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cpt_merge.core.artifact import fingerprint, stage_key, write_text
from cpt_merge.core.errors import UserError
from cpt_merge.core.redaction import without_secrets
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.evaluators.evaluator import Evaluator, Metric
from cpt_merge.evaluation.kept import input_files
from cpt_merge.evaluation.results import ModelResult, Results

FILE = "measured.json"
# settings that decide neither what is asked nor how an answer is read
_OF_THE_RUN = {
    "models", "baseline", "samples_shown", "suites", "languages", "gpus_per_model", "batch_size",
    "engine", "engine_of", "server", "vllm", "chat_template_kwargs", "context", "documents",
    "max_bytes",
}  # fmt: skip
_OF_THE_JUDGE = {"cache", "at_once", "key_variable"}


@dataclass(frozen=True)
class MeasuredModel:
    """One model of an evaluation."""

    directory: str
    fingerprint: str  # of its files
    result: ModelResult


@dataclass(frozen=True)
class Measured:
    """A finished evaluation."""

    config: dict[str, Any]
    asked: dict[str, str]  # evaluator -> a digest of what it asks, and of how answers are read
    metrics: dict[str, list[Metric]]  # evaluator -> what it reports
    baseline: str
    models: list[MeasuredModel]

    @staticmethod
    def of(
        config: EvaluationConfig,
        evaluators: Sequence[Evaluator],
        results: Results,
        directories: Mapping[str, Path],
    ) -> Measured:
        """That of results; `directories` has the models' by name."""
        settings = config.model_dump(exclude=_OF_THE_RUN | {"judge"})
        if config.judge:
            settings["judge"] = config.judge.model_dump(exclude=_OF_THE_JUDGE)
        files = input_files(config, {})
        for name in files:  # what a file holds counts, and not where it is
            _forget(settings, name)
        prompts = [asdict(prompt) for one in evaluators for prompt in one.conversations]
        asked = {one.name: prompts if one.reads_all else one.asked for one in evaluators}
        return Measured(
            without_secrets(config.model_dump(mode="json")),
            {
                name: stage_key(name, {"settings": settings, "asked": units}, files)
                for name, units in asked.items()
            },
            {
                evaluator: [results.metrics[name] for name in names]
                for evaluator, names in results.evaluators.items()
            },
            results.baseline,
            [
                MeasuredModel(str(path), fingerprint(path), result)
                for result in results.models
                for path in [directories[result.name]]
            ],
        )

    def write(self, out: Path) -> None:
        """Write the file into the folder of an evaluation."""
        write_text(out / FILE, _CONTENT.dump_json(self).decode())

    @staticmethod
    def read(folder: Path) -> Measured:
        """That of the evaluation in a folder. Raises `UserError` if there is none."""
        path = folder / FILE
        if not path.is_file():
            raise UserError(
                f"{folder} has no {FILE}: no evaluation has finished there, or one of an earlier "
                "version has; in that case remove the folder and evaluate again."
            )
        try:
            return _CONTENT.validate_json(path.read_bytes())
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(
                f"{path} is damaged ({reason}); remove {folder} and evaluate again."
            ) from None

    def only(self, evaluators: Sequence[str], compares: bool) -> Measured:
        """What some of its evaluators found.

        Without `compares`, nothing that depends on the replies of the baseline.
        """
        return replace(
            self,
            metrics={name: self.metrics[name] for name in evaluators},
            models=[self._only(model, evaluators, compares) for model in self.models],
        )

    def _only(
        self, model: MeasuredModel, evaluators: Sequence[str], compares: bool
    ) -> MeasuredModel:
        result, own = model.result, dict(zip(self.metrics, model.result.findings, strict=False))
        further = result.findings[len(own) :] if compares else []  # comparisons with the baseline
        findings = [*(own[name] for name in evaluators), *further]
        samples = [one for one in result.samples if one.evaluator in evaluators]
        return replace(model, result=replace(result, findings=findings, samples=samples))


_CONTENT = TypeAdapter(Measured)


def _forget(settings: dict[str, Any], name: str) -> None:
    """Remove a setting by its dotted name, if it is there."""
    *sections, last = name.split(".")
    for section in sections:
        inner = settings.get(section)
        if not isinstance(inner, dict):
            return
        settings = inner
    settings.pop(last, None)
