"""How long an asynchronous and a synchronous save of the same state hold up training."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.training_contenders import TrainingCase, ask_for_fsdp, settings


@dataclass(frozen=True)
class Save:
    """Seconds that a save held up training, until it was on disk, and of a step meanwhile."""

    synchronous: bool
    stall: float
    written: float
    step: float
    quiet_step: float  # of a step while nothing is written


def measure_saves(case: TrainingCase, folder: Path, rounds: int) -> tuple[int, list[Save]]:
    """(bytes of a checkpoint, saves of both kinds in turn after the first of each) on a process."""
    from cpt_merge.data.packing import TrainingSequences
    from cpt_merge.data.store import Store
    from cpt_merge.training.config import CheckpointConfig, TrainingConfig
    from cpt_merge.training.distributed.build import build_backend
    from cpt_merge.training.distributed.checkpoint import Checkpoints, TrainState
    from cpt_merge.training.distributed.parallel import start_parallel
    from cpt_merge.training.phases import PhaseSetup, phases_of

    ask_for_fsdp(case)
    os.sync()
    config, parallel = TrainingConfig(**settings(case)), start_parallel()
    backend = build_backend(
        PhaseSetup(config, phases_of(config)[0], case.inputs.model, 0), parallel
    )
    batch = TrainingSequences(Store.open(case.inputs.store), case.length, 0).batch(
        [parallel.world.rank]
    )

    def step() -> float:
        started = time.perf_counter()
        backend.backward(batch, 1 / case.length, last=True)
        backend.step(1.0)
        return time.perf_counter() - started

    saves, kinds = [], {}
    for synchronous in (True, False):
        kinds[synchronous] = Checkpoints(
            folder / f"synchronous-{synchronous}",
            CheckpointConfig(keep=1, asynchronous=not synchronous),
            parallel,
        )
        kinds[synchronous].start()
    for number in range(1, rounds + 2):
        for synchronous, checkpoints in kinds.items():
            step()
            quiet = step()
            parallel.barrier()
            started = time.perf_counter()
            checkpoints.save(backend, TrainState("benchmark", number))
            stall = time.perf_counter() - started
            during = step()
            checkpoints.finish()
            if number > 1:
                saves.append(Save(synchronous, stall, time.perf_counter() - started, during, quiet))
    size = backend.state_bytes()
    parallel.barrier()
    if parallel.world.is_main:
        shutil.rmtree(folder)
    return size, saves
