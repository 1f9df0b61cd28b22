"""`cpt-merge submit`: prints or makes the sbatch call of a recipe, or of a chain of jobs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cpt_merge.core.errors import UserError
from cpt_merge.core.package import PACKAGE
from cpt_merge.core.progress import say

SCRIPTS = (PACKAGE / "slurm").resolve()  # in a checkout, the folder at its root
SITE_ERROR = 2  # the exit code of slurm/read_site.sh


@dataclass(frozen=True)
class Submission:
    """A job, or a chain of jobs, as the command line describes it."""

    recipe: Path
    overrides: list[str]
    nodes: int = 1
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None  # of training; a node's GPUs if not set
    time: str | None = None
    chain: int = 1  # jobs in a row, each of which continues where the one before had to stop
    options: list[str] = field(default_factory=list)  # further ones for sbatch

    def command(self, after: list[str]) -> list[str]:
        """The call for one job, to start if none of the jobs `after` finishes the pipeline."""
        resources = {
            "nodes": self.nodes,
            "gpus-per-node": self.gpus_per_node,
            "ntasks-per-node": self.tasks_per_node,
            "time": self.time,
        }
        words = [f"--{name}={value}" for name, value in resources.items() if value is not None]
        if after:
            words.append("--dependency=" + ",".join(f"afternotok:{job}" for job in after))
            words.append("--kill-on-invalid-dep=yes")
        script = str(SCRIPTS / "cpt_merge.sh")
        arguments = [*words, *self.options, script, str(self.recipe), *self.overrides]
        return ["sbatch", "--parsable", *arguments]

    def check(self) -> None:
        """Raises `UserError` for options of sbatch that make no sense."""
        for option in self.options:
            if not option.startswith("-"):
                raise UserError(
                    f"--sbatch={option} is not an option of sbatch; write --sbatch=--{option}."
                )
        if self.chain > 1 and self.sets("--dependency", "-d"):
            raise UserError("--chain sets sbatch's --dependency itself; leave one of them out.")

    def sets(self, name: str, short: str) -> bool:
        """Whether the further options set an option of sbatch."""
        return any(
            option.split("=")[0] == name or option.startswith(short) for option in self.options
        )


def submit(submission: Submission, dry_run: bool) -> None:
    """Print each call and make it, unless it is a dry run. Raises `UserError` if one fails."""
    submission.check()
    settings = {
        "CPT_MERGE_SLURM": str(SCRIPTS),
        "CPT_MERGE_PYTHON": os.environ.get("CPT_MERGE_PYTHON", sys.executable),
    }
    shown = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    jobs: list[str] = []
    for number in range(1, submission.chain + 1):
        command = submission.command(jobs)
        say(" ".join([*shown, shlex.join(command)]))
        jobs.append(f"JOB{number}" if dry_run else _sbatch(command, settings))
    if not dry_run:
        print("\n".join(jobs))
        log = f"its log is cpt-merge-{jobs[0]}.log; "
        if submission.sets("--output", "-o"):
            log = ""
        status = shlex.join(["cpt-merge", "status", str(submission.recipe), *submission.overrides])
        say(f"{log}`{status}` shows its progress")


def _sbatch(command: list[str], settings: dict[str, str]) -> str:
    """Submit a job and return its id. The site's file is read first, for SBATCH_... settings."""
    script = 'scripts=$CPT_MERGE_SLURM; source "$scripts/read_site.sh"; exec "$@"'
    try:
        done = subprocess.run(
            ["bash", "-c", script, "-", *command],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise UserError("bash is not available; submit on a login node of the cluster.") from None
    sys.stderr.write(done.stderr)
    if done.returncode == 127:
        raise UserError("sbatch is not available; submit on a login node of the cluster.")
    if done.returncode == SITE_ERROR:
        raise UserError("the site's settings cannot be used; the reason is above.")
    if done.returncode:
        raise UserError(f"sbatch refused the job (code {done.returncode}); its message is above.")
    return done.stdout.strip().splitlines()[-1].split(";")[0]
