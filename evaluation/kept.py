"""What was found of each model, kept until the evaluation is whole: one that was cut short asks no model twice."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from core.artifact import fingerprint, stage_key, write_text
from core.progress import say
from core.sources import Corpus, source_files
from evaluation.config import EvaluationConfig
from evaluation.heldout import Text
from evaluation.results import ModelResult

FOLDER = "models"  # of the evaluation's
RESULT = TypeAdapter(ModelResult)


@dataclass(frozen=True)
class KeptResults:
    """NAME-KEY.json of each finished model; the key changes with all that its result depends on."""

    folder: Path
    config: EvaluationConfig
    inputs: Mapping[str, str]

    @staticmethod
    def of(config: EvaluationConfig, text: Text, chat_template_from: Path | None, out: Path) -> KeptResults:
        """Those of an evaluation that writes into `out`."""
        files = {name: fingerprint(Path(path).expanduser()) for name, path in config.files().items()}
        if chat_template_from is not None:
            files["template"] = fingerprint(chat_template_from)
        return KeptResults(out / FOLDER, config, {**files, **_fingerprints(text)})

    def read(self, name: str, directory: Path) -> ModelResult | None:
        """What was found of this model, if it was whole."""
        path = self._path(name, directory)
        if not path.is_file():
            return None
        try:
            result = RESULT.validate_json(path.read_text(encoding="utf-8"))
        except ValidationError:
            say(f"{path} is damaged; {name} is evaluated anew")
            return None
        say(f"{name}: evaluated already, before the evaluation was cut short")
        return result

    def keep(self, result: ModelResult, directory: Path) -> None:
        """Keep it, unless an endpoint failed: that is to be asked again."""
        if not result.failed:
            write_text(self._path(result.name, directory), RESULT.dump_json(result).decode())

    def clear(self) -> None:
        """The evaluation is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str, directory: Path) -> Path:
        inputs = {**self.inputs, "model": fingerprint(directory)}
        return self.folder / f"{name}-{stage_key('evaluated model', self.config.model_dump(), inputs)}.json"


def _fingerprints(text: Text) -> dict[str, str]:
    if isinstance(text, Corpus):
        files = [str(file) for source in text.sources for file in source_files(source)]
        return {"corpus": repr(text.text()), **{path: fingerprint(path) for path in files}}
    return {f"text {language} {path}": fingerprint(path) for language, path in text.items()}
