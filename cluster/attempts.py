"""The attempts of a Slurm job: one folder for each start, from which the next start learns.

    RUN/slurm/1234-0/             job 1234 before its first restart
      begun.json                  when and where it started, and how far the run was
      stopped.json                written by rank 0 on a request to stop, after saving
      failed-rank-0003.json       written by a process that failed: its error and the time
      srun.log                    srun's own messages: killed tasks, lost nodes
      train-rank-0000-node1.log   the output of one process
      ended.json                  how far the run was at the end, and what follows

The batch script calls `begin` and `end`. The processes in between report by `note_stop` and
`note_failure`. If the batch script was killed or its node was lost, the next attempt writes
`ended.json`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cpt_merge.cluster import slurm
from cpt_merge.core.artifact import read_record, write_json
from cpt_merge.core.distributed import wait_for
from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.core.progress import say
from cpt_merge.core.world import find_world
from cpt_merge.launcher.stages import STAGE_NAMES

if TYPE_CHECKING:
    from cpt_merge.launcher.recipe import Recipe

ATTEMPT = "CPT_MERGE_ATTEMPT"  # the attempt's folder; the batch script sets it for its processes
BATCH = "CPT_MERGE_BATCH"  # NODE:PID of the batch script; set likewise
MOST_ALIKE = 3  # attempts in a row that fail alike without progress; then the job gives up
COMPLETING = 60  # seconds that another job of this run has to end its processes
SHOWN_LINES = 30  # of the log of the process that failed first

Outcome = Literal["finished", "requeue", "given up"]


@dataclass(frozen=True)
class Failure:
    """A failed process. `needs_user`: only the user can fix it, so do not try again."""

    command: str
    rank: int
    node: str
    text: str
    time: float = 0.0
    needs_user: bool = False

    @property
    def kind(self) -> str:
        """What equal failures have in common: numbers (ranks, ports, steps) may differ."""
        return f"{self.command}: {re.sub(r'[0-9]+', '#', self.text)}"


@dataclass(frozen=True)
class Attempt:
    """One start of the job, as its files describe it."""

    folder: Path
    begun: dict[str, Any]
    ended: dict[str, Any]  # empty while the attempt runs
    stopped: dict[str, Any]  # empty if nobody asked it to stop

    @property
    def fruitless(self) -> bool:
        """Whether the attempt ended where it began."""
        return bool(self.ended) and self.ended["progress"] == self.begun["progress"]


def begin(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> Path:
    """Open the folder of this start of the job. Raises `UserError` if the job should not start."""
    job = environment.get("SLURM_JOB_ID", "")
    if not job.isdigit():
        raise UserError(
            "SLURM_JOB_ID is not set, so this is not a Slurm job; "
            "use sbatch slurm/cpt_merge.sh RECIPE."
        )
    earlier = attempts(recipe.directory)
    if earlier and not earlier[-1].ended:
        if earlier[-1].begun["job"] != job:
            _wait_for_other_job(earlier[-1], recipe.directory)
        earlier[-1] = _close(recipe, earlier, earlier[-1].folder, None)
    if earlier and earlier[-1].ended["verdict"] == "given up" and _starts_by_itself(environment):
        reason = earlier[-1].ended["reason"]
        raise UserError(f"the previous attempt was given up: {reason}")
    folder = recipe.directory / "slurm" / f"{job}-{environment.get('SLURM_RESTART_COUNT', '0')}"
    nodes, so_far = environment.get("SLURM_JOB_NODELIST", ""), progress(recipe)
    begun = {"job": job, "time": time.time(), "nodes": nodes, "progress": so_far}
    try:
        write_json(folder / "begun.json", begun)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); set `runs` to a writable folder."
        ) from None
    say(
        f"job {job}, attempt {len(earlier) + 1} at this run, on {nodes}: {_how_far(so_far)}; "
        f"logs are in {folder}"
    )
    return folder


def _wait_for_other_job(attempt: Attempt, run: Path) -> None:
    """Wait until another job of this run has ended. Raises `UserError` if it is still at work."""
    job, nodes = attempt.begun["job"], attempt.begun["nodes"]

    def has_ended() -> bool:
        state = slurm.job_state(job)
        if state in slurm.HAS_PROCESSES:
            raise UserError(
                f"{run} is in use by job {job} on {nodes} ({state.lower()}); "
                "wait for it, or give this run another name."
            )
        return state != "COMPLETING"

    wait_for(has_ended, f"the end of job {job}", timeout=COMPLETING)


def _starts_by_itself(environment: Mapping[str, str]) -> bool:
    """Whether no person started this: a requeued job, or a later one of a chain or an array."""
    first = environment.get("SLURM_ARRAY_TASK_MIN")
    return (
        environment.get("SLURM_RESTART_COUNT", "0") != "0"
        or "SLURM_JOB_DEPENDENCY" in environment
        or (first is not None and environment.get("SLURM_ARRAY_TASK_ID") != first)
    )


def end(recipe: Recipe, folder: Path, code: int) -> Outcome:
    """Record how this attempt ended and return what follows. `code`: of the last command."""
    attempt = _close(recipe, attempts(recipe.directory), folder, code)
    _show_first_failure(folder)
    outcome: Outcome = attempt.ended["verdict"]
    return outcome


def _close(recipe: Recipe, found: list[Attempt], folder: Path, code: int | None) -> Attempt:
    """Write an attempt's `ended.json`. `code` is None if its batch script did not survive."""
    outcome, failure, reason = _diagnose(folder, code)
    now = progress(recipe)
    ended: dict[str, Any] = {"time": time.time(), "progress": now, "failure": failure}
    number = next(number for number, attempt in enumerate(found) if attempt.folder == folder)
    this = Attempt(folder, found[number].begun, ended, found[number].stopped)
    alike = 0
    for attempt in [this, *reversed(found[:number])]:
        if not failure or attempt.ended.get("failure") != failure or not attempt.fruitless:
            break
        alike += 1
    if outcome == "requeue" and alike >= MOST_ALIKE:
        outcome = "given up"
        reason += f" The same {alike} times in a row, without progress; the job is not tried again."
    elif outcome == "requeue":
        reason += f" {_how_far(now).capitalize()}; the next attempt continues from there."
    ended.update(verdict=outcome, reason=reason)
    write_json(folder / "ended.json", ended)
    say(f"job {folder.name}: {reason}")
    return this


