"""What became of each start of a Slurm job: a folder per attempt, which the next one learns from.

    RUN/slurm/1234-0/             job 1234, not restarted yet
      begun.json                  when, where, how far the run was
      stopped.json                by the first process, when it was asked to stop and has saved everything
      failed-rank-0003.json       by a process that failed: what it said, and when
      srun.log                    srun's own messages: who was killed, which node is gone
      train-rank-0000-node1.log   what a process printed
      ended.json                  how far the run was then, and what follows

The batch script calls `begin` and `end`; the processes in between write what they know by `note_stop` and
`note_failure`. An attempt whose batch script was killed, or whose first node is gone, is ended by the next one.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cpt_merge.core.artifact import read_record, write_json
from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.core.progress import say
from cpt_merge.core.world import find_world
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.stages import STAGES

ATTEMPT = "CPT_MERGE_ATTEMPT"  # the attempt's folder; set by slurm/cpt_merge.sh for the processes that it starts
BATCH = "CPT_MERGE_BATCH"  # NODE:PID of the batch script, set likewise
ENDED_BY = {138: "SIGUSR1", 143: "SIGTERM"}  # srun's code for a process that a signal has ended
ALIKE = 3  # attempts in a row with the same failure and no progress: then no more
ALIVE = ("RUNNING", "SUSPENDED", "CONFIGURING", "STOPPED")  # states of a job whose processes go on
ENDING = 60  # seconds that those of another job have to end
SHOWN_LINES = 30  # of the log of the process that failed first

Verdict = Literal["finished", "requeue", "given up"]


@dataclass(frozen=True)
class Failure:
    """What a process said when it failed."""

    command: str
    rank: int
    node: str
    text: str
    time: float
    mendable: bool = False  # by the user, and by nobody else: another attempt would say the same


@dataclass(frozen=True)
class Attempt:
    """One start of the job, as far as its files tell."""

    folder: Path
    begun: dict[str, Any]
    ended: dict[str, Any]  # empty while it runs
    stopped: dict[str, Any]  # empty if nobody asked it to stop

    @property
    def fruitless(self) -> bool:
        """Whether the run was no further at the end than at the beginning."""
        return bool(self.ended) and self.ended["progress"] == self.begun["progress"]


def begin(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> Path:
    """Open the folder of this start of the job. Raises `UserError` where another attempt is of no use."""
    job, restart = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_RESTART_COUNT", "0")
    if not job.isdigit():
        raise UserError(
            "SLURM_JOB_ID is not set, so this is no Slurm job; use sbatch slurm/cpt_merge.sh RECIPE."
        )
    earlier = attempts(recipe.directory)
    if earlier and not earlier[-1].ended:
        if earlier[-1].begun["job"] != job:
            _wait_for_its_end(earlier[-1], recipe.directory)
        earlier[-1] = _end_for_the_dead(recipe, earlier)
    if earlier and earlier[-1].ended["verdict"] == "given up" and _follows_by_itself(environment):
        raise UserError(f"the attempt before was given up: {earlier[-1].ended['reason']}")
    folder = recipe.directory / "slurm" / f"{job}-{restart}"
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    so_far = progress(recipe)
    try:
        write_json(
            folder / "begun.json",
            {"job": job, "time": time.time(), "nodes": nodes, "progress": so_far},
        )
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); set `runs` to a folder that can."
        ) from None
    say(
        f"job {job}, attempt {len(earlier) + 1} at this run, on {nodes}: {_how_far(so_far)}; its logs are in {folder}"
    )
    return folder


def _wait_for_its_end(attempt: Attempt, run: Path) -> None:
    """Let the processes of another job end, if it is ending. Raises `UserError` if it is not."""
    job, nodes = attempt.begun["job"], attempt.begun["nodes"]
    for _ in range(ENDING):
        state = state_of(job)
        if state in ALIVE:
            where = f"job {job} on {nodes} ({state.lower()})"
            raise UserError(
                f"{run} is in use by {where}; wait for it, or give this run another name."
            )
        if state != "COMPLETING":
            return
        time.sleep(1)


def state_of(job: str) -> str:
    """Slurm's word for a job (RUNNING, PENDING, ...); empty if it does not know the job, or cannot be asked here."""
    try:
        done = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%T"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next(iter(done.stdout.split()), "") if done.returncode == 0 else ""


def _follows_by_itself(environment: Mapping[str, str]) -> bool:
    """Whether nobody has looked between the attempt before and this one: a requeued job, one of a chain or an array."""
    first = environment.get("SLURM_ARRAY_TASK_MIN")
    return (
        environment.get("SLURM_RESTART_COUNT", "0") != "0"
        or "SLURM_JOB_DEPENDENCY" in environment
        or (first is not None and environment.get("SLURM_ARRAY_TASK_ID") != first)
    )


