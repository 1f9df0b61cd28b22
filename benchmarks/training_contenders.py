"""Contenders train the same model on the same packed sequences: here ours, and a bare loop.

Fresh processes of each warm up and then wait. `TimedTurn` lets them train one interval of steps at
a time, so they take turns within seconds and other work on the machine affects all alike.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.training_inputs import Inputs
from cpt_merge.tracking import Tracker
from cpt_merge.tracking.events import Event, Scalars

if TYPE_CHECKING:
    from cpt_merge.data.packing import TrainingSequences

ROOT = Path(__file__).parents[1]
RATE, BETAS, CLIP, LORA_RANK = 1e-4, (0.9, 0.95), 1.0, 16


@dataclass(frozen=True)
class TrainingCase:
    """What is trained, and how."""

    inputs: Inputs
    precision: str  # bf16 or fp32
    processes: int
    length: int
    global_batch_size: int  # of all processes, in a step
    micro_batch_size: int
    interval: int  # steps between two rows of the log
    intervals: int  # how many are measured, after one that warms up
    lora: bool = False  # adapters of rank LORA_RANK in the decoder, embedding and head in full

    @property
    def steps(self) -> int:
        """All steps of a contender."""
        return self.interval * (self.intervals + 1)

    @property
    def micro_batches(self) -> int:
        """Of a process, in a step."""
        return self.global_batch_size // (self.processes * self.micro_batch_size)

    @property
    def tokens(self) -> int:
        """Tokens of an interval, over all processes."""
        return self.interval * self.global_batch_size * self.length


@dataclass(frozen=True)
class TimedInterval:
    """What a process found in one interval. Seconds, and MB of peak resident memory."""

    wall: float
    delay: float  # of `wall`, while the main thread could run but others had the CPUs
    cpu: float  # of all threads
    peak: float
    loss: float  # of its last step (Trainer: a mean), which shows that all train the same


class Finished(Exception):  # noqa: N818 - not an error
    """All intervals are done."""


class TimedTurn:
    """Called by a contender at the end of each interval: reports it, and waits for the next."""

    def __init__(self, connection: Connection, case: TrainingCase) -> None:
        self.connection, self.left = connection, case.intervals + 1
        self._start()

    def _start(self) -> None:
        self._wall, self._delay, self._cpu = (
            time.perf_counter(),
            run_queue_delay(),
            time.process_time(),
        )

    def __call__(self, loss: float) -> None:
        """Raises `Finished` after the last interval."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.connection.send(
            TimedInterval(wall, run_queue_delay() - self._delay, cpu, peak_megabytes(), loss)
        )
        self.left -= 1
        if not self.left:
            raise Finished
        self.connection.recv()
        self._start()


Contender = Callable[[TrainingCase, Path, TimedTurn], None]
"""Trains a case in a folder of its own, and calls the turn at the end of each interval."""


def run_queue_delay() -> float:
    """Seconds that this thread has waited for a CPU."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def peak_megabytes() -> float:
    """Peak resident memory of this process (ru_maxrss would count its parent's too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1.024e-3 for line in lines if line.startswith("VmHWM"))


def join(case: TrainingCase, rank: int, port: int) -> None:
    """Set rank and world size, as torchrun would."""
    if case.processes > 1:  # a single one with a rank would make Trainer wrap its model in DDP
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(case.processes),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(case.processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )


def enter(
    train: Contender, case: TrainingCase, rank: int, port: int, connection: Connection
) -> None:
    """The body of a contender's process."""
    join(case, rank, port)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        train(case, folder, TimedTurn(connection, case))
    except Finished:
        pass
    finally:
        shutil.rmtree(folder)
    os._exit(0)  # do not take down process groups in the middle of a run


def settings(case: TrainingCase) -> dict[str, Any]:
    """The recipe's `training` section."""
    return {
        "sequence_length": case.length,
        "global_batch_size": case.global_batch_size,
        "micro_batch_size": case.micro_batch_size,
        "tokens": case.length * case.global_batch_size * (case.steps + 1),
        "precision": case.precision,
        "optimizer": {"learning_rate": RATE, "beta1": BETAS[0], "beta2": BETAS[1], "clip": CLIP},
        "schedule": {"warmup": 0, "final": 1.0},
        "log_every": case.interval,
        "evaluate_every": 10**6,
        "evaluate_sequences": 1,
        "continuations": 0,
        "checkpoints": {"every": 10**6},
        **({"lora": {"rank": LORA_RANK}} if case.lora else {}),
    }


def ask_for_fsdp(case: TrainingCase) -> None:
    """Several processes shard by FSDP2."""
    from cpt_merge.launcher.accelerate_file import backend_environment

    if case.processes > 1:
        os.environ.update(backend_environment(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"))


class _Intervals:
    """A sink that ends an interval with each row of training metrics."""

    def __init__(self, turn: TimedTurn) -> None:
        self.turn = turn

    def begin(self, kept: float | None) -> None: ...

    def write(self, event: Event) -> None:
        if isinstance(event, Scalars) and "train/loss" in event.values:
            self.turn(event.values["train/loss"])

    def finish(self, failed: bool) -> None: ...


def ours(case: TrainingCase, folder: Path, turn: TimedTurn) -> None:
    """The training stage as it is."""
    from cpt_merge.training.config import TrainingConfig
    from cpt_merge.training.inputs import TrainingInputs
    from cpt_merge.training.run import run

    ask_for_fsdp(case)
    inputs = TrainingInputs(case.inputs.model, case.inputs.model, case.inputs.store, "benchmark")
    run(TrainingConfig(**settings(case)), inputs, folder, Tracker([_Intervals(turn)]), None)


def bare(case: TrainingCase, folder: Path, turn: TimedTurn) -> None:
    """Forward, backward, clip, step of our model on tensors in memory: no loop can be faster."""
    import torch

    from cpt_merge.training.config import TrainingConfig
    from cpt_merge.training.distributed.fsdp import TorchBackend
    from cpt_merge.training.distributed.parallel import start_parallel
    from cpt_merge.training.phases import PhaseSetup, phases_of
    from cpt_merge.training.prefetch import micro_batches

    ask_for_fsdp(case)
    config, parallel = TrainingConfig(**settings(case)), start_parallel()
    backend = TorchBackend.build(
        PhaseSetup(config, phases_of(config)[0], case.inputs.model, 0), parallel
    )
    rows, size = sequences(case), case.processes
    steps = []
    for step in range(case.steps):
        first = step * case.global_batch_size
        micro = micro_batches(first, case.global_batch_size, case.micro_batch_size, parallel)
        targets = rows.targets(range(first, first + case.global_batch_size))
        steps.append((targets, [rows.batch(indices).to(parallel.device) for indices in micro]))
    module, copy, optimizer = backend.running, backend.copy, backend.optimizer
    for step, (targets, batches) in enumerate(steps, 1):
        total = 0.0
        for batch in batches:
            loss = module(batch) * (size / targets)
            loss.backward()
            total += loss.item() if step % case.interval == 0 else 0.0
        torch.nn.utils.clip_grad_norm_(backend.module.parameters(), CLIP)
        optimizer.step()
        if copy:
            copy.refresh()
        optimizer.zero_grad()
        if step % case.interval == 0:
            turn(parallel.total(total) / size)


def sequences(case: TrainingCase) -> TrainingSequences:
    """The sequences of a run, in their order."""
    from cpt_merge.data.packing import TrainingSequences
    from cpt_merge.data.store import Store

    return TrainingSequences(Store.open(case.inputs.store), case.length, 0)