def _diagnose(folder: Path, code: int | None) -> tuple[Outcome, str, str]:
    """(what follows, kind of failure or empty, sentence) of an attempt."""
    if code == 0:
        return "finished", "", "the pipeline is finished."
    failure = first_failure(folder)
    if failure and failure.needs_user:
        reason = f"{failure.command} stopped at something that you have to fix: {failure.text}"
        return "given up", failure.kind, reason
    stopped = _read(folder / "stopped.json", "reason", "text")
    if not stopped and not failure and code is not None:
        signal = slurm.requested_signal(code, folder / "srun.log")
        if signal:
            stopped = {"reason": signal, "text": f"stopped by {signal} while a step was starting."}
    if stopped:
        # Preemption never counts. A warning before the time limit counts as a failure where nothing
        # was saved, because then the time limit is too short for any progress.
        kind = "" if stopped["reason"] == "SIGTERM" else "the time ended"
        return "requeue", kind, stopped["text"]
    if failure:
        where = f"rank {failure.rank} on {failure.node}"
        reason = f"{failure.command} failed, first on {where}: {failure.text.rstrip('.')}."
        return "requeue", failure.kind, reason
    if code is None:
        return "requeue", "no report", "the batch script or its node died without a report."
    reason = f"a step ended with code {code} and no process reported why; see {folder}."
    return "requeue", f"code {code}", reason


def first_failure(folder: Path) -> Failure | None:
    """The process that failed first, according to the processes themselves and to srun.

    What the user has to fix comes first. Then comes a killed process: it cannot report anything,
    and the others fail after it because they miss it.
    """
    records = [
        _read(path, "command", "rank", "node", "text", "time")
        for path in folder.glob("failed-rank-*.json")
    ]
    reported = [Failure(**record) for record in records if record]
    reported.sort(key=lambda failure: failure.time)
    needs_user = [failure for failure in reported if failure.needs_user]
    killed = [
        Failure("srun", task.rank, task.node, task.text)
        for task in slurm.killed_tasks(folder / "srun.log")
    ]
    return next(iter([*needs_user, *killed, *reported]), None)