def end(recipe: Recipe, folder: Path, code: int) -> Verdict:
    """Say what became of this attempt and what follows. `code` is that of the last command."""
    ended = _judged(recipe, attempts(recipe.directory), folder, code)
    write_json(folder / "ended.json", ended)
    _show_first_failure(folder)
    say(f"job {folder.name}: {ended['reason']}")
    verdict: Verdict = ended["verdict"]
    return verdict


def _end_for_the_dead(recipe: Recipe, found: list[Attempt]) -> Attempt:
    """Write the end of the last attempt, which could not do it itself."""
    last = found[-1]
    ended = _judged(recipe, found, last.folder, None)
    write_json(last.folder / "ended.json", ended)
    say(f"job {last.folder.name}: {ended['reason']}")
    return Attempt(last.folder, last.begun, ended, last.stopped)


def _judged(recipe: Recipe, found: list[Attempt], folder: Path, code: int | None) -> dict[str, Any]:
    """The content of an attempt's `ended.json`; `code` is None if its batch script did not live to know one."""
    now = progress(recipe)
    verdict, failure, reason = _what_happened(folder, code)
    ended = {
        "time": time.time(),
        "progress": now,
        "failure": failure,
        "verdict": verdict,
        "reason": reason,
    }
    place = next(number for number, attempt in enumerate(found) if attempt.folder == folder)
    this = Attempt(folder, found[place].begun, ended, found[place].stopped)
    alike = 0
    for attempt in [this, *reversed(found[:place])]:
        if not failure or attempt.ended.get("failure") != failure or not attempt.fruitless:
            break
        alike += 1
    if verdict == "requeue" and alike >= ALIKE:
        ended["verdict"] = "given up"
        ended["reason"] = (
            f"{reason} The same {alike} times in a row, without progress; it is not tried again."
        )
    elif verdict == "requeue":
        ended["reason"] = (
            f"{reason} {_how_far(now).capitalize()}; the next attempt goes on from there."
        )
    return ended


def _what_happened(folder: Path, code: int | None) -> tuple[Verdict, str, str]:
    """(what follows, name of the failure or nothing, sentence) of an attempt."""
    if code == 0:
        return "finished", "", "the pipeline is finished."
    failure = first_failure(folder)
    stopped = _read(folder / "stopped.json", "reason", "text")
    if failure and failure.mendable:
        return (
            "given up",
            _alike(failure),
            f"{failure.command} stopped at what has to be mended: {failure.text}",
        )
    if not stopped and not failure and (name := _ended_by_signal(folder, code)):
        stopped = {"reason": name, "text": f"stopped by {name} while a step was starting."}
    if stopped:
        # without progress, a warning that the time ends is a failure: it may come before anything can be saved
        name = "" if stopped["reason"] == "SIGTERM" else "the time ended"
        return "requeue", name, stopped["text"]
    if failure:
        where = f"rank {failure.rank} on {failure.node}"
        return (
            "requeue",
            _alike(failure),
            f"{failure.command} failed, first on {where}: {failure.text.rstrip('.')}.",
        )
    if code is None:
        return "requeue", "no word", "the batch script or its node died without a word."
    return (
        "requeue",
        f"code {code}",
        f"a step ended with code {code} and no process said why; see {folder}.",
    )


def _ended_by_signal(folder: Path, code: int | None) -> str:
    """The signal that asked the last step to stop before it could listen; nothing if srun sent it, after a failure."""
    log = folder / "srun.log"
    by_srun = log.is_file() and "Exited with" in log.read_text(encoding="utf-8", errors="replace")
    return "" if code is None or by_srun else ENDED_BY.get(code, "")


def _alike(failure: Failure) -> str:
    """What two failures that are the same have in common: numbers (ranks, ports, steps) may differ."""
    return f"{failure.command}: {re.sub(r'[0-9]+', '#', failure.text)}"


def first_failure(folder: Path) -> Failure | None:
    """The process that failed first, of what the processes themselves and srun say.

    A process that was killed cannot say so, and the others fail after it, when they miss it: srun's word that one was
    killed, other than by srun itself, comes first.
    """
    records = [
        _read(path, "command", "rank", "node", "text", "time")
        for path in folder.glob("failed-rank-*.json")
    ]
    said = sorted((Failure(**record) for record in records if record), key=lambda one: one.time)
    mendable = [failure for failure in said if failure.mendable]
    return next(iter([*mendable, *_killed(folder), *said]), None)


