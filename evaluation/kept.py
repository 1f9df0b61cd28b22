"""The finished models of an evaluation, kept until all are: no reply is generated twice.

An evaluation that writes OUT keeps them in OUT.kept/models.jsonl, by a key of all that a result
depends on.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter

from cpt_merge.core.artifact import KeptLines, fingerprint, installed_versions, stage_key
from cpt_merge.core.hub import model_fingerprint
from cpt_merge.core.progress import say
from cpt_merge.data.hub_datasets import text_fingerprint
from cpt_merge.data.sources import Corpus, Source, source_files
from cpt_merge.evaluation.chat_template import ChatTemplate
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.heldout import Text
from cpt_merge.evaluation.prompt_files import PACKAGED
from cpt_merge.evaluation.results import ModelResult

RESULT = TypeAdapter(ModelResult)


@dataclass(frozen=True)
class KeptResults:
    """The results of the finished models. Only rank 0 reads and writes them."""

    folder: Path
    key: str  # of everything but the model

    @staticmethod
    def of(
        config: EvaluationConfig, text: Text, chat: ChatTemplate | None, out: Path
    ) -> KeptResults:
        """Those of an evaluation that writes `out`; `chat` is for models without a template."""
        settings = {
            "config": config.model_dump(),
            "chat": repr(chat),
            "versions": installed_versions(),
        }
        inputs = {
            **input_files(config, text),
            "built-in": fingerprint(str(PACKAGED)),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }
        return KeptResults(kept_folder(out), stage_key("evaluated", settings, inputs))

    def read(self, name: str, directory: Path) -> ModelResult | None:
        """What an evaluation that was cut short found of this model."""
        kept = self._lines.read().get(self._key_of(name, directory))
        if kept is None:
            return None
        result = RESULT.validate_python(kept)
        what = (
            "its replies are kept; only what failed is asked again"
            if result.failed
            else "evaluated already"
        )
        say(f"{name}: {what}, by an evaluation that was cut short")
        return result

    def keep(self, result: ModelResult, directory: Path) -> None:
        """Keep the result of a model."""
        self._lines.add(
            self._key_of(result.name, directory), RESULT.dump_python(result, mode="json")
        )

    def clear(self) -> None:
        """Remove all results, those of earlier settings too: the evaluation is finished."""
        self._lines.clear()
        with suppress(OSError):  # files of others in this folder stay
            self.folder.rmdir()

    @property
    def _lines(self) -> KeptLines:
        return KeptLines(self.folder / "models.jsonl")

    def _key_of(self, name: str, directory: Path) -> str:
        return stage_key(self.key, {"name": name}, {"model": fingerprint(directory)})


def kept_folder(out: Path) -> Path:
    """Where an evaluation that writes `out` keeps the results of finished models."""
    folder = out.resolve()
    return folder.with_name(f"{folder.name}.kept")


def input_files(config: EvaluationConfig, text: Text) -> dict[str, str]:
    """The fingerprints of all files that an evaluation reads apart from its models."""
    found = {name: fingerprint(Path(path).expanduser()) for name, path in config.files().items()}
    if config.classifier is not None:
        found["classifier"] = model_fingerprint(config.classifier)
    if isinstance(text, Corpus):
        sources, found["corpus"] = text.sources, repr(text.text())
    else:
        sources = [Source(path=path, language=language) for language, path in text.items()]
    return found | {
        f"text {source.language} {file}": text_fingerprint(file)
        for source in sources
        for file in source_files(source)
    }
