"""Which process am I: alone, under torchrun or `accelerate launch`, or a Slurm task?

Everything is read from the environment inside the process itself; a variable that is missing or contradicts
another is an error, never a fallback to localhost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from core.errors import UserError


@dataclass(frozen=True)
class World:
    """One process among `size`. `local_*` count within the node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "alone"  # alone | torchrun | slurm

    @property
    def is_main(self) -> bool:
        """True on the one process that prints, logs and writes metadata."""
        return self.rank == 0


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """The process world that the environment describes. Raises `UserError` if it is half described."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _checked(environment, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "SLURM_PROCID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _checked(environment, "slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None)
    return World()


def _checked(
    environment: Mapping[str, str], launcher: str, rank: str, size: str, local_rank: str, local_size: str | None
) -> World:
    names = [rank, size, local_rank, *([local_size] if local_size else [])]
    values: list[int] = []
    for name in names:
        text = environment.get(name, "")
        if not text.isdigit():
            raise UserError(
                f"the environment names a {launcher} process but {name} is {text!r}; "
                "start with accelerate launch, torchrun or srun, or unset RANK and WORLD_SIZE."
            )
        values.append(int(text))
    if local_size is None:  # SLURM_STEP_TASKS_PER_NODE is like "2(x3),1"; the local size is not needed on Slurm
        values.append(0)
    world = World(*values, launcher=launcher)
    if world.rank >= world.size:
        raise UserError(f"{rank}={world.rank} does not fit {size}={world.size}; the launcher's variables contradict.")
    return world
