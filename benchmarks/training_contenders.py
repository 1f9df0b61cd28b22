"""Three contenders train the same model on the same packed sequences: ours, a bare loop, Trainer.

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
from typing import Any

from benchmarks.training_inputs import Inputs
from cpt_merge.tracking import Tracker
from cpt_merge.tracking.events import Event, Scalars

ROOT = Path(__file__).parents[1]
RATE, BETAS, CLIP = 1e-4, (0.9, 0.95), 1.0


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

    @property
    def steps(self) -> int:
        """All steps of a contender."""
        return self.interval * (self.intervals + 1)

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


def enter(name: str, case: TrainingCase, rank: int, port: int, connection: Connection) -> None:
    """The body of a contender's process."""
    join(case, rank, port)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        CONTENDERS[name](case, folder, TimedTurn(connection, case))
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
    rows, size = _sequences(case), case.processes
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


def trainer(case: TrainingCase, folder: Path, turn: TimedTurn) -> None:
    """transformers.Trainer as its documentation advises: sdpa, packed by position ids."""
    import torch
    from torch.distributed.fsdp import FSDPModule
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Log(TrainerCallback):  # type: ignore[misc]
        def on_log(self, *_: Any, logs: dict[str, float], model: Any, **__: Any) -> None:
            assert isinstance(model, FSDPModule) == (case.processes > 1), (
                "Trainer does not shard as it was asked to"
            )
            if "loss" in logs:
                turn(logs["loss"])

    model = AutoModelForCausalLM.from_pretrained(
        case.inputs.model, dtype=torch.float32, use_cache=False
    )
    layer = type(model.model.layers[0]).__name__
    sharding = (
        _let_trainer_shard(layer)
        if case.processes > 1
        else {"use_cpu": not torch.cuda.is_available()}
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=case.steps + 1,
        per_device_train_batch_size=case.micro_batch_size,
        gradient_accumulation_steps=(
            case.global_batch_size // (case.processes * case.micro_batch_size)
        ),
        learning_rate=RATE,
        weight_decay=0.1,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        lr_scheduler_type="constant",
        bf16=case.precision == "bf16",
        logging_steps=case.interval,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        **sharding,
    )
    rows = _sequences(case)

    class Packed(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return case.global_batch_size * (case.steps + 1)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            batch = rows.batch([index])
            labels = batch.labels[0]
            return {
                "input_ids": batch.input_ids[0],
                "position_ids": batch.position_ids[0],
                "labels": labels,
                "shift_labels": labels,
            }

    runner = Trainer(model=model, args=arguments, train_dataset=Packed(), callbacks=[Log()])
    runner.train()


def _let_trainer_shard(layer: str) -> dict[str, Any]:
    """FSDP2 for Trainer, whose units are the layers of this class.

    On a CPU, accelerate would silently use DDP. So it is told that gloo processes are as good as
    GPUs (a private method of accelerate 1.15).
    """
    import torch

    if not torch.cuda.is_available():
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType
        from transformers import training_args

        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
        training_args.is_torch_bf16_gpu_available = lambda: True
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [layer]},
    }


def _sequences(case: TrainingCase) -> Any:
    from cpt_merge.data.packing import TrainingSequences
    from cpt_merge.data.store import Store

    return TrainingSequences(Store.open(case.inputs.store), case.length, 0)


CONTENDERS: dict[str, Callable[[TrainingCase, Path, TimedTurn], None]] = {
    "ours": ours,
    "bare": bare,
    "trainer": trainer,
}
