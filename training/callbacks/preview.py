"""A live preview of the chat model: every N steps the chat vector is added to the shards, and prompts are answered.

    merged shard = shard + ratio * (chat - base)      as the post-training hook would make it at this step

The backend runs with the merged weights for as long as the replies take, and then with its own again, bit for bit. The
masters, the optimizer and the order of the data do not notice, so training is the same with and without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cpt_merge.core.artifact import read_json_lines, write_json_lines
from cpt_merge.core.progress import say
from cpt_merge.merge.hook import find_ranges
from cpt_merge.merge.memory import merge_shard
from cpt_merge.merge.plan import MergePlan
from cpt_merge.tracking import Cell, Tracker
from cpt_merge.training.callbacks.continuations import continue_greedily
from cpt_merge.training.config import PreviewConfig
from cpt_merge.training.distributed.backend import Backend
from cpt_merge.training.distributed.parallel import Parallel

TABLE = "preview/replies"


@dataclass(frozen=True)
class Interview:
    """What is asked, in token ids, and how replies are scored."""

    prompts: list[list[int]]  # rendered, up to where the reply begins
    ends: frozenset[int]  # ids that end a reply
    columns: Sequence[str]  # of the table of replies; the first one is the step
    score: Callable[
        [list[list[int]]], tuple[dict[str, float], list[list[Cell]]]
    ]  # metrics, rows without the step


@dataclass
class Preview:
    """Shows the chat model that training would end in if it ended now."""

    config: PreviewConfig
    plan: MergePlan  # of the post-training hook
    interview: Interview
    out: Path
    parallel: Parallel
    tracker: Tracker
    shown: list[list[Cell]] = field(default_factory=list)

    def is_due(self, step: int, last: int) -> bool:
        """Whether a preview belongs to a step; `last` is the run's last one."""
        return self.config.every is not None and (step % self.config.every == 0 or step == last)

    def resume(self, step: int) -> None:
        """Continue the table of an earlier attempt from the rows up to `step`."""
        if self.parallel.world.is_main:
            self.shown = [row for row in read_json_lines(self._rows) if row[0] <= step]

    @property
    def _rows(self) -> Path:
        return self.out / "preview.jsonl"

    def show(self, backend: Backend, step: int, tokens: int) -> None:
        """Merge, ask, score, and put everything back; `tokens` were read so far. Called by all processes."""
        started = time.monotonic()
        # without a gate the shards, which ZeRO has to gather, are not looked at
        gated = any(tensor.gated for tensor in self.plan.tensors)
        ranges = find_ranges(self.plan, backend.shards() if gated else [], self.parallel)
        with backend.replaced(partial(merge_shard, self.plan, ranges=ranges)):
            replies = continue_greedily(
                backend.logits, self.interview.prompts, self.config.max_new_tokens, self.interview.ends,
                self.parallel.broadcast_tensor,
            )  # fmt: skip
        if not self.parallel.world.is_main:
            return
        metrics, rows = self.interview.score(replies)
        self.shown += [[step, *row] for row in rows]
        write_json_lines(self._rows, self.shown)
        seconds = time.monotonic() - started
        named = {f"preview/{name}": value for name, value in metrics.items()}
        self.tracker.log({**named, "preview/seconds": seconds, "train/tokens": tokens}, step=step)
        self.tracker.table(TABLE, self.interview.columns, self.shown)
        chat = ", ".join(
            f"{name} {value:.2f}" for name, value in metrics.items() if name.endswith("/chat")
        )
        say(f"step {step}: preview of the chat model: {chat} ({seconds:.1f} s)")
