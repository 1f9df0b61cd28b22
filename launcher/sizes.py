"""The sizes of a recipe's run (model, rows, memory, disk), without loading a model."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.quantised import refuse_by_config
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.artifact import existing_parent
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import is_here, model_directory
from cpt_merge.core.hub_repository import Repository, hub_errors
from cpt_merge.core.progress import counted
from cpt_merge.core.world import World
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import Stage, prepare
from cpt_merge.launcher.stage_folder import read_begun
from cpt_merge.launcher.stages import stages_of
from cpt_merge.launcher.start import backend_asked
from cpt_merge.tokenizer_ext.learn.word_lists import count_entries
from cpt_merge.training.config import LoraConfig, TrainingConfig
from cpt_merge.training.memory import (
    ZERO_STRATEGIES,
    MemorySetup,
    ModelShape,
    checkpoint_bytes,
    heaviest,
)

GB = 1e9


def shape_of(directory: Path, name: str, lora: LoraConfig | None = None) -> ModelShape:
    """The shape of a model on this machine; `name` is what an error message calls it."""
    return ModelShape.of(Checkpoint.open(directory), name, lora)


def read_shape(recipe: Recipe, section: str = "training") -> ModelShape:
    """The base model's shape, from its configuration and the headers of its files, also on the hub.

    With the adapters of a section that trains. Raises `UserError` if its sequences are longer than
    the model has positions, or its adapters fit no layer.
    """
    name, training = recipe.models.base, recipe.training
    if section != "training":
        training = recipe.further[section].training_config(training, 1)
    if is_here(name):
        directory = model_directory(name)
        config = Checkpoint.open(directory).config
        shape = shape_of(directory, name, training.lora)
    else:
        config, shape = shape_on_the_hub(name, training.lora)
    if section != "training":
        config = recipe.training.extend(config)  # what is trained further has its positions
    training.check_positions(config, section)
    if training.lora and not shape.adapters:
        targets = ", ".join(training.lora.targets)
        raise UserError(
            f"{section}.lora.targets: {targets} names no linear layer in the decoder of {name}."
        )
    return replace(shape, towers=0) if recipe.models.text_only else shape


def shape_on_the_hub(name: str, lora: LoraConfig | None) -> tuple[dict[str, Any], ModelShape]:
    """The configuration and the shape of a model whose weights are not downloaded."""
    from huggingface_hub import get_safetensors_metadata

    snapshot = Repository.parse("model", name).find()
    path = snapshot.path("config.json") if "config.json" in snapshot.files else None
    if path is None:
        raise UserError(
            f"{snapshot.repository} has no config.json on the hub; if it is an adapter, run "
            "`cpt-merge fetch RECIPE` first."
        )
    with hub_errors(snapshot.repository):
        about = get_safetensors_metadata(snapshot.repository.name, revision=snapshot.commit)
    config = json.loads(path.read_text(encoding="utf-8"))
    refuse_by_config(name, config)
    shapes = {
        tensor: tuple(info.shape)
        for file in about.files_metadata.values()
        for tensor, info in file.tensors.items()
    }
    return config, ModelShape.of_shapes(config, shapes, name, lora)


def extended_rows(recipe: Recipe, shape: ModelShape) -> int:
    """The most rows that the extended vocabulary can have: a piece of two languages is added once.

    A list without a size counts with its entries; the pieces that lead to them are not known yet.
    """
    config = recipe.tokenizer
    lists = [
        Path(path)
        for language, path in config.pieces_from.items()
        if language not in config.new_pieces
    ]
    pieces = sum(config.new_pieces.values()) + sum(map(count_entries, lists))
    if not pieces:
        return shape.vocabulary  # and a row for each token that only the chat model has
    multiple = config.pad_to_multiple
    return -(-(shape.vocabulary + pieces) // multiple) * multiple


def memory_setup(
    recipe: Recipe, config: TrainingConfig, processes: int, train: str = "all"
) -> MemorySetup:
    """How the recipe's accelerate configuration divides memory over so many processes.

    In a phase with the settings `config` that trains `train`.
    """
    asked = backend_asked(recipe, processes)
    _, shards = asked.mesh_shape(World(size=processes))
    if asked.backend == "none":
        return MemorySetup.of(config, "single", 1, 1, train)
    if asked.backend == "deepspeed":
        strategy = ZERO_STRATEGIES[asked.zero_stage]
        setup = MemorySetup.of(config, strategy, processes, processes, train)
    else:
        setup = MemorySetup.of(config, "fsdp2", processes, shards, train)
    return replace(setup, offload=asked.offload)


@dataclass(frozen=True)
class DiskNeeded:
    """Bytes that a run writes: models in 16 bits (the resized base's among them), checkpoints."""

    models: int
    model: float
    checkpoint: float
    kept: int  # checkpoints

    @property
    def total(self) -> float:
        """All of it."""
        return self.models * self.model + self.kept * self.checkpoint

    def __str__(self) -> str:
        return (
            f"{self.total / GB:,.2f} GB: {counted(self.models, 'model')} of "
            f"{self.model / GB:,.2f}, {counted(self.kept, 'checkpoint')} of "
            f"{self.checkpoint / GB:,.2f}"
        )


def check_disk(run: Run, shape: ModelShape) -> None:
    """Raise `UserError` if the disk has no room for what a run has still to write.

    `shape` is the base's.
    """
    recipe = run.recipe
    needed = disk_needed(shape.resized(extended_rows(recipe, shape)), recipe)
    written = sum(
        path.stat().st_size
        for stage in stages_of(recipe)
        if not _is_moved_aside(run, stage)
        for path in run.folder(stage.name).rglob("*")
        if path.is_file()
    )
    free = shutil.disk_usage(existing_parent(recipe.directory)).free
    if free < needed.total - written:
        raise UserError(
            f"{recipe.directory} has {free / GB:,.2f} GB left and the run takes {needed}, of which "
            f"{written / GB:,.2f} GB are already written; free disk space, lower "
            "training.checkpoints.keep, or move `runs`."
        )


def _is_moved_aside(run: Run, stage: Stage) -> bool:
    """Whether a stage keeps what its folder holds in another place when it runs."""
    begun = read_begun(run.folder(stage.name)) if stage.precious else None
    try:
        return begun is not None and begun.key != prepare(run, stage).key
    except UserError:
        return False  # what it builds on is not finished


def disk_needed(shape: ModelShape, recipe: Recipe) -> DiskNeeded:
    """The disk space of a run of a model of this shape."""
    config = recipe.training
    largest = MemorySetup.of(config, "single", 1, 1, heaviest(config))
    checkpoint = checkpoint_bytes(shape, largest)
    model = (shape.parameters + shape.towers) * 2
    made = sum(1 for stage in stages_of(recipe) if stage.output and stage.output.kind == "model")
    kept = config.checkpoints.keep + (config.schedule.shape == "wsd")  # where the rate falls
    kept += sum(map(config.continues, range(len(config.phases))))  # the mixture changes
    for further in recipe.further.values():
        kept += config.checkpoints.keep + (further.schedule.shape == "wsd")
    return DiskNeeded(made, model, checkpoint, kept)
