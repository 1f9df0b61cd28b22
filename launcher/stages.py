"""The stages of the pipeline, in order: what each reads, what it is configured by, and the call that runs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import fingerprint, read_record, stage_key
from cpt_merge.core.errors import UserError
from cpt_merge.core.models import model_directory
from cpt_merge.core.world import find_world
from cpt_merge.data.sources import Corpus, source_files
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.tracking import Tracker


@dataclass(frozen=True)
class Run:
    """A recipe and where its artifacts are."""

    recipe: Recipe

    @cached_property
    def base(self) -> Path:
        """The base model's directory."""
        return model_directory(self.recipe.models.base)

    @cached_property
    def chat(self) -> Path:
        """The chat model's directory."""
        return model_directory(self.recipe.models.chat)

    def folder(self, stage: str) -> Path:
        """A stage's folder: its artifact, its log, and `stage.json` once it is finished."""
        return self.recipe.directory / stage

    @property
    def tokenizer(self) -> Path:
        """The extended tokenizer with its vocabulary map."""
        return self.folder("tokenizer") / "tokenizer"

    @property
    def resized(self) -> Path:
        """The base model with rows for the new vocabulary."""
        return self.folder("embeddings") / "model"

    @property
    def store(self) -> Path:
        """The token store."""
        return self.folder("data") / "store"

    @property
    def cpt(self) -> Path:
        """The continually pretrained model."""
        return self.folder("training") / "cpt"

    @property
    def merged(self) -> Path:
        """The chat model in the new language."""
        return self.folder("merge") / "chat"

    def further_models(self) -> dict[str, Path]:
        """What is evaluated beside the run's own models, by name."""
        return {name: model_directory(path) for name, path in self.recipe.evaluation.models.items()}

    def finished(self, stage: str) -> str:
        """The fingerprint of a finished stage. Raises `UserError` if it is not finished."""
        record = read_record(self.folder(stage))
        if record is None:
            command = COMMANDS[stage]
            raise UserError(
                f"{self.folder(stage)} is not finished; run `cpt-merge {command} RECIPE` (or `run`) first."
            )
        return f"stage:{record.key}"

    def corpus_inputs(self) -> dict[str, str]:
        """The fingerprints of all text."""
        inputs = {}
        for source in self.recipe.corpus.sources:
            files = source_files(source)
            inputs[f"text {source.path}"] = (
                " ".join(fingerprint(file) for file in files) or f"hub:{source.path}"
            )
        return inputs

    def pair_inputs(self) -> dict[str, str]:
        """The fingerprints of base and chat."""
        return {"base": fingerprint(self.base), "chat": fingerprint(self.chat)}


@dataclass(frozen=True)
class Stage:
    """One stage. `config` and `inputs` decide whether it has to run; `run` fills its folder and returns its results."""

    name: str
    config: Callable[[Recipe], Mapping[str, Any]]
    inputs: Callable[[Run], dict[str, str]]
    run: Callable[[Run, str, Tracker], dict[str, Any]]  # (run, stage key, tracker)
    artifact: Callable[
        [Run], Path
    ]  # what it leaves; a stage whose artifact is gone is not finished
    is_complete: Callable[[Path], bool] = Path.exists  # of the artifact
    distributed: bool = False  # runs in all processes
    resumable: bool = False  # its folder is kept when it is cut short, and it continues there
    precious: bool = False  # its folder is moved aside, never removed, when its settings change


