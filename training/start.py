"""What is active when training starts, in one block; found on the objects themselves, not in the recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.data.mixture import SourceShare, describe
from cpt_merge.training.callbacks.throughput import Throughput
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.backend import Backend
from cpt_merge.training.distributed.build import Start
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.flops import flops_per_token, peak_flops
from cpt_merge.training.memory import MemorySetup, ModelShape, available_memory, estimate_memory

GB = 1e9


def start_block(
    start: Start, backend: Backend, parallel: Parallel, shares: Sequence[SourceShare]
) -> str:
    """The block, as lines of `name  what is active`."""
    config, phase, world = start.config, start.phase, parallel.world
    micro = -(-config.global_batch_size // (world.size * config.micro_batch_size))
    lines = {
        **backend.describe(),
        "device": f"{device_name(parallel.device)}, started by {world.launcher}",
        "step": f"{config.global_batch_size} sequences of {config.sequence_length} = {config.tokens_per_step:,} tokens; "
        f"each process {micro} micro-batch{'es' if micro > 1 else ''} of {config.micro_batch_size} sequences",
        "run": f"{config.steps:,} steps, {config.steps * config.tokens_per_step:,} tokens",
        "text": "\n              ".join(describe(shares)),
        "phase": f"{phase.number + 1}: steps {phase.start + 1:,} to {phase.stop:,} train {phase.train}, learning rate "
        f"{phase.learning_rate:g}, embedding and head {phase.embedding_learning_rate:g}",
        "checkpoints": f"every {config.checkpoints.every} steps, {backend.state_bytes() / GB:,.2f} GB each"
        + (
            ", written while training goes on"
            if backend.writes_asynchronously(config.checkpoints)
            else ""
        ),
        "memory": memory_line(start, backend, parallel),
    }
    return "\n".join(f"  {name:<11} {text}" for name, text in lines.items())


def memory_line(start: Start, backend: Backend, parallel: Parallel) -> str:
    """The estimate for one process against what it can have."""
    checkpoint = Checkpoint.open(start.model)
    parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    shape = ModelShape.from_config(checkpoint.config, parameters, str(start.model))
    setup = replace(
        MemorySetup.of(start.config, backend.strategy, parallel.world.size, backend.shard_count),
        vocabulary_only=start.phase.train != "all",
    )
    needed, there = estimate_memory(shape, setup).total, available_memory(parallel.device)
    warning = "; MORE THAN THERE IS" if needed > there else ""
    return f"about {needed / GB:,.2f} GB a process needed, {there / GB:,.2f} GB there{warning}"


def device_name(device: torch.device) -> str:
    """A name to read."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def throughput_of(config: TrainingConfig, model: Path, parallel: Parallel) -> Throughput:
    """The meter of a run, with what MFU needs where it is known: on a CPU only if `peak_tflops` is set."""
    checkpoint = Checkpoint.open(model)
    parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    peak = None
    if config.peak_tflops:
        peak = config.peak_tflops * 1e12
    elif parallel.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(parallel.device))
    flops = (
        flops_per_token(AutoConfig.from_pretrained(model), parameters, config.sequence_length)
        if peak
        else None
    )
    return Throughput(config, parallel, flops, peak)
