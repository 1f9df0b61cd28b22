"""What is looked at beside the training: held-out text, continuations, the base as reference line, loss spikes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import read_json_lines, write_json_lines
from cpt_merge.core.progress import say
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.tracking import Cell, Tracker
from cpt_merge.training.callbacks.continuations import (
    COLUMNS,
    Prompt,
    continuation_rows,
    continue_greedily,
)
from cpt_merge.training.callbacks.spikes import Spikes, record_spike
from cpt_merge.training.callbacks.validation import HeldoutRows, LanguageLoss, validate
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.backend import Backend
from cpt_merge.training.distributed.checkpoint import TrainState
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.distributed.stopping import StopRequest

PROMPT_TOKENS, NEW_TOKENS = 16, 32


@dataclass
class Observer:
    """Looks at a model between steps; nothing of it changes the training."""

    config: TrainingConfig
    rows: TrainingSequences
    heldout: list[HeldoutRows]
    reference: dict[str, float]  # language -> bits per byte of the base with its own tokenizer
    prompts: list[Prompt]
    tokenizer: Any
    out: Path
    parallel: Parallel
    tracker: Tracker
    spikes: Spikes
    shown: list[Sequence[Cell]] = field(default_factory=list)  # rows of the table of continuations

    def resume(self, state: TrainState) -> None:
        """Continue from a checkpoint."""
        if state.spikes:
            self.spikes.load_state_dict(state.spikes)
        if self.parallel.world.is_main:
            self.shown = [
                row for row in read_json_lines(self._continuations) if row[0] <= state.observed
            ]

    @property
    def _continuations(self) -> Path:
        return self.out / "continuations.jsonl"

    def observe(self, backend: Backend, state: TrainState, stop: StopRequest) -> bool:
        """Measure the held-out text and continue the prompts. False if all agreed to stop before the end of it."""
        started = time.monotonic()
        found = validate(
            backend.loss, self.heldout, self.config.micro_batch_size, self.parallel, stop.agreed
        )
        if found is None:
            return False
        self._log(found, state)
        if self.prompts:
            ids = [prompt.ids for prompt in self.prompts]
            ends = {self.tokenizer.eos_token_id} - {None}
            continuations = continue_greedily(
                backend.logits, ids, NEW_TOKENS, ends, self.parallel.broadcast_tensor
            )
            self._show(continuations, state.step)
        shown = ", ".join(
            f"{language} {loss.bits_per_byte:.3f}" for language, loss in found.items()
        )
        say(f"step {state.step}: bits per byte {shown} ({time.monotonic() - started:.1f} s)")
        return True

    def _log(self, found: dict[str, LanguageLoss], state: TrainState) -> None:
        metrics = {"train/tokens": float(state.tokens)}
        for language, loss in found.items():
            metrics |= {
                f"valid/{language}/loss": loss.loss,
                f"valid/{language}/bits_per_byte": loss.bits_per_byte,
            }
            if language in self.reference:
                metrics[f"valid/{language}_base/bits_per_byte"] = self.reference[language]
        self.tracker.log(metrics, step=state.step)

    def _show(self, continuations: list[list[int]], step: int) -> None:
        if not self.parallel.world.is_main:
            return
        self.shown += continuation_rows(step, self.prompts, continuations, self.tokenizer.decode)
        write_json_lines(self._continuations, self.shown)
        self.tracker.table("train/continuations", COLUMNS, self.shown)

    def look_for_spike(self, step: int, loss: float) -> None:
        """Report a loss far above the ones before it, with the rows that the step was made of."""
        spike = self.spikes.observe(step, loss)
        if spike is None:
            return
        indices = range(
            (step - 1) * self.config.global_batch_size, step * self.config.global_batch_size
        )
        text = (
            f"step {step}: loss {loss:.3f}, the last ones {spike.mean:.3f} ± {spike.deviation:.3f}"
        )
        say(
            f"training: spike at {text}; rows {indices[0]} to {indices[-1]}, listed in {self.out / 'spikes.jsonl'}"
        )
        self.tracker.alert("loss spike" if math.isfinite(loss) else "non-finite loss", text)
        if self.parallel.world.is_main:
            record_spike(self.out / "spikes.jsonl", spike, indices, self.rows.places(indices))
