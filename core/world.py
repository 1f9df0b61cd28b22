"""Which process this is: alone, under torchrun or `accelerate launch`, or a Slurm task.

The environment of the process decides. A variable that is missing or contradicts another one is an
error; there is no fallback to localhost.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from cpt_merge.core.errors import UserError

READ_BY_US = "CPT_MERGE_READ_ACCELERATE_CONFIG"  # set where we did accelerate's work


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

    @property
    def started(self) -> str:
        """How the process was started, in words."""
        if started_by_accelerate():
            return "started by accelerate launch"
        return "started alone" if self.launcher == "alone" else f"started by {self.launcher}"


def started_by_accelerate(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` started this process, even if it is the only one."""
    return "ACCELERATE_MIXED_PRECISION" in environment and READ_BY_US not in environment


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """The world that the environment describes. Raises `UserError` if variables are missing."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _checked(environment, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "SLURM_PROCID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _checked(
            environment, "slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
        )
    if environment.get("SLURM_STEP_ID", "").isdigit() and "SLURM_STEP_NUM_TASKS" not in environment:
        raise UserError(
            "SLURM_STEP_ID is set but SLURM_STEP_NUM_TASKS is not; start with srun, or unset "
            "SLURM_STEP_ID."
        )
    return World()


@dataclass(frozen=True)
class Rendezvous:
    """Where the processes meet: a port on the node of rank 0."""

    address: str
    port: int


def find_rendezvous(world: World, environment: Mapping[str, str] = os.environ) -> Rendezvous:
    """Where the processes of this world meet. Raises `UserError` if that is unknown or unusable.

    torchrun and accelerate set MASTER_ADDR and MASTER_PORT. Under srun both follow from Slurm's
    variables, which are equal in every task; either may also be set by the user.
    """
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if world.launcher == "slurm":
        address = address or first_host(environment.get("SLURM_STEP_NODELIST", ""))
        port = port or str(_job_port(environment.get("SLURM_JOB_ID", "")))
    if not address or not port.isdigit():
        raise UserError(
            f"MASTER_ADDR is {address!r} and MASTER_PORT {port!r}, so the processes cannot meet; "
            "start with accelerate launch, torchrun or srun, or set both."
        )
    try:
        socket.getaddrinfo(address, int(port))
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot resolve {address}, the node of rank 0 "
            f"({error.strerror}); fix the name service, or set MASTER_ADDR to its address."
        ) from None
    if world.is_main and world.launcher == "slurm":
        _check_free(int(port))
    return Rendezvous(address, int(port))


def _job_port(job: str) -> int:
    """A port that follows from a Slurm job's id: 15000 .. 29999, below Linux's ephemeral ports."""
    if not job.isdigit():
        raise UserError(
            f"SLURM_JOB_ID is {job!r}, which is not a number; start with sbatch and srun, or set "
            "MASTER_PORT."
        )
    return 15000 + int(job) % 15000


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: gpu07 of `gpu[07-09,12],login1`."""
    found = re.match(r"([^\[\],\s]+)(?:\[(\d+)[^\[\]]*\]([^\[\],]*))?(?:,|$)", nodes)
    if not found:
        raise UserError(
            f"SLURM_STEP_NODELIST is {nodes!r}, so the first node is unknown; set MASTER_ADDR."
        )
    prefix, number, suffix = found.groups(default="")
    return prefix + number + suffix


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"port {port} of {socket.gethostname()} cannot be used ({error.strerror}); set "
                "MASTER_PORT to another."
            ) from None


def _checked(
    environment: Mapping[str, str], launcher: str, rank: str, size: str, local_rank: str
) -> World:
    def number(name: str) -> int:
        text = environment.get(name, "")
        if not text.isdigit():
            raise UserError(
                f"the environment describes a {launcher} process but {name} is {text!r}; start "
                "with accelerate launch, torchrun or srun, or unset RANK and WORLD_SIZE."
            )
        return int(text)

    world = World(number(rank), number(size), number(local_rank), launcher)
    if world.rank >= world.size:
        raise UserError(
            f"{rank}={world.rank} does not fit {size}={world.size}; the launcher's variables "
            "contradict each other."
        )
    return world