_TASK_ENDED = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)\S*: (?P<how>.+)")
_NODE_FAILED = re.compile(r"srun: error: Node failure on (?P<node>\S+)")


def _killed(folder: Path) -> list[Failure]:
    log, orderly = folder / "srun.log", ("Exited", "Terminated", "User defined")
    found = []
    for line in (
        log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    ):
        if gone := _NODE_FAILED.search(line):
            found.append(Failure("srun", 0, gone["node"], "its node is gone", 0.0))
        elif (task := _TASK_ENDED.search(line)) and not task["how"].startswith(orderly):
            found.append(
                Failure(
                    "srun",
                    int(task["rank"]),
                    task["node"],
                    f"it was ended from outside ({task['how']})",
                    0.0,
                )
            )
    return found


def _show_first_failure(folder: Path) -> None:
    """Repeat the last lines of the process that failed first."""
    failure = first_failure(folder)
    if failure is None:
        return
    logs = sorted(
        folder.glob(f"*-rank-{failure.rank:04d}-*.log"), key=lambda path: path.stat().st_mtime
    )
    if not logs:
        return
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
    say(f"── the last lines of {logs[-1]} ──" if lines else f"── {logs[-1]} is empty ──")
    for line in lines:
        say(f"  {failure.rank}: {line}")


def note_stop(stop: Interrupted) -> None:
    """This process was asked to stop, and everything is saved; for `end`. Does nothing outside the batch script."""
    if ATTEMPT in os.environ and find_world().is_main:
        values = {"reason": stop.reason, "text": str(stop), "time": time.time()}
        write_json(Path(os.environ[ATTEMPT]) / "stopped.json", values)
        _requeue_without_batch_script()


def note_failure(command: str, error: BaseException) -> None:
    """This process failed; for `end`. Does nothing outside the batch script."""
    if ATTEMPT not in os.environ:
        return
    world, mendable = find_world(), isinstance(error, UserError)
    lines = traceback.format_exception_only(error)
    text = str(error) if mendable else lines[-1].strip()
    failure = Failure(command, world.rank, socket.gethostname(), text, time.time(), mendable)
    write_json(Path(os.environ[ATTEMPT]) / f"failed-rank-{world.rank:04d}.json", asdict(failure))


def _requeue_without_batch_script() -> None:
    """Put the job back into the queue if its batch script was killed, for then nobody else does.

    Slurm lets the processes of such a job end in order, and counts it as failed. A cancelled job's batch script lives
    as long as its processes.
    """
    node, _, pid = os.environ[BATCH].partition(":")
    if os.environ.get("SLURMD_NODENAME") != node or Path(f"/proc/{pid}").exists():
        return
    job = os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=30
        )
        failed = done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        failed = str(error)
    say(
        f"the batch script of job {job} was killed; "
        + (f"submit it again ({failed})" if failed else "requeued")
    )


def attempts(run: Path) -> list[Attempt]:
    """The attempts at a run, oldest first."""
    folders = [path.parent for path in (run / "slurm").glob("*/begun.json")]
    found = [
        Attempt(
            folder, _read(folder / "begun.json", "job", "time", "nodes", "progress"),
            _read(folder / "ended.json", "verdict", "reason", "failure", "progress"),
            _read(folder / "stopped.json", "reason", "text"),
        )
        for folder in folders
    ]  # fmt: skip
    return sorted(
        (attempt for attempt in found if attempt.begun),
        key=lambda attempt: float(attempt.begun["time"]),
    )


def progress(recipe: Recipe) -> dict[str, Any]:
    """How far a run is: the finished stages, and what is kept of the one in between."""
    run = recipe.directory
    checkpoints = sorted(
        path.parent.name
        for path in (run / "training" / "checkpoints").glob("step-*/train_state.json")
    )
    return {
        "stages": [stage.name for stage in STAGES if read_record(run / stage.name)],
        "checkpoint": checkpoints[-1] if checkpoints else "",
        "data parts": len(list((run / "data").glob("*.parts/part-*"))),
    }


def _how_far(progress: Mapping[str, Any]) -> str:
    done = f"finished: {', '.join(progress['stages']) or 'nothing yet'}"
    return done + (
        f"; newest checkpoint {progress['checkpoint']}" if progress["checkpoint"] else ""
    )


def _read(path: Path, *needed: str) -> dict[str, Any]:
    """The JSON of a file; nothing if it is not there, or is damaged, which a line says."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not values.keys() >= set(needed):
            raise ValueError(f"it has to hold {', '.join(needed)}")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        say(f"{path} is damaged ({error}); it is left out")
        return {}
    return values