def _tokenizer(run: Run, key: str, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.tokenizer_ext.run import run as run_stage

    run.tokenizer.mkdir(parents=True)
    recipe = run.recipe
    return run_stage(recipe.tokenizer, run.base, run.chat, recipe.corpus, run.tokenizer, tracker)


def _embeddings(run: Run, key: str, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.tokenizer_ext.embeddings.run import run as run_stage

    run.resized.mkdir(parents=True)
    recipe = run.recipe
    return run_stage(
        recipe.embeddings, run.base, run.tokenizer, _new_text(recipe), run.resized, tracker
    )


def _data(run: Run, key: str, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.data.run import run as run_stage

    return run_stage(
        run.recipe.data, run.recipe.corpus, run.tokenizer, run.store, tracker, run.base
    )


def _training(run: Run, key: str, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.launcher.hook import post_training_hook
    from cpt_merge.launcher.preview import preview_of
    from cpt_merge.launcher.start import use_backend
    from cpt_merge.training.run import TrainingInputs
    from cpt_merge.training.run import run as run_stage

    use_backend(run.recipe)
    inputs = TrainingInputs(run.resized, run.tokenizer, run.store, key, run.base, run.recipe.corpus)
    hook, preview = post_training_hook(run, key), preview_of(run)
    return run_stage(run.recipe.training, inputs, run.folder("training"), tracker, hook, preview)


def _merge(run: Run, key: str, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.merge.plan import MergeInputs
    from cpt_merge.merge.report import made_in_memory
    from cpt_merge.merge.run import run as run_stage

    if find_world().is_main and made_in_memory(
        run.merged
    ):  # by a hook that ended before the stage was recorded
        shutil.rmtree(run.merged)
    inputs = MergeInputs(run.cpt, run.base, run.chat, run.tokenizer)
    return run_stage(run.recipe.merge, inputs, run.merged, tracker)


def _evaluation(run: Run, key: str, tracker: Tracker) -> dict[str, Any]:
    from cpt_merge.evaluation.run import run as run_stage

    models = {
        "base": run.base,
        "chat": run.chat,
        "cpt": run.cpt,
        "merged": run.merged,
        **run.further_models(),
    }
    out = run.folder("evaluation")
    return run_stage(run.recipe.evaluation, models, run.recipe.corpus, run.chat, out, tracker)


def _nothing_failed(results: Path) -> bool:
    from cpt_merge.evaluation.outputs import is_complete

    return is_complete(results)


def check_previewed(chat: Path, template: str | None) -> None:
    """Raise `UserError` for a chat model that a preview cannot ask."""
    if template is None:
        raise UserError(
            f"{chat} has no chat template, which training.preview needs; add a chat_template to its tokenizer, or "
            "leave training.preview.every out."
        )


def merge_inputs(run: Run, cpt: str) -> dict[str, str]:
    """The fingerprints of all that the merge reads; `cpt` is the trained model's."""
    vectors = {
        f"vector {number + 1} {name}": fingerprint(
            model_directory(path) if name != "vector" else Path(path).expanduser()
        )
        for number, vector in enumerate(run.recipe.merge.vectors, start=1)
        for name, path in (("base", vector.base), ("chat", vector.chat), ("vector", vector.vector))
        if path is not None
    }
    return {"cpt": cpt, "tokenizer": run.finished("tokenizer"), **run.pair_inputs(), **vectors}


def _new_text(recipe: Recipe) -> Corpus:
    """The text in the languages that the tokenizer is extended by."""
    new = [
        source
        for source in recipe.corpus.sources
        if source.language in recipe.tokenizer.languages()
    ]
    return recipe.corpus.model_copy(update={"sources": new})


def _lists(recipe: Recipe) -> dict[str, str]:
    return {f"list {path}": fingerprint(path) for path in recipe.tokenizer.pieces_from.values()}


def prompt_inputs(recipe: Recipe) -> dict[str, str]:
    """The fingerprints of the files that the evaluation asks from."""
    return {
        name: fingerprint(Path(path).expanduser())
        for name, path in recipe.evaluation.files().items()
    }


STAGES = [
    Stage(
        "tokenizer",
        lambda r: {"tokenizer": r.tokenizer.model_dump(), "corpus": r.corpus.text()},
        lambda run: {**run.pair_inputs(), **run.corpus_inputs(), **_lists(run.recipe)},
        _tokenizer,
        lambda run: run.tokenizer / "vocabulary_map.json",
    ),
    Stage(
        "embeddings",
        lambda r: {
            "embeddings": r.embeddings.model_dump(),
            **({"corpus": _new_text(r).text()} if r.embeddings.needs_text else {}),
        },
        lambda run: {
            "base": fingerprint(run.base), "tokenizer": run.finished("tokenizer"),
            **(run.corpus_inputs() if run.recipe.embeddings.needs_text else {}),
        },
        _embeddings,
        lambda run: run.resized / "config.json",
    ),
    Stage(
        "data",
        lambda r: {"data": r.data.model_dump(exclude={"processes"}), "corpus": r.corpus.text()},
        lambda run: {"tokenizer": run.finished("tokenizer"), **run.corpus_inputs()},
        _data,
        lambda run: run.store / "store.json",
        resumable=True,
    ),
    Stage(
        "training",
        lambda r: {**r.training.identity(), "mixture": r.corpus.amounts()},
        lambda run: {"model": run.finished("embeddings"), "data": run.finished("data")},
        _training,
        lambda run: run.cpt / "config.json",
        distributed=True,
        resumable=True,
        precious=True,
    ),
    Stage(
        "merge",
        lambda r: r.merge.model_dump(),
        lambda run: merge_inputs(run, run.finished("training")),
        _merge,
        lambda run: run.merged / "config.json",
        resumable=True,
    ),
    Stage(
        "evaluation",
        lambda r: {"evaluation": r.evaluation.model_dump(), "corpus": r.corpus.text()},
        lambda run: {
            "cpt": run.finished("training"), "merged": run.finished("merge"),
            **run.pair_inputs(), **prompt_inputs(run.recipe), **run.corpus_inputs(),
            **{f"model {name}": fingerprint(path) for name, path in run.further_models().items()},
        },
        _evaluation,
        lambda run: run.folder("evaluation") / "results.json",
        is_complete=_nothing_failed,
        distributed=True,
    ),
]  # fmt: skip

COMMANDS = {
    "tokenizer": "tokenizer", "embeddings": "embeddings", "data": "data", "training": "train", "merge": "merge",
    "evaluation": "evaluate",
}  # fmt: skip


def find_stage(name: str) -> Stage:
    """A stage by its name or by its command."""
    return next(stage for stage in STAGES if name in (stage.name, COMMANDS[stage.name]))


def identify(run: Run, stage: Stage) -> tuple[str, dict[str, Any], dict[str, str]]:
    """(key, configuration, inputs) of a stage. Raises `UserError` if a stage that it needs is not finished."""
    config, inputs = dict(stage.config(run.recipe)), stage.inputs(run)
    return stage_key(stage.name, config, inputs), config, inputs


def is_finished(run: Run, stage: Stage) -> bool:
    """Whether the stage's result is there and is that of the recipe as it stands, with all before it finished alike."""
    needed = [
        other
        for other in STAGES[: STAGES.index(stage)]
        if read_record(run.folder(other.name)) is not None
    ]
    try:
        key, _, _ = identify(run, stage)
    except UserError:
        return False
    record = read_record(run.folder(stage.name))
    here = record is not None and record.key == key and stage.is_complete(stage.artifact(run))
    return here and all(is_finished(run, other) for other in needed)
