"""A throw-away Slurm cluster of real daemons on this machine (`mini-slurm`), and jobs on it."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 1800  # seconds; only a job that hangs reaches it, also on a busy machine
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
SCRIPT = Path(__file__).with_name("mini-slurm")
CONFIGURATION = """
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=scavenger Nodes=ALL PriorityTier=0 GraceTime=20 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""  # KillWait is Slurm's default (mini-slurm's own is 5)


class SlurmCluster:
    """A cluster of N nodes. `down` ends everything that it has started."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cms-", dir="/tmp"))  # sockets need a short path
        (self.folder / "extra.conf").write_text(CONFIGURATION)
        self.environment = {
            **os.environ,
            "MINI_SLURM_DIR": str(self.folder / "s"),
            "MINI_SLURM_EXTRA": str(self.folder / "extra.conf"),
            "MINI_SLURM_SUBNET": "10.98.78",
            "OMP_NUM_THREADS": "1",  # six processes share this machine's cores
        }  # fmt: skip
        self._crashed: set[str] = set()

    def up(self, nodes: int) -> None:
        """Start so many nodes."""
        self._mini_slurm("up", str(nodes))

    def _mini_slurm(self, *words: str) -> str:
        done = subprocess.run(
            [SCRIPT, *words],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"mini-slurm {' '.join(words)}: {done.stderr}"
        return done.stdout

    def slurm(self, *words: str, **environment: str) -> str:
        """Run a Slurm command on the login node; returns its output."""
        done = subprocess.run(
            [SCRIPT, "exec", *words], env={**self.environment, **environment}, cwd=ROOT,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def on(self, node: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, without Slurm: `ps`, `kill`."""
        box = (self.folder / "s" / "pid" / f"box-{node}").read_text().split()[0]
        first = subprocess.run(
            ["pgrep", "-P", box], capture_output=True, text=True, check=True
        ).stdout.strip()
        namespaces = "--net --uts --mount --ipc --pid --root".split()
        command = ["nsenter", "-t", first, *namespaces, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def crash(self, node: str) -> None:
        """Switch a node off without warning."""
        self._mini_slurm("crash", node)
        self._crashed.add(node)

    def boot(self, node: str) -> None:
        """Switch a node on again."""
        self._mini_slurm("boot", node)
        self._crashed.discard(node)

    def restore(self) -> None:
        """Cancel all jobs and start all nodes, whatever a test has left behind."""
        self.slurm("scancel", "--user", "root")
        for node in sorted(self._crashed):
            self.boot(node)

    def down(self) -> None:
        """Stop everything, jobs included."""
        self._mini_slurm("down")
        shutil.rmtree(self.folder)


@dataclass
class SlurmJob:
    """A submitted job."""

    cluster: SlurmCluster
    id: str
    log_path: Path

    @property
    def fields(self) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.cluster.slurm("scontrol", "show", "job", "-o", self.id)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    @property
    def state(self) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.fields["JobState"]

    @property
    def restarts(self) -> int:
        """The number of its requeues."""
        return int(self.fields["Restarts"])

    @property
    def log(self) -> str:
        """Its output so far."""
        if not self.log_path.is_file():
            return ""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def wait(self, done: Callable[[], object], what: str) -> None:
        """Wait until `done()` is true. Fails with the log when the job ends first."""
        limit = time.monotonic() + LIMIT
        for number in itertools.count():
            if done():
                return
            ended = number % 10 == 9 and self.state in ENDED
            if (ended and not done()) or time.monotonic() > limit:
                pytest.fail(f"no {what}; job {self.fields}\n{self.log[-6000:]}")
            time.sleep(0.2)

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Wait until the log contains `text` so many times."""
        self.wait(lambda: self.log.count(text) >= times, f"{text!r} in the log")

    def wait_for_end(self) -> str:
        """Wait until the job has ended. Returns its state."""
        self.wait(lambda: self.state in ENDED, "end")
        return self.state


def submit(cluster: SlurmCluster, log: Path, *words: str | Path, **environment: str) -> SlurmJob:
    """`sbatch` with the job's output in `log`."""
    options = ["--parsable", f"--output={log}"]
    printed = cluster.slurm("sbatch", *options, *map(str, words), **environment)
    return SlurmJob(cluster, printed.split(";")[0], log)
