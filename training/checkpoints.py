"""Checkpoints of a run in progress: written beside, marked complete last, renamed; found again after any interruption.

    checkpoints/step-00000200/
      .metadata, *.distcp      model and optimizer, by torch.distributed.checkpoint: loads at any world size
      train_state.json         step, tokens, digest of what the run is made of

A directory without train_state.json is not a checkpoint: the file is written after all others and before the rename.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from core.artifact import write_json
from core.errors import UserError
from core.progress import say
from training.model import CausalLM
from training.parallel import Parallel

STATE_FILE = "train_state.json"


@dataclass(frozen=True)
class TrainState:
    """Where a run is. Rows of the data are counted, so the next row follows from `step` alone."""

    step: int  # optimizer steps done
    tokens: int  # tokens read
    targets: int  # targets trained on
    skipped: int  # steps left out because their gradient was not finite
    key: str  # digest of the stage's configuration and inputs


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, keep: int, parallel: Parallel) -> None:
        self.directory, self.keep, self.parallel = directory, keep, parallel

    def save(self, module: CausalLM, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Write the checkpoint of a step; called by all processes. The oldest ones beyond `keep` are removed after.

        Raises `UserError` on a full disk; older checkpoints stay.
        """
        final = self.directory / f"step-{state.step:08d}"
        if (final / STATE_FILE).is_file():
            return
        beside = final.with_suffix(".tmp")
        if self.parallel.world.is_main:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            beside.mkdir(parents=True)
        self.parallel.barrier()
        try:
            save(_state(module, optimizer), checkpoint_id=beside, process_group=self.parallel.side_group)
            if self.parallel.world.is_main:
                write_json(beside / STATE_FILE, asdict(state))
                os.replace(beside, final)
        except (OSError, RuntimeError, CheckpointException) as error:
            last = self.newest()
            raise UserError(
                f"the checkpoint of step {state.step} could not be written to {self.directory} ({_short(error)}); "
                f"{last.name if last else 'no checkpoint'} is kept; free disk space and run the same command again."
            ) from error
        self.parallel.barrier()
        if self.parallel.world.is_main:
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old)

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.directory.glob("step-*") if (path / STATE_FILE).is_file())

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(self.complete()), None)

    def load(self, module: CausalLM, optimizer: torch.optim.Optimizer, key: str) -> TrainState | None:
        """Restore the newest complete checkpoint; None where there is none.

        Raises `UserError` if it belongs to another configuration, or is damaged.
        """
        newest = self.newest()
        if newest is None:
            return None
        try:
            state = TrainState(**json.loads((newest / STATE_FILE).read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{newest / STATE_FILE} cannot be read ({error}); remove {newest}.") from None
        if state.key != key:
            raise UserError(
                f"{newest} is of another configuration; remove {self.directory} or give the run a new name."
            )
        values = _state(module, optimizer)
        try:
            load(values, checkpoint_id=newest, process_group=self.parallel.side_group)
        except (OSError, RuntimeError, ValueError, CheckpointException) as error:
            raise UserError(
                f"{newest} cannot be loaded ({_short(error)}); remove it to continue from the one before."
            ) from error
        set_state_dict(module, optimizer, model_state_dict=values["model"], optim_state_dict=values["optimizer"])
        say(f"training: continues from {newest.name}")
        return state


def _state(module: CausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model, optim = get_state_dict(module, optimizer)
    return {"model": model, "optimizer": optim}


def _short(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
