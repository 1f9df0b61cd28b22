"""`cpt-merge plan`: what a run would do, its sizes and its memory, from headers and configurations alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoint.reader import Checkpoint
from core.errors import UserError
from core.models import hub_errors, is_local, model_directory
from core.sources import source_files
from core.world import World
from launcher.recipe import Recipe
from launcher.stages import STAGES, Run, is_finished
from launcher.start import accelerate_config, backend_environment, local_processes
from tokenizer_ext.given import count_entries
from training.config import TrainingConfig
from training.memory import ZERO_STRATEGIES, MemorySetup, ModelShape, estimate_memory
from training.mixture import describe, mixture

GB = 1e9


def read_shape(recipe: Recipe) -> ModelShape:
    """The base model's shape, from its configuration and the headers of its files; of a hub model too."""
    name = recipe.models.base
    if is_local(name):
        return shape_of(model_directory(name), name)
    config, parameters = _read_from_hub(name)
    return ModelShape.from_config(config, parameters, name)


def shape_of(directory: Path, name: str) -> ModelShape:
    """The shape of a model that is on this machine; `name` is what an error calls it."""
    checkpoint = Checkpoint.open(directory)
    parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    return ModelShape.from_config(checkpoint.config, parameters, name)


def _read_from_hub(name: str) -> tuple[dict[str, Any], int]:
    """(config.json, number of parameters) of a hub model."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    with hub_errors(name):
        config = json.loads(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
        return config, sum(get_safetensors_metadata(name).parameter_count.values())


def extended_rows(recipe: Recipe, shape: ModelShape) -> int:
    """Rows after the extension: at most this many, since a piece that two languages share is added once.

    Lists without a size count with their entries; the steps towards those are found when they are read.
    """
    config = recipe.tokenizer
    lists = [Path(path) for language, path in config.pieces_from.items() if language not in config.new_pieces]
    pieces = sum(config.new_pieces.values()) + sum(map(count_entries, lists))
    return -(-(shape.vocabulary + pieces) // config.pad_to_multiple) * config.pad_to_multiple


def memory_setup(recipe: Recipe, processes: int) -> MemorySetup:
    """How the recipe's accelerate configuration divides memory over so many processes."""
    from training.parallel import asked_for

    asked = asked_for(backend_environment(accelerate_config(recipe)))
    if asked.backend == "deepspeed":
        return MemorySetup.of(recipe.training, ZERO_STRATEGIES[asked.zero_stage], processes, processes)
    if processes == 1 and not recipe.launch.accelerate_config:
        return MemorySetup.of(recipe.training, "single", 1, 1)
    _, shards = asked.mesh_shape(World(size=processes))
    return MemorySetup.of(recipe.training, "fsdp2", processes, shards)


def show_plan(recipe: Recipe) -> None:
    """Print the plan."""
    run, config = Run(recipe), recipe.training
    base = read_shape(recipe)
    shape = base.resized(extended_rows(recipe, base))
    processes = local_processes(recipe)
    rows = config.micro_batch_rows
    setup = memory_setup(recipe, processes)
    memory = estimate_memory(shape, setup)
    parts = ", ".join(f"{name.replace('_', ' ')} {value / GB:,.2f}" for name, value in vars(memory).items())
    console = Console(highlight=False)
    console.print(f"[bold]{recipe.name}[/]: {recipe.models.base} -> {run.merged}")
    _print_stages(console, run)
    _print_text(console, recipe)
    lines = [
        ("base", f"{base.parameters / 1e6:,.1f} M parameters, {base.vocabulary:,} rows"),
        ("extended", f"{shape.parameters / 1e6:,.1f} M parameters, at most {shape.vocabulary:,} rows"),
        ("training", f"{config.steps:,} steps of {config.tokens_per_step:,} tokens"),
        ("processes", f"{processes}, each {setup.micro_batches} micro-batches of {rows} rows a step"),
        ("memory per rank", f"{memory.total / GB:,.2f} GB at once, of: {parts}"),
        ("disk", str(disk_needed(shape, config))),
    ]  # fmt: skip
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for line in lines:
        table.add_row(*line)
    console.print(table)


@dataclass(frozen=True)
class DiskNeeded:
    """What a run writes, in bytes: three models in 16 bits (resized, trained, merged) and the checkpoints it keeps."""

    model: float
    checkpoint: float
    kept: int

    @property
    def total(self) -> float:
        """All of it."""
        return 3 * self.model + self.kept * self.checkpoint

    def __str__(self) -> str:
        return (
            f"{self.total / GB:,.2f} GB: three models of {self.model / GB:,.2f}, "
            f"{self.kept} checkpoints of {self.checkpoint / GB:,.2f}"
        )


def disk_needed(shape: ModelShape, config: TrainingConfig) -> DiskNeeded:
    """The disk space of a run of a model of this shape."""
    bytes_per_parameter = 6 if config.precision == "pure-bf16" else 12
    return DiskNeeded(shape.parameters * 2, shape.parameters * bytes_per_parameter, config.checkpoints.keep)


def _print_stages(console: Console, run: Run) -> None:
    words = []
    for stage in STAGES:
        done = is_finished(run, stage)
        words.append(f"{stage.name} [green]done[/]" if done else f"{stage.name} [yellow]to do[/]")
    console.print("stages: " + ", ".join(words))


def _print_text(console: Console, recipe: Recipe) -> None:
    sources = recipe.corpus.sources
    for source in sources:
        files = source_files(source)
        size = f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB" if files else "hub"
        console.print(f"text: {source.path} ({source.language}, {size})")
    known = _known_tokens(Run(recipe))
    available = known if len(known) == len(sources) else [None] * len(sources)
    try:
        lines = describe(mixture(recipe.corpus, available, recipe.training.tokens))
    except UserError as error:
        lines = [str(error)]
    for line in lines:
        console.print(f"mixture: {line}", markup=False)


def _known_tokens(run: Run) -> list[int | None]:
    path = run.store / "store.json"
    return [source["train"]["tokens"] for source in json.loads(path.read_text())["sources"]] if path.is_file() else []
