"""Checkpoints of a run in progress, which any interruption leaves usable.

    checkpoints/step-00000200/
      ...                      weights and optimizer, in the backend's own format
      train_state.json         step, tokens, digest of configuration and inputs

A directory without train_state.json is no checkpoint: that file is written when all others are on
disk, and before the directory gets its name. A thread does everything after the copy of the shards
during training. An error there sets `failed`, and is raised once all processes have agreed on it.
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
from cpt_merge.training.distributed.backend import Backend, is_readable
from cpt_merge.training.distributed.parallel import Parallel

STATE_FILE = "train_state.json"
GB = 1e9


@dataclass(frozen=True)
class TrainState:
    """Where a run is. The next sequence of the data follows from `step` alone."""

    key: str  # digest of the stage's configuration and inputs
    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens read
    targets: int = 0  # targets trained on
    phase: int = 0  # the phase that it was saved in
    layout: str = ""  # who can load it (`Backend.layout`)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)  # their states by name
    tracking: dict[str, str] = field(default_factory=dict)  # mode, W&B run id and group
    curve: dict[str, Any] = field(default_factory=dict)  # of the rate, once a run has grown
    grown: list[dict[str, Any]] = field(default_factory=list)  # the lengths that it had before


@dataclass
class Checkpoints:
    """The checkpoints of one run."""

    directory: Path
    config: CheckpointConfig
    parallel: Parallel
    pinned: set[int] = field(default_factory=set)  # steps whose checkpoints are never removed
    _thread: threading.Thread | None = None
    _error: BaseException | None = None
    _saved: int = 0  # step of the newest one, complete or being written; step 0 is never saved

    def start(self) -> None:
        """Remove what a killed attempt left half written; call it before anything is saved."""
        if self.parallel.world.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.glob("step-*"):
                if path.suffix or not (path / STATE_FILE).is_file():
                    shutil.rmtree(path)
                else:
                    Staging(path).finish_commit()
        self.parallel.barrier()

    def save(self, backend: Backend, state: TrainState) -> None:
        """Begin to write the checkpoint of a step, once the one before is complete; a collective.

        Raises `UserError` if the disk has no room for it, or if the one before failed; older
        checkpoints stay.
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
            if not backend.writes_asynchronously(self.config):
                # the other processes may wait in the save; the launcher ends them
                raise self._not_written(error) from error
            self._error = error
        if self.parallel.any(self.failed):  # one process cannot copy; the others would wait for it
            raise self._not_written(self._error)
        self._saved = state.step
        self._thread = threading.Thread(
            target=self._commit, args=(pending, staging, state), name="checkpoint"
        )
        self._thread.start()
        if not self.config.asynchronous:
            self.finish()

    def _commit(self, pending: Future[None], staging: Staging, state: TrainState) -> None:
        """Complete a checkpoint and remove the oldest one, once all bytes are on disk."""
        try:
            pending.result()  # rank 0's is done when all are: it writes the index of all files
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
        others = [path for path in self.complete() if step_of(path) not in self.pinned]
        return [path for path in others[: -self.config.keep] if not every or step_of(path) % every]

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written, as far as this process knows."""
        return self._error is not None

    def finish(self) -> None:
        """Wait for the checkpoint that is being written; a collective.

        Raises `UserError` if it failed.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if self.parallel.any(self.failed):
            raise self._not_written(self._error)

    def _not_written(self, error: BaseException | None) -> UserError:
        last = self.newest()
        return UserError(
            f"a checkpoint could not be written to {self.directory} ({_short(error)}); "
            f"{last.name if last else 'no checkpoint'} is kept; "
            "fix the cause and run the same command again."
        )

    def _check_room(self, needed: int) -> None:
        """Raises `UserError` on all processes if the disk has no room for another checkpoint."""
        free = shutil.disk_usage(self.directory).free
        if self.parallel.any(self.parallel.world.is_main and free < needed):
            last = self.newest()
            raise UserError(
                f"a checkpoint takes {needed / GB:,.2f} GB and {self.directory} has "
                f"{free / GB:,.2f} GB left; {last.name if last else 'no checkpoint'} is kept; "
                "free disk space, or lower training.checkpoints.keep, "
                "and run the same command again."
            )

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return complete_checkpoints(self.directory)

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(self.complete()), None)

    def read_state(self, key: str) -> TrainState | None:
        """The state of the newest complete checkpoint; None where there is none.

        A collective in which only rank 0 looks, since another node may see an older state of a
        shared disk. Raises `UserError` if it is damaged or belongs to another configuration or
        model.
        """
        newest = self.parallel.broadcast(self.newest)
        if newest is None:
            return None
        state = _parse_state(newest, self.parallel.broadcast((newest / STATE_FILE).read_bytes))
        if state.key != key:
            raise UserError(
                f"{newest} belongs to another configuration or model; "
                f"remove {self.directory} or give the run a new name."
            )
        self._saved = state.step
        return state

    def load(self, backend: Backend, state: TrainState) -> None:
        """Restore the newest complete checkpoint, whose state is `state`.

        Raises `UserError` if another backend wrote it, or if it is damaged.
        """
        newest = self.directory / f"step-{state.step:08d}"
        check_layout(newest, state, backend.layout)
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
                f"{newest} cannot be loaded ({_short(error)}); "
                "remove it to continue from the one before."
            ) from error
        if self.parallel.any(not backend.weights_are_finite()):
            raise UserError(
                f"{newest} is damaged (its weights are not finite); "
                "remove it to continue from the one before."
            )
        say(f"training: continues from {newest.name}, loaded in {time.monotonic() - started:.1f} s")


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted(
        path
        for path in directory.glob("step-*")
        if not path.suffix and (path / STATE_FILE).is_file()
    )


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def read_saved_state(checkpoint: Path) -> TrainState:
    """The state in a complete checkpoint. Raises `UserError` if it is damaged."""
    return _parse_state(checkpoint, (checkpoint / STATE_FILE).read_bytes())


def check_continues(directory: Path, key: str, layout: str) -> None:
    """Raise `UserError` if a run of this key cannot continue from its newest checkpoint."""
    for newest in complete_checkpoints(directory)[-1:]:
        state = read_saved_state(newest)
        if state.key == key:
            check_layout(newest, state, layout)


def _parse_state(checkpoint: Path, data: bytes) -> TrainState:
    try:
        return TrainState(**json.loads(data))  # which must be UTF-8
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{checkpoint / STATE_FILE} cannot be read ({error}); remove {checkpoint}."
        ) from None


def check_readable(checkpoint: Path, layout: str) -> None:
    """Raise `UserError` if an earlier version wrote a checkpoint of this layout."""
    if not is_readable(layout):
        raise UserError(
            f"{checkpoint} is in the format of an earlier version of cpt-merge ({layout}), which "
            "this one cannot read; continue or export the run with that version, or remove "
            f"{checkpoint.parent} to train from the beginning."
        )


def check_layout(checkpoint: Path, state: TrainState, layout: str) -> None:
    """Raise `UserError` if the backend of this layout cannot load a checkpoint."""
    if state.layout != layout:
        check_readable(checkpoint, state.layout)
        raise UserError(
            f"{checkpoint} was written by {state.layout} and cannot be loaded by {layout}; "
            "continue with the backend that wrote it."
        )


def _short(error: BaseException | None) -> str:
    if error is None:
        return "on another process"
    return str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
