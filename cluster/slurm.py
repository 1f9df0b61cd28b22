"""Everything that depends on how Slurm words its output.

Tested with Slurm 22.05 (Debian 12's `slurm-wlm`). The options of squeue and scontrol are
documented; srun's messages on stderr are not a stable interface. If another version words them
differently, `killed_tasks` finds nothing, and what the processes themselves wrote explains the
failure.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 30  # seconds for squeue and scontrol; a busy controller may not answer at all
HAS_PROCESSES = "RUNNING SUSPENDED CONFIGURING STOPPED".split()  # states of a job at work
SIGNAL_OF = {138: "SIGUSR1", 143: "SIGTERM"}  # srun's exit code after a signal ended a task

_TASK_ENDED = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)\S*: (?P<how>.+)")
_NODE_FAILED = re.compile(r"srun: error: Node failure on (?P<node>\S+)")
_NOT_KILLED = ("Exited", "Terminated", "User defined")  # by itself, or by srun or a request to stop


@dataclass(frozen=True)
class KilledTask:
    """A task that something outside Slurm killed, or one of a lost node."""

    rank: int
    node: str
    text: str


def job_state(job: str) -> str:
    """The state of a job (RUNNING, PENDING, ...); empty if it is unknown or Slurm is silent."""
    return (_output("squeue", "-h", "-j", job, "-o", "%T") or "").strip()


def describe_job(job: str) -> str:
    """A job's state, with the time it has left or the reason it waits."""
    if not shutil.which("squeue"):
        return "state unknown: squeue is not available here"
    line = (_output("squeue", "-h", "-j", job, "-o", "%T|%L|%r|%N") or "").strip()
    if not line:
        return "no longer in the queue (a new job would continue from here)"
    state, left, reason, nodes = line.splitlines()[0].split("|")
    if state == "RUNNING":
        return f"running on {nodes}, {left} left of its time"
    return f"{state.lower()} ({reason})"


def requeue(job: str) -> str:
    """Put a running job back into the queue. Returns the reason if that fails, else nothing."""
    try:
        command = ["scontrol", "requeue", job]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip()


def killed_tasks(messages: Path) -> list[KilledTask]:
    """The killed tasks and lost nodes in `messages`, a file of srun's stderr, in order."""
    found = []
    for line in _read(messages).splitlines():
        if lost := _NODE_FAILED.search(line):
            found.append(KilledTask(0, lost["node"], "its node is gone"))
        elif (task := _TASK_ENDED.search(line)) and not task["how"].startswith(_NOT_KILLED):
            text = f"it was ended from outside ({task['how']})"
            found.append(KilledTask(int(task["rank"]), task["node"], text))
    return found


def requested_signal(code: int, messages: Path) -> str:
    """The signal that asked a step to stop, by srun's exit code; empty if there was no request.

    After a failure srun itself ends the other tasks with the same signal, which is no request.
    """
    return "" if "Exited with" in _read(messages) else SIGNAL_OF.get(code, "")


def _read(messages: Path) -> str:
    return messages.read_text(encoding="utf-8", errors="replace") if messages.is_file() else ""


def _output(*command: str) -> str | None:
    """What a command prints; None if it fails or cannot be started."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
