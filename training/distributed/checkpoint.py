"""Checkpoints of a run in progress: written beside, marked complete last, renamed; found again after any interruption.

    checkpoints/step-00000200/
      ...                      weights and optimizer, in the backend's own format
      train_state.json         step, tokens, digest of what the run is made of

A directory without train_state.json is not a checkpoint: the file is written after all others are on disk, and before
the rename. All that follows the copy of the shards is done by a thread while training goes on; what fails there is
told by `failed`, and raised where all processes have agreed that something did.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from cpt_merge.core.artifact import Staging, write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.training.config import CheckpointConfig
from cpt_merge.training.distributed.backend import Backend
from cpt_merge.training.distributed.parallel import Parallel

STATE_FILE = "train_state.json"
GB = 1e9


@dataclass(frozen=True)
class TrainState:
    """Where a run is. Rows of the data are counted, so the next row follows from `step` alone."""

    step: int  # optimizer steps done
    tokens: int  # tokens read
    targets: int  # targets trained on
    skipped: int  # steps in a row left out because their gradient was not finite
    key: str  # digest of the stage's configuration and inputs
    phase: int = 0  # the phase that it was saved in
    observed: int = -1  # the last step at which the held-out text was measured
    previewed: int = -1  # the last step at which the chat model was looked at
    layout: str = ""  # who can load it (`Backend.layout`)
    spikes: dict[str, Any] = field(default_factory=dict)  # what the search for spikes remembers
    tracking: dict[str, str] = field(default_factory=dict)  # mode, W&B run id and group


@dataclass
class Checkpoints:
    """The checkpoints of one run."""

    directory: Path
    config: CheckpointConfig
    parallel: Parallel
    _thread: threading.Thread | None = None
    _error: BaseException | None = None
    _saved: int = 0  # step of the newest one, complete or being written; of step 0, where nothing is trained, is none

    def start(self) -> None:
        """Remove what an attempt that was killed left half written; before anything is saved."""
        if self.parallel.world.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.glob("step-*"):
                if path.suffix or not (path / STATE_FILE).is_file():
                    shutil.rmtree(path)
                else:
                    Staging(path).finish_commit()
        self.parallel.barrier()

    def save(self, backend: Backend, state: TrainState) -> None:
        """Begin to write the checkpoint of a step; called by all processes. Waits for one that is still being written.

        Raises `UserError` if the disk has no room for it, or if the one before failed; older checkpoints stay.
        """
        if state.step == self._saved:
            return
        self.finish()
        self._check_room(backend.state_bytes())
        staging = Staging(self.directory / f"step-{state.step:08d}")
        if self.parallel.world.is_main:
            try:
                staging.begin()
            except (OSError, UserError) as error:
                self._error = error
        if self.parallel.any(self.failed):
            raise self._not_written(self._error)
        try:
            pending = backend.save(staging.directory, self.config.asynchronous)
        except (OSError, RuntimeError, CheckpointException) as error:
            if not backend.writes_asynchronously(
                self.config
            ):  # others may wait within it; the launcher ends them
                raise self._not_written(error) from error
            self._error = error
        if self.parallel.any(
            self.failed
        ):  # to copy the shards: on one process, the others would wait for its part
            raise self._not_written(self._error)
        self._saved = state.step
        self._thread = threading.Thread(
            target=self._commit, args=(pending, staging, state), name="checkpoint"
        )
        self._thread.start()
        if not self.config.asynchronous:
            self.finish()

    def _commit(self, pending: Future[None], staging: Staging, state: TrainState) -> None:
        """When the bytes of all processes are on disk, process 0 marks, renames, and removes the oldest."""
        try:
            pending.result()  # process 0's is done when everybody's bytes are: it has written the index of all files
            if not self.parallel.world.is_main:
                return
            write_json(staging.directory / STATE_FILE, asdict(state))
            staging.commit()
            for old in self._superfluous():
                Staging(old).remove_target()
        except BaseException as error:
            self._error = error

    def _superfluous(self) -> list[Path]:
        every = self.config.keep_every
        return [
            path
            for path in self.complete()[: -self.config.keep]
            if not every or step_of(path) % every
        ]

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written, as far as this process knows."""
        return self._error is not None

    def finish(self) -> None:
        """Wait until what is being written is complete; a collective. Raises `UserError` if that failed."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self.parallel.any(self.failed):
            raise self._not_written(self._error)

    def _not_written(self, error: BaseException | None) -> UserError:
        last = self.newest()
        return UserError(
            f"a checkpoint could not be written to {self.directory} ({_short(error)}); "
            f"{last.name if last else 'no checkpoint'} is kept; mend that and run the same command again."
        )

    def _check_room(self, needed: int) -> None:
        """Raises `UserError` on all processes if the disk has no room for another checkpoint."""
        free = shutil.disk_usage(self.directory).free
        if self.parallel.any(self.parallel.world.is_main and free < needed):
            last = self.newest()
            raise UserError(
                f"a checkpoint takes {needed / GB:,.2f} GB and {self.directory} has {free / GB:,.2f} GB left; "
                f"{last.name if last else 'no checkpoint'} is kept; free disk space, or lower "
                "training.checkpoints.keep, and run the same command again."
            )

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(
            path
            for path in self.directory.glob("step-*")
            if not path.suffix and (path / STATE_FILE).is_file()
        )

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(self.complete()), None)

    def read_state(self, key: str) -> TrainState | None:
        """The state of the newest complete checkpoint; None where there is none.

        A collective: process 0 looks, for another node may still see a shared disk as it was. Raises `UserError` if it
        belongs to another configuration or model, or is damaged.
        """
        newest = self.parallel.broadcast(self.newest)
        if newest is None:
            return None
        text = self.parallel.broadcast((newest / STATE_FILE).read_text)
        try:
            state = TrainState(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{newest / STATE_FILE} cannot be read ({error}); remove {newest}."
            ) from None
        if state.key != key:
            raise UserError(
                f"{newest} is of another configuration or model; remove {self.directory} or give the run a new name."
            )
        self._saved = state.step
        return state

    def load(self, backend: Backend, state: TrainState) -> None:
        """Restore the newest complete checkpoint, whose state is `state`.

        Raises `UserError` if another backend wrote it, or if it is damaged.
        """
        newest = self.directory / f"step-{state.step:08d}"
        if state.layout != backend.layout:
            raise UserError(
                f"{newest} was written by {state.layout} and cannot be loaded by {backend.layout}; start as before "
                "(same backend; with DeepSpeed the same stage and number of processes too)."
            )
        started = time.monotonic()
        try:
            backend.load(newest)
        except (
            OSError,
            RuntimeError,
            ValueError,
            KeyError,
            AssertionError,
            CheckpointException,
        ) as error:
            raise UserError(
                f"{newest} cannot be loaded ({_short(error)}); remove it to continue from the one before."
            ) from error
        if self.parallel.any(not backend.weights_are_finite()):
            raise UserError(
                f"{newest} is damaged (its weights are not finite); remove it to continue from the one before."
            )
        say(f"training: continues from {newest.name}, loaded in {time.monotonic() - started:.1f} s")


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def _short(error: BaseException | None) -> str:
    if error is None:
        return "on another process"
    return str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
