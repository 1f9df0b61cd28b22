"""What is active when a phase starts, read from the objects and not from the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.progress import counted
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.backend import Backend
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.memory import MemorySetup, ModelShape, available_memory, estimate_memory
from cpt_merge.training.model.choice import Choice
from cpt_merge.training.model.documents import NOTHING_ELSE, padding_share
from cpt_merge.training.phases import PhaseSetup
from cpt_merge.training.stretches import Stretch, describe_stretches

GB = 1e9
_SAMPLE = 64  # micro-batches by which padding is measured


def startup_summary(
    setup: PhaseSetup,
    backend: Backend,
    parallel: Parallel,
    stretches: Sequence[Stretch],
    sequences: TrainingSequences,
) -> str:
    """Lines of `name  what is active`."""
    config, phase, device = setup.config, setup.phase, parallel.device
    micro_batches = config.micro_batches(parallel.size)
    written = (
        ", written during training" if backend.writes_asynchronously(config.checkpoints) else ""
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = {
        **backend.describe(),
        **_documents(backend.choice, sequences, config),
        "device": f"{name}, {parallel.world.started}",
        "step": f"{config.global_batch_size} sequences of {config.sequence_length} = "
        f"{config.tokens_per_step:,} tokens; each process "
        f"{counted(micro_batches, 'micro-batch')} of {config.micro_batch_size} sequences",
        "run": f"{config.steps:,} steps, {config.steps * config.tokens_per_step:,} tokens",
        **({"positions": str(config.context)} if config.rope else {}),
        "text": "\n              ".join(describe_stretches(stretches)),
        "phase": f"{phase.number + 1}: steps {phase.start + 1:,} to {phase.stop:,} train "
        f"{phase.train}, learning rate {phase.learning_rate:g}, "
        f"embedding and head {phase.embedding_learning_rate:g}",
        "checkpoints": f"every {config.checkpoints.every} steps, "
        f"{backend.state_bytes() / GB:,.2f} GB each{written}",
        "memory": _memory_line(setup, backend, parallel),
    }
    return "\n".join(f"  {name:<11} {text}" for name, text in lines.items())


def _documents(
    choice: Choice, sequences: TrainingSequences, config: TrainingConfig
) -> dict[str, str]:
    """How packed documents are kept apart, if not by the attention alone."""
    if choice.separation == NOTHING_ELSE:
        return {}
    text = choice.separation.describe()
    if choice.separation.one_by_one:
        text += f", {padding_line(sequences, config)}"
    return {"documents": text}


def padding_line(sequences: TrainingSequences, config: TrainingConfig) -> str:
    """What documents one by one cost, by the first micro-batches of a run."""
    size = config.micro_batch_size
    starts = range(0, min(_SAMPLE * size, config.steps * config.global_batch_size), size)
    share = padding_share(sequences.documents(range(start, start + size)) for start in starts)
    return (
        f"those of similar length together; padding is {share:.1%} of the positions computed "
        "there, and counts in neither loss, tokens nor schedule"
    )


def _memory_line(setup: PhaseSetup, backend: Backend, parallel: Parallel) -> str:
    """The estimated memory of one process, and what it can have."""
    shape = ModelShape.of(Checkpoint.open(setup.model), str(setup.model), setup.config.lora)
    memory = replace(
        MemorySetup.of(
            setup.config, backend.strategy, parallel.size, backend.shard_count, setup.phase.train
        ),
        attention=backend.choice.attention,
        offload=parallel.settings.offload,
    )
    estimate, there = estimate_memory(shape, memory), available_memory(parallel.device)
    needed, elsewhere = estimate.total, estimate.on_host
    if parallel.device.type == "cpu":
        needed, elsewhere = needed + elsewhere, 0.0
    warning = "; MORE THAN IS AVAILABLE" if needed > there else ""
    host = f", and {elsewhere / GB:,.2f} GB of the CPU's" if elsewhere else ""
    return f"about {needed / GB:,.2f} GB per process, {there / GB:,.2f} GB available{warning}{host}"
