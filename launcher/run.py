"""A run: its recipe, and where the artifacts of its stages are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cpt_merge.core.artifact import write_text
from cpt_merge.core.file_digests import known_digests, recall_digests
from cpt_merge.core.hub import model_directory, model_fingerprint
from cpt_merge.core.lock import Lock
from cpt_merge.core.world import find_world
from cpt_merge.data.sources import Source
from cpt_merge.launcher.recipe import Recipe, load_recipe

DIGESTS_FILE = "digests.json"  # in a run's folder: the files that its stages read
LOCK_FILE = ".lock"  # in a run's folder, while a process works there
LOCK_VARIABLE = "CPT_MERGE_LOCK"  # its path, for the processes that a locked run starts


@dataclass(frozen=True)
class Run:
    """A recipe and the folder of its run."""

    recipe: Recipe
    words: Sequence[str] = ()  # the recipe's path and the overrides, as on the command line

    @staticmethod
    def load(recipe: Path, overrides: Sequence[str] = ()) -> Run:
        """The run of a recipe with overrides `section.key=value`. Raises `UserError`."""
        return Run(load_recipe(recipe, list(overrides)), (str(recipe), *overrides))

    @cached_property
    def base(self) -> Path:
        """The base model's directory."""
        return model_directory(self.recipe.models.base)

    @cached_property
    def chat(self) -> Path:
        """The chat model's directory."""
        return model_directory(self.recipe.models.chat)

    @cached_property
    def start(self) -> Path:
        """The directory of the model whose weights training starts from."""
        named = self.recipe.training.start
        return model_directory(named) if named else self.base

    def folder(self, stage: str) -> Path:
        """A stage's folder: its artifact, its log, and `stage.json` once it is finished."""
        return self.recipe.directory / stage

    @property
    def tokenizer(self) -> Path:
        """The extended tokenizer with its vocabulary map."""
        return self.folder("tokenizer") / "tokenizer"

    @property
    def resized(self) -> Path:
        """The model that training starts from, with rows for the new vocabulary."""
        return self.folder("embeddings") / "model"

    @property
    def store(self) -> Path:
        """The token store."""
        return self.folder("data") / "store"

    @property
    def blocks(self) -> Path:
        """Tokenised text for the next store; outside the stage's folder, which begins empty."""
        return self.folder("data.blocks")

    @property
    def cpt(self) -> Path:
        """The continually pretrained model."""
        return self.folder("training") / "cpt"

    @property
    def merged(self) -> Path:
        """The chat model in the new language."""
        return self.folder("merge") / "chat"

    @property
    def conversations(self) -> Path:
        """The store of conversations."""
        return self.folder("conversations") / "store"

    @property
    def pairs(self) -> Path:
        """The store of pairs of replies."""
        return self.folder("pairs") / "store"

    def chat_tokenizer(self, stage: str) -> Path:
        """The tokenizer that a stage renders with: the merged model's, with its chat template."""
        return self.folder(stage) / "tokenizer"

    @property
    def formatted(self) -> Path:
        """The continually pretrained model with the rows of the chat format."""
        return self.folder("format") / "model"

    @property
    def tuned(self) -> Path:
        """The fine-tuned model."""
        return self.folder("finetune") / "tuned"

    @property
    def tuned_merged(self) -> Path:
        """The fine-tuned model with the chat vector."""
        return self.folder("finetune_merge") / "chat"

    @property
    def aligned(self) -> Path:
        """The model that prefers the chosen replies."""
        return self.folder("dpo") / "aligned"

    @property
    def before_dpo(self) -> Path:
        """The last model before the replies are compared."""
        return [path for name, path in self.made_models().items() if name != "aligned"][-1]

    def own_models(self) -> dict[str, Path]:
        """The run's models that are evaluated, by name."""
        return {"base": self.base, "chat": self.chat} | self.made_models()

    def made_models(self) -> dict[str, Path]:
        """The models that the run makes, by name; the last one is what the run is for."""
        found = {"cpt": self.cpt, "merged": self.merged}
        if self.recipe.finetune:
            found["tuned"] = self.tuned
            if self.recipe.finetune.after == "training":
                found["tuned_merged"] = self.tuned_merged
        if self.recipe.dpo:
            found["aligned"] = self.aligned
        return found

    @property
    def result(self) -> Path:
        """The model that the run is for."""
        return list(self.made_models().values())[-1]

    def further_models(self) -> dict[str, Path]:
        """The models that are evaluated in addition to the run's own, by name."""
        return {name: model_directory(path) for name, path in self.recipe.evaluation.models.items()}

    def recall_digests(self) -> None:
        """Know the digests of files that earlier processes read."""
        path = self.recipe.directory / DIGESTS_FILE
        if path.is_file():
            recall_digests(path.read_text(encoding="utf-8"))

    def keep_digests(self) -> None:
        """Write the digests that are known, for later processes."""
        write_text(self.recipe.directory / DIGESTS_FILE, known_digests())

    def corpus_inputs(self) -> dict[str, str]:
        """The fingerprints of all text."""
        return self.text_inputs(self.recipe.corpus.sources)

    @staticmethod
    def text_inputs(sources: Sequence[Source]) -> dict[str, str]:
        """The fingerprints of the sources."""
        from cpt_merge.data.hub_datasets import HubFile, text_fingerprint
        from cpt_merge.data.sources import source_files

        inputs = {}
        for source in sources:
            files = source_files(source)
            of_commit = {file.origin for file in files if isinstance(file, HubFile)}
            inputs[f"text {source.path}"] = " ".join(of_commit or map(text_fingerprint, files))
        return inputs

    def pair_inputs(self) -> dict[str, str]:
        """The fingerprints of base and chat."""
        models = self.recipe.models
        return {"base": model_fingerprint(models.base), "chat": model_fingerprint(models.chat)}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the run's folder. Raises `UserError` if another works in it.

        Processes that are started within the block may enter: they inherit the environment.
        """
        path = (self.recipe.directory / LOCK_FILE).absolute()
        if os.environ.get(LOCK_VARIABLE) == str(path) or not find_world().is_main:
            yield
            return
        lock = Lock(path, self.recipe.directory, "give this run another name")
        lock.take()
        os.environ[LOCK_VARIABLE] = str(path)
        try:
            yield
        finally:
            del os.environ[LOCK_VARIABLE]
            lock.release()
