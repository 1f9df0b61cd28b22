"""Runs of the training stage on the tiny model, in the calling process (one of the ranks)."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.core.errors import Interrupted
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.pairs import Preference
from cpt_merge.data.sources import Corpus
from cpt_merge.data.store import Store
from cpt_merge.launcher.accelerate_file import backend_environment
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.hook import merge_shards, plan_for_shards
from cpt_merge.merge.plan import MergeInputs, MergePlan
from cpt_merge.tracking import Cell, Tracker
from cpt_merge.training.callbacks.preview import Interview
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.inputs import TrainingInputs
from cpt_merge.training.run import run
from cpt_merge.training.schedule import RateCurve
from tests.recording import Recording
from tests.training.conftest import CONFIG

ROOT = Path(__file__).parents[2]


@dataclass
class Job:
    """What is trained, and what happens during the run."""

    model: Path
    store: Path
    out: Path
    changes: dict[str, Any] = field(default_factory=dict)
    backend: str = (
        "fsdp2"  # a file of recipes/accelerate; one process of the default is not sharded
    )
    stop_after: int = 0  # rank 1 (or the only one) gets SIGUSR1 when this step is logged
    signal_in: str = ""  # "evaluation" or "save": rank 1 gets SIGTERM in the first one after step 0
    poison: range = range(0)  # steps whose gradient is made NaN on one rank
    tokenizer: Path | None = None
    kill_when: str = ""  # a file under `out`/checkpoints, of a step from `kill_after_step` on, on whose appearance
    kill_after_step: int = 0
    killed: tuple[int, ...] = (0,)  # these ranks get SIGKILL
    kill_delay: float = 0.0
    chat: Path | None = None  # the chat model that is previewed, `model` being its base
    merge: dict[str, Any] = field(default_factory=dict)  # how it is merged
    beta: float | None = None  # of the loss that compares replies, if `store` has pairs
    corpus: Corpus | None = None  # the weights of the sources; by their sizes if not given
    hook: MergeInputs | None = None  # what the shards are merged with in the end, into `out`/merged

    @property
    def config(self) -> TrainingConfig:
        return TrainingConfig(**{**CONFIG, **self.changes})


def train(job: Job) -> dict[int, float]:
    """Train; the losses that were logged, by step."""
    return {step: loss for step, (loss, _) in train_steps(job).items()}


def train_steps(job: Job) -> dict[int, tuple[float, float]]:
    """Train; loss and gradient norm (before clipping) that were logged, by step."""
    return {
        step: (row["train/loss"], row["train/gradient_norm"])
        for step, row in train_rows(job).items()
    }


def train_rows(job: Job) -> dict[int, dict[str, float]]:
    """Train; the metrics of steps that were logged, by step."""
    ask_for(job.backend)
    recording = Recording()
    record = {"mode": "disabled", "run_id": "id", "group": "group"}
    tracker = Tracker([recording], record)
    if job.stop_after and int(os.environ["RANK"]) == min(1, int(os.environ["WORLD_SIZE"]) - 1):
        signal_when(tracker, job.stop_after)
    if job.signal_in and os.environ["RANK"] == "1":
        signal_within(job.signal_in)
    if job.kill_when and int(os.environ["RANK"]) in job.killed:
        threading.Thread(target=kill_self, args=(job,), daemon=True).start()
    if job.poison:
        poison_batches(job)
    preference = Preference(job.beta, job.out / "reference") if job.beta else None
    inputs = TrainingInputs(
        job.model,
        job.tokenizer or job.model,
        job.store,
        "key",
        corpus=job.corpus,
        preference=preference,
    )
    try:
        run(job.config, inputs, job.out, tracker, hook_of(job), previewed_by(job))
    except Interrupted:
        assert job.stop_after or job.signal_in
    return {step: row for step, row in recording.rows if step and "train/loss" in row}


def hook_of(job: Job) -> Callable[[list[LocalShard], Parallel], None] | None:
    """The post-training hook of a job, if it has one."""
    models = job.hook
    if models is None:
        return None
    config = MergeConfig(**job.merge)
    return lambda shards, parallel: merge_shards(
        shards, config, models, job.out / "merged", Tracker(), parallel
    )


PROMPTS = [[0, 40, 41], [0, 50, 51, 52, 53], [0, 60]]


def previewed_by(job: Job) -> tuple[MergePlan, Interview] | None:
    """The preview of a job with a chat model; its table has the ids of the replies."""
    if job.chat is None:
        return None

    def score(replies: list[list[int]]) -> tuple[dict[str, float], list[list[Cell]]]:
        return {"replies": float(len(replies))}, [[" ".join(map(str, reply))] for reply in replies]

    merge_plan = plan_for_shards(
        MergeConfig(**job.merge), MergeInputs(job.model, job.model, job.chat, job.model)
    )
    return merge_plan, Interview(PROMPTS, frozenset({1}), ("step", "reply"), score)


def ask_for(backend: str) -> None:
    """Set what a launcher would."""
    if os.environ["WORLD_SIZE"] != "1" or backend != "fsdp2":
        os.environ.update(backend_environment(ROOT / "recipes" / "accelerate" / f"{backend}.yaml"))


def signal_when(tracker: Tracker, step: int) -> None:
    log = tracker.log

    def log_and_signal(
        metrics: dict[str, float], step_now: int | None = None, **names: Any
    ) -> None:
        log(metrics, names.get("step", step_now))
        if names.get("step", step_now) == step:
            os.kill(os.getpid(), signal.SIGUSR1)

    tracker.log = log_and_signal  # type: ignore[method-assign]


def signal_within(what: str) -> None:
    """SIGTERM for this process during an evaluation or while a checkpoint is written."""
    from cpt_merge.training.distributed.checkpoint import Checkpoints
    from cpt_merge.training.distributed.fsdp import TorchBackend

    owner, name = {"evaluation": (TorchBackend, "loss"), "save": (Checkpoints, "_commit")}[what]
    original, calls = getattr(owner, name), [0]

    def signalled(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == {"evaluation": 5, "save": 1}[what]:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    setattr(owner, name, signalled)


def kill_self(job: Job) -> None:
    """SIGKILL for this process once the file of the job exists."""
    folder = job.out / "checkpoints"
    while True:
        steps = [
            int(path.relative_to(folder).parts[0][5:13]) for path in folder.glob(job.kill_when)
        ]
        if max(steps, default=-1) >= job.kill_after_step:
            break
        time.sleep(0.0005)
    time.sleep(job.kill_delay)
    os.kill(os.getpid(), signal.SIGKILL)


def poison_batches(job: Job) -> None:
    """On rank 0, make the loss of certain sequences NaN."""
    from cpt_merge.training.model.build import CausalLM

    forward: Callable[..., torch.Tensor] = CausalLM.forward
    config, rows = (
        job.config,
        TrainingSequences(Store.open(job.store), job.config.sequence_length, 0),
    )
    bad = {
        tuple(rows.batch([step * config.global_batch_size]).input_ids[0].tolist())
        for step in job.poison
    }  # rank 0 has the first row of every step

    def poisoned(self: CausalLM, batch: Any, last: torch.Tensor | None = None) -> torch.Tensor:
        loss = forward(self, batch, last)
        found = tuple(batch.input_ids[0].tolist()) in bad and torch.is_grad_enabled()
        return loss * float("nan") if found else loss

    CausalLM.forward = poisoned  # type: ignore[method-assign]


def reference_losses(model_path: Path, store: Path) -> dict[int, float]:
    """The losses of `reference_steps`."""
    return {step: loss for step, (loss, _) in reference_steps(model_path, store).items()}


def reference_steps(model_path: Path, store: Path) -> dict[int, tuple[float, float]]:
    """The same in plain torch, on one process with whole batches: loss and gradient norm."""
    config = TrainingConfig(**CONFIG)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    losses: dict[int, tuple[float, float]] = {}
    rows = TrainingSequences(Store.open(store), config.sequence_length, config.seed)
    for step in range(config.steps):
        batch = rows.batch(list(range(step * 8, step * 8 + 8)))
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * RateCurve.over(0, config.steps, config.schedule).factor(
                step, config.schedule
            )
        optimizer.step()
        optimizer.zero_grad()
        losses[step + 1] = (loss.item(), norm.item())
    return losses


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The exported model."""
    return load_file(out / "cpt" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    found = weights(other)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, found[name]), name
