"""The reports of nodes and of the network test's processes: their content and their files."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.recipe import Recipe

NONCE_FILE = "nonce.json"  # the first node writes it; each node proves that it sees it
NODE_PREFIX, NETWORK_PREFIX = "node-", "network-"  # of the reports' names, before the node's name


def folder_of(recipe: Recipe) -> Path:
    """The folder of this job's reports. A requeued job keeps its number and gets a new folder."""
    job = os.environ.get("SLURM_JOB_ID", "alone")
    restart = os.environ.get("SLURM_RESTART_COUNT") or "0"
    return recipe.directory / "slurm" / "preflight" / f"{job}-{restart}"


def open_reports(recipe: Recipe) -> None:
    """Empty the folder of this job's reports, and write its nonce."""
    folder = folder_of(recipe)
    shutil.rmtree(folder, ignore_errors=True)
    write_json(folder / NONCE_FILE, {"nonce": secrets.token_hex(8), "node": node_name()})


def node_name() -> str:
    """The name of this node, as Slurm knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass
class NodeReport:
    """What a node finds out about itself."""

    node: str
    nonce: str | None = None  # as this node reads it; None: it does not see the file
    doing: str = "starting"  # the current check; empty after the last one
    clock: float = 0.0  # seconds that this node's clock is ahead of the one that dates its files
    # What must be the same on all nodes: "code", "packages", ... -> name -> value
    same: dict[str, dict[str, str]] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write the report for the judge. Raises `UserError` if this node cannot write there."""
        _write(folder / f"{NODE_PREFIX}{self.node}.json", self.node, asdict(self))


STEPS = ("started", "reached the first process", "joined", "measured its links", "done")


@dataclass
class ProcessReport:
    """How far one process of the network test got, and what it measured."""

    node: str
    rank: int
    size: int  # world size
    step: int = 0  # in STEPS
    error: str = ""
    clock: float = 0.0  # this node's time in seconds since 1970, right after a barrier of all nodes
    bandwidth: float = 0.0  # of an all-reduce of all processes, bytes per second
    # neighbouring node -> bytes per second of an all-reduce between the two nodes
    links: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the report for the judge. Raises `UserError` if this node cannot write there."""
        _write(folder / f"{NETWORK_PREFIX}{self.node}.{self.rank}.json", self.node, asdict(self))

    def reach(self, step: str, folder: Path) -> None:
        """Report that the process got this far."""
        self.step = STEPS.index(step)
        self.write(folder)

    @property
    def ended(self) -> bool:
        """Whether the process has nothing more to report."""
        return bool(self.error) or STEPS[self.step] == "done"


def _write(path: Path, node: str, values: dict[str, Any]) -> None:
    try:
        write_json(path, values)
    except OSError as error:
        raise UserError(
            f"{node} cannot write {path} ({error.strerror}); mount the run's file system there, "
            "or leave the node out."
        ) from None


def read_nodes(folder: Path) -> dict[str, NodeReport]:
    """The reports of nodes so far, by node."""
    return {values["node"]: NodeReport(**values) for values in _read(folder, NODE_PREFIX)}


def read_processes(folder: Path) -> dict[str, list[ProcessReport]]:
    """The reports of the network test so far, by node."""
    found: dict[str, list[ProcessReport]] = {}
    for values in _read(folder, NETWORK_PREFIX):
        found.setdefault(values["node"], []).append(ProcessReport(**values))
    return found


def _read(folder: Path, prefix: str) -> Iterator[dict[str, Any]]:
    try:
        names = sorted(os.listdir(folder))  # an NFS client only looks for new files on listing
    except FileNotFoundError:
        return
    for name in names:
        if name.startswith(prefix) and name.endswith(".json"):
            try:
                yield json.loads((folder / name).read_text(encoding="utf-8"))
            except OSError:  # a stale handle on NFS, as the file was just replaced; read next time
                continue
