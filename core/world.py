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
    """One process among `size`. `local_rank` counts within the node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "alone"  # alone | torchrun | slurm

    @property
    def is_main(self) -> bool:
        """True on the one process that prints, logs and writes metadata."""
        return self.rank == 0


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """The process world that the environment describes. Raises `UserError` if it is half described."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _checked(environment, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "SLURM_PROCID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _checked(environment, "slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return World()


def _checked(environment: Mapping[str, str], launcher: str, rank: str, size: str, local_rank: str) -> World:
    def number(name: str) -> int:
        text = environment.get(name, "")
        if not text.isdigit():
            raise UserError(
                f"the environment names a {launcher} process but {name} is {text!r}; "
                "start with accelerate launch, torchrun or srun, or unset RANK and WORLD_SIZE."
            )
        return int(text)

    world = World(number(rank), number(size), number(local_rank), launcher)
    if world.rank >= world.size:
        raise UserError(f"{rank}={world.rank} does not fit {size}={world.size}; the launcher's variables contradict.")
    return world
