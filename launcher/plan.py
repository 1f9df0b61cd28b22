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
from launcher.recipe import Recipe
from launcher.stages import STAGES, Run, is_finished
from launcher.start import local_processes
from tokenizer_ext.given import count_entries
from training.config import TrainingConfig

GB = 1e9


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that its memory follows from."""

    parameters: int
    vocabulary: int
    width: int
    layers: int
    matrices: int  # 1 if embedding and head are tied, else 2

    def resized(self, vocabulary: int) -> ModelShape:
        """The same model with another number of rows."""
        more = (vocabulary - self.vocabulary) * self.width * self.matrices
        return ModelShape(self.parameters + more, vocabulary, self.width, self.layers, self.matrices)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank, by part."""

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return float(sum(vars(self).values()))


def estimate_memory(shape: ModelShape, config: TrainingConfig, processes: int) -> MemoryEstimate:
    """Memory of one rank under FSDP2.

    Sharded over the processes: parameters and gradients in the master type (fp32: 4 bytes) and AdamW's two moments.
    Gathered: the two largest units (a layer, and embedding with head) in the compute type, with their gradients.
    Activations of one micro-batch of b rows of s tokens and width h: 34 s b h per layer at 2 bytes, or 2 s b h with
    full activation checkpointing (Korthikanti et al., Reducing Activation Recomputation, 2022, with attention that
    stores no scores), or 16 s b h with selective (input, attention, and of seven matmuls the first, third, fifth and
    seventh, of a layer whose inner width is 3 h). Logits: one chunk in fp32, twice, and the head's gradient in fp32.
    """
    master = 2 if config.precision == "pure-bf16" else 4
    compute = 4 if config.precision == "fp32" else 2
    vocabulary = shape.vocabulary * shape.width * shape.matrices
    layer = (shape.parameters - vocabulary) / max(shape.layers, 1)
    per_layer = {"none": 34, "full": 2, "selective": 16}[config.activation_checkpointing]
    tokens = config.sequence_length * config.micro_batch_rows
    return MemoryEstimate(
        parameters=shape.parameters * master / processes,
        gradients=shape.parameters * master / processes,
        optimizer=shape.parameters * 2 * master / processes,
        gathered=2 * compute * (layer + vocabulary),
        activations=per_layer * tokens * shape.width * shape.layers * compute / 2,
        logits=2 * 4 * min(config.loss_chunk, tokens) * shape.vocabulary + 4 * shape.vocabulary * shape.width,
    )


def read_shape(recipe: Recipe) -> ModelShape:
    """The base model's shape, from its configuration and the headers of its files; of a hub model too."""
    name = recipe.models.base
    if is_local(name):
        checkpoint = Checkpoint.open(model_directory(name))
        config, parameters = checkpoint.config, sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    else:
        config, parameters = _read_from_hub(name)
    for wanted in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if wanted not in config:
            raise UserError(f"config.json of {name} has no {wanted}; only decoder language models can be planned.")
    matrices = 1 if config.get("tie_word_embeddings") else 2
    return ModelShape(
        parameters, int(config["vocab_size"]), int(config["hidden_size"]), int(config["num_hidden_layers"]), matrices
    )


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


def show_plan(recipe: Recipe) -> None:
    """Print the plan."""
    run, config = Run(recipe), recipe.training
    base = read_shape(recipe)
    shape = base.resized(extended_rows(recipe, base))
    processes = local_processes(recipe)
    memory = estimate_memory(shape, config, processes)
    micro = -(-config.batch_rows // (processes * config.micro_batch_rows))
    parts = ", ".join(f"{name} {value / GB:,.2f}" for name, value in vars(memory).items())
    console = Console(highlight=False)
    console.print(f"[bold]{recipe.name}[/]: {recipe.models.base} -> {run.merged}")
    _print_stages(console, run)
    _print_text(console, recipe)
    rows = [
        ("base", f"{base.parameters / 1e6:,.1f} M parameters, {base.vocabulary:,} rows"),
        ("extended", f"{shape.parameters / 1e6:,.1f} M parameters, at most {shape.vocabulary:,} rows"),
        ("training", f"{config.steps:,} steps of {config.tokens_per_step:,} tokens"),
        ("processes", f"{processes}, each {micro} micro-batches of {config.micro_batch_rows} rows a step"),
        ("memory per rank", f"{memory.total / GB:,.2f} GB: {parts}"),
        ("disk", _disk(shape, config)),
    ]  # fmt: skip
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _disk(shape: ModelShape, config: TrainingConfig) -> str:
    model, checkpoint = shape.parameters * 2 / GB, shape.parameters * 12 / GB
    total = 3 * model + config.keep_checkpoints * checkpoint
    return f"{total:,.2f} GB: three models of {model:,.2f}, {config.keep_checkpoints} checkpoints of {checkpoint:,.2f}"


def _print_stages(console: Console, run: Run) -> None:
    words = []
    for stage in STAGES:
        done = is_finished(run, stage)
        words.append(f"{stage.name} [green]done[/]" if done else f"{stage.name} [yellow]to do[/]")
    console.print("stages: " + ", ".join(words))


def _print_text(console: Console, recipe: Recipe) -> None:
    total = sum(source.weight for source in recipe.corpus.sources)
    tokens = recipe.training.steps * recipe.training.tokens_per_step
    counts = _known_tokens(Run(recipe))
    for number, source in enumerate(recipe.corpus.sources):
        share = source.weight / total
        files = source_files(source)
        size = f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB" if files else "hub"
        line = f"text: {source.path} ({source.language}, {size}): {share:.0%} = {share * tokens:,.0f} tokens"
        if number < len(counts):
            line += f", {share * tokens / counts[number]:.1f} epochs"
        console.print(line)


def _known_tokens(run: Run) -> list[int]:
    path = run.store / "store.json"
    return [source["train"]["tokens"] for source in json.loads(path.read_text())["sources"]] if path.is_file() else []
