"""A preview of the chat model: every N steps the chat vector is added and prompts are answered.

    merged shard = shard + ratio * (chat - base)      what the post-training hook would make now

The backend runs with the merged weights during the replies, and with its own afterwards, bit for
bit. Nothing changes for the master weights, the optimizer and the order of the data, so training is
the same with and without previews.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import read_json_lines, write_json_lines
from cpt_merge.core.progress import say
from cpt_merge.merge.hook import find_ranges
from cpt_merge.merge.memory import merge_shard
from cpt_merge.merge.plan import MergePlan
from cpt_merge.tracking import Cell
from cpt_merge.training.callbacks.callback import PeriodicCallback
from cpt_merge.training.callbacks.continuations import continue_greedily

TABLE = "preview/replies"


@dataclass(frozen=True)
class Interview:
    """The prompts, in token ids, and how replies are scored."""

    prompts: list[list[int]]  # rendered up to where the reply begins
    ends: frozenset[int]  # ids that end a reply
    columns: Sequence[str]  # of the table of replies; the first one is the step
    # metrics, and rows of the table without the step
    score: Callable[[list[list[int]]], tuple[dict[str, float], list[list[Cell]]]]


class Preview(PeriodicCallback):
    """Shows the chat model that training would end in if it ended now."""

    name = "preview"

    def __init__(self, plan: MergePlan | None, interview: Interview) -> None:
        """`plan` is that of the post-training hook; None where the chat model itself is trained."""
        super().__init__()
        self.plan, self.interview = plan, interview
        self.shown: list[list[Cell]] = []  # rows of the table of replies

    @property
    def every(self) -> int:
        """See `PeriodicCallback`."""
        every = self.trainer.config.preview.every
        assert every is not None, "otherwise there is no preview"
        return every

    @property
    def _table(self) -> Path:
        return self.trainer.out / "preview.jsonl"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Callback`. The table continues from the rows that the checkpoint knows of."""
        super().load_state_dict(state)
        if self.trainer.parallel.is_main:
            self.shown = [row for row in read_json_lines(self._table) if row[0] <= self.done_at]

    def look(self) -> bool:
        """See `PeriodicCallback`. Skipped if weights are not finite, which ends the run later."""
        trainer = self.trainer
        trainer.read_outcome()
        if trainer.parallel.any(not trainer.backend.weights_are_finite()):
            return True
        started = time.monotonic()
        replies = self._replies()
        if trainer.parallel.is_main:
            self._show(replies, time.monotonic() - started)
        return True

    def _replies(self) -> list[list[int]]:
        """Merge, let the model answer, and restore its weights."""
        with self._merged(self.plan) if self.plan else nullcontext():
            return continue_greedily(
                self.trainer.backend.logits,
                self.interview.prompts,
                self.trainer.config.preview.max_new_tokens,
                self.interview.ends,
                self.trainer.parallel.broadcast_tensor,
            )

    def _merged(self, plan: MergePlan) -> AbstractContextManager[None]:
        backend = self.trainer.backend
        gated = any(tensor.gated for tensor in plan.tensors)
        shards = backend.shards() if gated else []  # ZeRO has to gather them
        ranges = find_ranges(plan, shards, self.trainer.parallel)
        return backend.replaced(partial(merge_shard, plan, ranges=ranges))

    def _show(self, replies: list[list[int]], seconds: float) -> None:
        """Score the replies, log them, and add them to the table."""
        tracker, state = self.trainer.tracker, self.trainer.state
        metrics, rows = self.interview.score(replies)
        self.shown += [[state.step, *row] for row in rows]
        write_json_lines(self._table, self.shown)
        named = {f"preview/{name}": value for name, value in metrics.items()}
        more = {"preview/seconds": seconds, "train/tokens": state.tokens}
        tracker.log(named | more, step=state.step)
        tracker.table(TABLE, self.interview.columns, self.shown)
        chat = ", ".join(
            f"{name} {value:.2f}" for name, value in metrics.items() if name.endswith("/chat")
        )
        say(f"step {state.step}: preview of the chat model: {chat} ({seconds:.1f} s)")
