"""`cpt-merge plan`: what a run would do, its sizes and its memory, from headers and configurations alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.cluster.plan import Request, show_cluster
from cpt_merge.core.errors import UserError
from cpt_merge.core.models import hub_errors, is_local, model_directory
from cpt_merge.core.world import World
from cpt_merge.data.mixture import describe, mixture
from cpt_merge.data.sources import source_files
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import is_up_to_date
from cpt_merge.launcher.stages import STAGES
from cpt_merge.launcher.start import accelerate_config, backend_environment, local_processes
from cpt_merge.tokenizer_ext.given import count_entries
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.flops import experts
from cpt_merge.training.memory import ZERO_STRATEGIES, MemorySetup, ModelShape, estimate_memory

GB = 1e9


def read_shape(recipe: Recipe, dense: bool = False) -> ModelShape:
    """The base model's shape, from its configuration and the headers of its files; of a hub model too.

    Raises `UserError` if the recipe's rows are longer than it has positions, or if it is not dense and must be.
    """
    name = recipe.models.base
    if is_local(name):
        checkpoint = Checkpoint.open(model_directory(name))
        config, parameters = checkpoint.config, _parameters(checkpoint)
    else:
        config, parameters = _read_from_hub(name)
    recipe.training.check_positions(config)
    if dense and experts(SimpleNamespace(**config)) > 1:
        raise UserError(
            f"{name} has experts, and the model of speed knows dense models only; leave out --gpu."
        )
    return ModelShape.from_config(config, parameters, name)


def shape_of(directory: Path, name: str) -> ModelShape:
    """The shape of a model that is on this machine; `name` is what an error calls it."""
    checkpoint = Checkpoint.open(directory)
    return ModelShape.from_config(checkpoint.config, _parameters(checkpoint), name)


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())


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
    lists = [
        Path(path)
        for language, path in config.pieces_from.items()
        if language not in config.new_pieces
    ]
    pieces = sum(config.new_pieces.values()) + sum(map(count_entries, lists))
    return -(-(shape.vocabulary + pieces) // config.pad_to_multiple) * config.pad_to_multiple


def memory_setup(recipe: Recipe, processes: int) -> MemorySetup:
    """How the recipe's accelerate configuration divides memory over so many processes."""
    from cpt_merge.training.distributed.parallel import asked_for

    asked = asked_for(backend_environment(accelerate_config(recipe)))
    if asked.backend == "deepspeed":
        return MemorySetup.of(
            recipe.training, ZERO_STRATEGIES[asked.zero_stage], processes, processes
        )
    if processes == 1 and not recipe.launch.accelerate_config:
        return MemorySetup.of(recipe.training, "single", 1, 1)
    _, shards = asked.mesh_shape(World(size=processes))
    return MemorySetup.of(recipe.training, "fsdp2", processes, shards)


def show_plan(recipe: Recipe, request: Request | None = None) -> None:
    """Print the plan: with a request for a cluster that is not here, and without for the processes of this machine."""
    run, config = Run(recipe), recipe.training
    if request:
        request.workload(config)  # what does not fit together is said before anything else
    base = read_shape(recipe, dense=request is not None)
    shape = base.resized(extended_rows(recipe, base))
    console = Console(highlight=False)
    console.print(f"[bold]{recipe.name}[/]: {recipe.models.base} -> {run.merged}")
    _print_stages(console, run)
    _print_text(console, recipe)
    lines = [
        ("base", f"{base.parameters / 1e6:,.1f} M parameters, {base.vocabulary:,} rows"),
        (
            "extended",
            f"{shape.parameters / 1e6:,.1f} M parameters, at most {shape.vocabulary:,} rows",
        ),
        ("training", f"{config.steps:,} steps of {config.tokens_per_step:,} tokens"),
        *([] if request else _here(recipe, shape)),
        ("disk", str(disk_needed(shape, config))),
    ]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for line in lines:
        table.add_row(*line)
    console.print(table)
    if request:
        if "ACCELERATE_USE_DEEPSPEED" in backend_environment(accelerate_config(recipe)):
            console.print(
                "the recipe's launch.accelerate_config asks for DeepSpeed; the estimate is of FSDP2 and HSDP."
            )
        show_cluster(console, shape, config, request)


def _here(recipe: Recipe, shape: ModelShape) -> list[tuple[str, str]]:
    """What each process of this machine does and needs."""
    processes = local_processes(recipe)
    setup = memory_setup(recipe, processes)
    memory = estimate_memory(shape, setup)
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value / GB:,.2f}" for name, value in vars(memory).items()
    )
    rows = recipe.training.micro_batch_size
    return [
        (
            "processes",
            f"{processes}, each {setup.micro_batches} micro-batches of {rows} sequences a step",
        ),
        ("memory per rank", f"{memory.total / GB:,.2f} GB at once, of: {parts}"),
    ]


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
    return DiskNeeded(
        shape.parameters * 2, shape.parameters * bytes_per_parameter, config.checkpoints.keep
    )


def _print_stages(console: Console, run: Run) -> None:
    words = []
    for stage in STAGES:
        done = is_up_to_date(run, stage)
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
    return (
        [source["train"]["tokens"] for source in json.loads(path.read_text())["sources"]]
        if path.is_file()
        else []
    )