def _show_first_failure(folder: Path) -> None:
    """Repeat the last lines of the process that failed first."""
    failure = first_failure(folder)
    if failure is None:
        return
    logs = folder.glob(f"*-rank-{failure.rank:04d}-*.log")
    log = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    if log is None:
        return
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
    say(f"── the last lines of {log} ──" if lines else f"── {log} is empty ──")
    for line in lines:
        say(f"  {failure.rank}: {line}")


def note_stop(stop: Interrupted) -> None:
    """Report that this process has stopped on request, with everything saved.

    Does nothing outside the batch script, or on another rank than 0.
    """
    if ATTEMPT in os.environ and find_world().is_main:
        values = {"reason": stop.reason, "text": str(stop), "time": time.time()}
        write_json(Path(os.environ[ATTEMPT]) / "stopped.json", values)
        _requeue_for_batch_script()


def note_failure(command: str, error: BaseException) -> None:
    """Report that this process has failed. Does nothing outside the batch script."""
    if ATTEMPT not in os.environ:
        return
    rank, needs_user = find_world().rank, isinstance(error, UserError)
    text = str(error) if needs_user else traceback.format_exception_only(error)[-1].strip()
    failure = Failure(command, rank, socket.gethostname(), text, time.time(), needs_user)
    write_json(Path(os.environ[ATTEMPT]) / f"failed-rank-{rank:04d}.json", asdict(failure))


def _requeue_for_batch_script() -> None:
    """Requeue the job if its batch script was killed, because then nobody else does.

    Slurm lets the processes of such a job end normally, and counts it as failed. The batch script
    of a cancelled job lives as long as its processes, so this does not requeue a cancelled job.
    """
    node, _, pid = os.environ[BATCH].partition(":")
    if os.environ.get("SLURMD_NODENAME") != node or Path(f"/proc/{pid}").exists():
        return
    job = os.environ["SLURM_JOB_ID"]
    failed = slurm.requeue(job)
    follows = f"submit it again ({failed})" if failed else "requeued"
    say(f"the batch script of job {job} was killed; {follows}")


def attempts(run: Path) -> list[Attempt]:
    """The attempts at a run, oldest first."""
    found = []
    for path in (run / "slurm").glob("*/begun.json"):
        folder = path.parent
        if begun := _read(path, "job", "time", "nodes", "progress"):
            ended = _read(folder / "ended.json", "verdict", "reason", "failure", "progress")
            stopped = _read(folder / "stopped.json", "reason", "text")
            found.append(Attempt(folder, begun, ended, stopped))
    return sorted(found, key=lambda attempt: float(attempt.begun["time"]))


def progress(recipe: Recipe) -> dict[str, Any]:
    """How far a run is: its finished stages, and what is kept of the current one."""
    run = recipe.directory
    newest = [
        max((path.parent.name for path in checkpoints.glob("step-*/train_state.json")), default="")
        for checkpoints in (run / name / "checkpoints" for name in ("dpo", "finetune", "training"))
    ]
    return {
        "stages": [name for name in STAGE_NAMES if read_record(run / name)],
        "checkpoint": next(filter(None, newest), ""),
        "data parts": len(list(run.glob("data.blocks/part-*"))),
    }


def _how_far(progress: Mapping[str, Any]) -> str:
    done = f"finished: {', '.join(progress['stages']) or 'nothing yet'}"
    newest = progress["checkpoint"]
    return f"{done}; newest checkpoint {newest}" if newest else done


def _read(path: Path, *needed: str) -> dict[str, Any]:
    """The JSON of a file; empty if it does not exist or is damaged, which is reported."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not values.keys() >= set(needed):
            raise ValueError(f"it must contain {', '.join(needed)}")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        say(f"{path} is damaged ({error}) and is ignored")
        return {}
    return values
