"""The training stage: build, load, resume, train, export, and the post-training hook."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from checkpoint.reader import Checkpoint
from core.errors import Interrupted, UserError
from core.progress import say, timed
from merge.hook import LocalShard, Ranks, export_shards
from tracking.tracker import Tracker
from training.checkpoints import Checkpoints, TrainState
from training.config import TrainingConfig
from training.loop import Trainer
from training.model import CausalLM, build_model, load_weights, local_rows, named_local_parameters
from training.optimizer import build_optimizer
from training.packing import TrainingRows
from training.parallel import Parallel, parallelise, start_parallel, stop_parallel
from training.stopping import StopRequest
from training.store import Store
from training.validation import heldout_rows

Hook = Callable[[list[LocalShard], Parallel], None]


@dataclass(frozen=True)
class TrainingInputs:
    """What a run of training starts from."""

    model: Path  # the resized base
    tokenizer: Path  # the extended tokenizer
    store: Path  # the token store made with it
    key: str  # names configuration and inputs; checkpoints of another key are refused


def run(
    config: TrainingConfig, inputs: TrainingInputs, out: Path, tracker: Tracker, hook: Hook | None
) -> dict[str, Any]:
    """Train the model on the store; called by all processes. Leaves `out`/checkpoints and the trained model `out`/cpt.

    `hook` is called on all processes with this process's trained shards.
    Raises `Interrupted` when it was asked to stop; everything is saved then.
    """
    torch.manual_seed(config.seed)
    parallel = start_parallel()
    try:
        module, state = train(config, inputs, out, tracker, parallel)
        shards = local_shards(module)
        if parallel.world.is_main:
            shutil.rmtree(out / "cpt", ignore_errors=True)  # of an attempt that was cut short after the export
        parallel.barrier()
        with timed("export of the trained model"):
            ranks = Ranks(parallel.world.rank, parallel.world.size, parallel.barrier)
            export_shards(shards, inputs.model, inputs.tokenizer, out / "cpt", ranks)
        if hook:
            hook(shards, parallel)
        return {"steps": state.step, "tokens": state.tokens, "targets": state.targets}
    finally:
        stop_parallel()


def train(
    config: TrainingConfig, inputs: TrainingInputs, out: Path, tracker: Tracker, parallel: Parallel
) -> tuple[CausalLM, TrainState]:
    """Build, load or resume, and train to the end of the budget."""
    _check_fit(config, inputs.model, parallel)
    store = Store.open(inputs.store)
    store.check_tokenizer(inputs.tokenizer)
    rows = TrainingRows(store, config.sequence_length, config.seed)
    module = parallelise(build_model(inputs.model, config), config, parallel)
    load_weights(module, inputs.model, parallel.device)
    optimizer = build_optimizer(module, config.optimizer)
    checkpoints = Checkpoints(out / "checkpoints", config.keep_checkpoints, parallel)
    say(start_block(config, module, parallel))
    state = checkpoints.load(module, optimizer, inputs.key) or TrainState(0, 0, 0, 0, inputs.key)
    tracker.resume_from(state.step)
    trainer = Trainer(config, module, optimizer, rows, heldout_rows(store, config), checkpoints, parallel, tracker)
    with StopRequest(parallel) as stop:
        state = trainer.train(state, stop)
    if state.step < config.steps:
        tracker.alert("training stopped", f"after step {state.step} of {config.steps}: {stop.reason}")
        raise Interrupted(f"training stopped after step {state.step} of {config.steps} ({stop.reason}); it is saved.")
    return module, state


def _check_fit(config: TrainingConfig, model: Path, parallel: Parallel) -> None:
    positions = Checkpoint.open(model).config.get("max_position_embeddings", config.sequence_length)
    if config.sequence_length > positions:
        raise UserError(
            f"training.sequence_length = {config.sequence_length} but the model has {positions} positions; lower it."
        )
    if config.batch_rows % parallel.world.size:
        raise UserError(
            f"training.batch_rows = {config.batch_rows} does not divide over {parallel.world.size} processes; "
            "set a multiple."
        )


def start_block(config: TrainingConfig, module: CausalLM, parallel: Parallel) -> str:
    """What is active, in one block."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    here = sum(parameter.to_local().numel() for parameter in module.parameters() if isinstance(parameter, DTensor))
    world = parallel.world
    lines = {
        "model": f"{type(module.model).__name__}, {parameters / 1e6:,.1f} M parameters, {here / 1e6:,.1f} M on rank 0",
        "backend": f"FSDP2 over {world.size} process(es), started by {world.launcher}, on {parallel.device.type}",
        "precision": f"{config.precision}, attention {config.attention}"
        + (", compiled" if config.compile else "")
        + (", activation checkpointing" if config.activation_checkpointing else ""),
        "batch": f"{config.batch_rows} rows x {config.sequence_length} = {config.tokens_per_step:,} tokens per step, "
        f"{config.steps:,} steps, {config.steps * config.tokens_per_step:,} tokens",
    }
    return "\n".join(f"  {name:10} {text}" for name, text in lines.items())


def local_shards(module: CausalLM) -> list[LocalShard]:
    """This process's rows of every parameter, in the master type."""
    shards = []
    for name, parameter in named_local_parameters(module):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        shards.append(LocalShard(name, tuple(parameter.shape), local_rows(parameter)[0], local.detach()))
    return shards
