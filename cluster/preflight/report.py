"""What every node, and every process of the network test, writes down; and where."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.recipe import Recipe

NODE_PREFIX, NETWORK_PREFIX = "node-", "network-"  # names of the files, before that of the node


def folder_of(recipe: Recipe) -> Path:
    """The folder of this job's reports; a requeued job has the same number, and gets a new one."""
    job, restart = (
        os.environ.get("SLURM_JOB_ID", "alone"),
        os.environ.get("SLURM_RESTART_COUNT") or "0",
    )
    return recipe.directory / "slurm" / "preflight" / f"{job}-{restart}"


def node_name() -> str:
    """This node, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass
class NodeReport:
    """What a node finds out about itself."""

    node: str
    nonce: str | None = None  # as this node reads it; None: it does not see the file
    doing: str = "starting"  # the check that is under way; empty when all are done
    clock: float = (
        0.0  # seconds that this node's clock is ahead of the clock that dates the run's files
    )
    # what must be the same on all nodes: "code", "packages", ... -> name -> value
    same: dict[str, dict[str, str]] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Leave it for the judge. Raises `UserError` if this node cannot write there."""
        _write(folder / f"{NODE_PREFIX}{self.node}.json", self.node, asdict(self))


STEPS = ("started", "reached the first process", "joined", "measured its links", "done")


@dataclass
class ProcessReport:
    """How far one process of the network test came, and what it measured."""

    node: str
    rank: int
    size: int  # processes in all
    step: int = 0  # in STEPS
    error: str = ""
    clock: float = 0.0  # seconds since 1970 on this node at a moment that is the same for all: right after a barrier
    bandwidth: float = 0.0  # of all processes, bytes per second
    links: dict[str, float] = field(
        default_factory=dict
    )  # neighbouring node -> bytes per second between the two

    def write(self, folder: Path) -> None:
        """Leave it for the judge. Raises `UserError` if this node cannot write there."""
        _write(folder / f"{NETWORK_PREFIX}{self.node}.{self.rank}.json", self.node, asdict(self))

    def reach(self, step: str, folder: Path) -> None:
        """Write down that it came so far."""
        self.step = STEPS.index(step)
        self.write(folder)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return bool(self.error) or STEPS[self.step] == "done"


def _write(path: Path, node: str, values: dict[str, Any]) -> None:
    try:
        write_json(path, values)
    except OSError as error:
        raise UserError(
            f"{node} cannot write {path} ({error.strerror}); mount the run's file system there, or leave the node out."
        ) from None


def read_nodes(folder: Path) -> dict[str, NodeReport]:
    """The reports that are there, by node."""
    return {
        report.node: report
        for report in (NodeReport(**values) for values in _read(folder, NODE_PREFIX))
    }


def read_processes(folder: Path) -> dict[str, list[ProcessReport]]:
    """The reports of the network test that are there, by node."""
    found: dict[str, list[ProcessReport]] = {}
    for values in _read(folder, NETWORK_PREFIX):
        found.setdefault(values["node"], []).append(ProcessReport(**values))
    return found


def _read(folder: Path, prefix: str) -> Iterator[dict[str, Any]]:
    try:
        names = sorted(os.listdir(folder))  # listing it also makes an NFS client look for new files
    except FileNotFoundError:
        return
    for name in names:
        if name.startswith(prefix) and name.endswith(".json"):
            try:
                yield json.loads((folder / name).read_text(encoding="utf-8"))
            except (
                OSError
            ):  # replaced in between, which NFS may call a stale handle; the next look finds it
                continue


def wait_until(there: Callable[[], bool], seconds: float) -> bool:
    """Whether `there` becomes true within so many seconds. Looks less often the longer it takes."""
    deadline, pause = time.monotonic() + seconds, 0.05
    while not there():
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(pause, max(deadline - time.monotonic(), 0)))
        pause = min(1.3 * pause, 2.0)
    return True
