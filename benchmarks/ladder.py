"""What each rung of the memory ladder costs in loss, on the model and text of a run.

    python -m benchmarks.ladder runs/demo OUT [--tokens 200000] [--learning-rate 0.0003]

Every rung trains the run's extended model on the run's token store, with the same sequences in the
same order, in a process of its own, and is evaluated on the same held-out text. Printed are the
bits per byte of each language at the end, the time, and the memory that `plan` estimates: of
weights, gradients and moments, with everything else beside them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import typer

from benchmarks.training_contenders import ROOT
from cpt_merge.tracking import Tracker
from cpt_merge.tracking.events import Event, Scalars

RUNGS: dict[str, dict[str, Any]] = {
    "bf16 with fp32 masters": {},
    "recomputation": {"activation_checkpointing": "full"},
    "offloading": {"offload": "all"},
    "8-bit moments": {"optimizer": {"moments": "8bit"}},
    "LoRA": {"lora": {}},
    "LoRA, 8-bit moments": {"lora": {}, "optimizer": {"moments": "8bit"}},
    "pure bf16": {"precision": "pure-bf16"},
    "pure bf16, 8-bit moments": {"precision": "pure-bf16", "optimizer": {"moments": "8bit"}},
}  # fmt: skip


class _Last:
    """A sink that keeps the newest value of every metric."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def begin(self, kept: float | None) -> None: ...

    def write(self, event: Event) -> None:
        """Keep its values."""
        if isinstance(event, Scalars):
            self.values.update(event.values)

    def finish(self, failed: bool) -> None: ...


def train(source: Path, out: Path, values: dict[str, Any]) -> dict[str, float]:
    """Train as the values of the training section say; the last metrics, seconds and bytes."""
    from cpt_merge.checkpoint.reader import Checkpoint
    from cpt_merge.launcher.accelerate_file import backend_environment
    from cpt_merge.training.config import TrainingConfig
    from cpt_merge.training.inputs import TrainingInputs
    from cpt_merge.training.memory import MemorySetup, ModelShape, estimate_memory
    from cpt_merge.training.run import run

    os.environ.update(backend_environment(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"))
    config, last, started = TrainingConfig(**values), _Last(), time.perf_counter()
    model = source / "embeddings" / "model"
    run(config, TrainingInputs(model, model, source / "data" / "store", "ladder"), out,
        Tracker([last]), None)  # fmt: skip
    shape = ModelShape.of(Checkpoint.open(model), str(model), config.lora)
    setup = MemorySetup.of(config, "fsdp2", 1, 1)
    setup = MemorySetup(**{**vars(setup), "offload": config.offload or "none"})
    memory = estimate_memory(shape, setup)
    held = memory.parameters + memory.gradients + memory.optimizer
    found = {name: value for name, value in last.values.items() if name.startswith("valid/")}
    seconds = time.perf_counter() - started
    return {**found, "seconds": seconds, "states": held, "total": memory.total}


def main(
    source: Path, out: Path, tokens: int = 200_000, learning_rate: float = 3e-4, rungs: str = ""
) -> None:
    """Train every rung, and print a row for each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    out.mkdir(parents=True, exist_ok=True)
    base: dict[str, Any] = {
        "tokens": tokens, "sequence_length": 256, "global_batch_size": 8, "micro_batch_size": 4,
        "evaluate_every": 10**6, "continuations": 0, "checkpoints": {"every": 10**6},
        "log_every": 20,
    }  # fmt: skip
    found = {}
    for name in rungs.split(";") if rungs else RUNGS:
        values = {**base, **RUNGS[name]}
        values["optimizer"] = {"learning_rate": learning_rate, **RUNGS[name].get("optimizer", {})}
        place = out / name.replace(" ", "-").replace(",", "")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(train, (source, place, values))
        _print(name, found[name])
        (out / "ladder.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def _print(name: str, found: dict[str, float]) -> None:
    losses = {
        key.split("/")[1]: value
        for key, value in found.items()
        if key.endswith("/bits_per_byte") and "_base/" not in key
    }
    shown = " | ".join(f"{language} {value:.4f}" for language, value in losses.items())
    print(
        f"| {name} | {shown} | {found['states'] / 1e6:,.0f} | {found['total'] / 1e6:,.0f} | "
        f"{found['seconds']:.0f} s |",
        flush=True,
    )


if __name__ == "__main__":
    typer.run(main)
