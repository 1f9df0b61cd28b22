"""The training stage: train, export, and hand the trained shards to the post-training hook."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.core.distributed import stop_process_group
from cpt_merge.core.progress import timed
from cpt_merge.merge.plan import MergePlan
from cpt_merge.tracking import Tracker
from cpt_merge.training.callbacks.callback import Callback
from cpt_merge.training.callbacks.checkpoint import CheckpointSaving
from cpt_merge.training.callbacks.continuations import Continuations
from cpt_merge.training.callbacks.evaluate import HeldoutEvaluation
from cpt_merge.training.callbacks.garbage import GarbageCollection
from cpt_merge.training.callbacks.log import MetricsLog
from cpt_merge.training.callbacks.nonfinite import NonFiniteSteps
from cpt_merge.training.callbacks.preference import PreferencePairs
from cpt_merge.training.callbacks.preview import Interview, Preview
from cpt_merge.training.callbacks.routing import RoutingLog
from cpt_merge.training.callbacks.shield import SourceShield
from cpt_merge.training.callbacks.spikes import SpikeDetection
from cpt_merge.training.callbacks.throughput import Throughput
from cpt_merge.training.callbacks.watchdog import StepWatchdog
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.parallel import Parallel, start_parallel
from cpt_merge.training.growth import describe_growth
from cpt_merge.training.inputs import TrainingInputs
from cpt_merge.training.trainer import Trainer

Hook = Callable[[list[LocalShard], Parallel], None]


def default_callbacks(
    config: TrainingConfig,
    previewed: tuple[MergePlan | None, Interview] | None,
    compares: bool = False,
) -> list[Callback]:
    """What happens next to the steps, in the order that `callbacks.callback` explains."""
    preview = [Preview(*previewed)] if previewed and config.preview.every else []
    return [
        StepWatchdog(),
        Throughput(),
        SpikeDetection(),
        NonFiniteSteps(),
        RoutingLog(),
        *([PreferencePairs()] if compares else []),
        *([SourceShield(config.shield)] if config.shield else []),
        MetricsLog(),
        GarbageCollection(),
        HeldoutEvaluation(),
        *([Continuations()] if config.continuations else []),
        *preview,
        CheckpointSaving(),
    ]


def run(
    config: TrainingConfig,
    inputs: TrainingInputs,
    out: Path,
    tracker: Tracker,
    hook: Hook | None,
    previewed: tuple[MergePlan | None, Interview] | None = None,
    name: str = "cpt",
) -> dict[str, Any]:
    """Train the model on the store; all processes call it.

    Writes `out`/checkpoints and the trained model `out`/`name`.
    `hook` is called on all processes with this process's trained shards. `previewed` says how the
    chat model is made and asked during training, if the configuration wants that; without a plan,
    what is trained is the chat model. Raises `Interrupted` when the run was asked to stop;
    everything is saved then.
    """
    parallel = start_parallel(offload=config.offload)
    try:
        callbacks = default_callbacks(config, previewed, inputs.preference is not None)
        trainer = Trainer(config, inputs, out, tracker, parallel, callbacks)
        trainer.train()
        shards = trainer.shards()
        with timed("export of the trained model"):
            trainer.export(shards, out / name)
        if hook:
            hook(shards, parallel)
        trainer.remove_phases()
        state = trainer.state
        done = {"steps": state.step, "tokens": state.tokens, "targets": state.targets}
        return {**done, "grown": describe_growth(state.grown)} if state.grown else done
    finally:
        stop_process_group()
