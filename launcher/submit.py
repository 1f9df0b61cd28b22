"""`cpt-merge submit`: the sbatch call of a recipe, printed or made; a chain of them where jobs may not requeue."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say

ROOT = Path(__file__).parents[1]
SCRIPT = Path("slurm/cpt_merge.sh")
SITE_IS_WRONG = 2  # the exit code of slurm/read_site.sh


@dataclass(frozen=True)
class Submission:
    """What is asked of Slurm."""

    recipe: Path
    overrides: list[str]
    nodes: int = 1
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None  # of training; the GPUs of a node if not set
    time: str | None = None
    chain: int = 1  # jobs one after the other; each goes on where the one before had to stop
    options: list[str] = field(default_factory=list)  # further ones of sbatch, as they are

    def command(self, after: list[str]) -> list[str]:
        """The call for one job, which starts if none of the jobs `after` has finished the pipeline."""
        asked = {"nodes": self.nodes, "gpus-per-node": self.gpus_per_node, "ntasks-per-node": self.tasks_per_node,
                 "time": self.time}  # fmt: skip
        words = [
            "sbatch",
            "--parsable",
            *(f"--{name}={value}" for name, value in asked.items() if value is not None),
        ]
        if after:
            words += [
                "--dependency=" + ",".join(f"afternotok:{job}" for job in after),
                "--kill-on-invalid-dep=yes",
            ]
        return [*words, *self.options, str(SCRIPT), str(self.recipe), *self.overrides]


def submit(submission: Submission, dry_run: bool) -> None:
    """Print every call; make them, unless it is a dry run. Raises `UserError` with what sbatch says."""
    if not SCRIPT.is_file():
        raise UserError(
            f"{SCRIPT} is not here; call `cpt-merge submit` in the repository's root ({ROOT})."
        )
    _check_options(submission)
    jobs: list[str] = []
    for number in range(1, submission.chain + 1):
        command = submission.command(jobs)
        say(shlex.join(command))
        jobs.append(f"JOB{number}" if dry_run else _sbatch(command))
    if not dry_run:
        print("\n".join(jobs))
        log = (
            ""
            if _sets(submission.options, "--output", "-o")
            else f"its log is cpt-merge-{jobs[0]}.log; "
        )
        status = shlex.join(["cpt-merge", "status", str(submission.recipe), *submission.overrides])
        say(f"{log}`{status}` shows how far it is")


def _check_options(submission: Submission) -> None:
    for option in submission.options:
        if not option.startswith("-"):
            raise UserError(f"--sbatch={option} is no option of sbatch; write --sbatch=--{option}.")
    if submission.chain > 1 and _sets(submission.options, "--dependency", "-d"):
        raise UserError("--chain sets sbatch's --dependency itself; leave one of the two out.")


def _sets(options: list[str], name: str, short: str) -> bool:
    return any(option.split("=")[0] == name or option.startswith(short) for option in options)


def _sbatch(command: list[str]) -> str:
    """The id of the new job. The site's file is read before, for what it tells sbatch (SBATCH_ACCOUNT, ...)."""
    script = 'source slurm/read_site.sh; exec "$@"'
    try:
        done = subprocess.run(
            ["bash", "-c", script, "-", *command], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UserError("bash is not here; submit on a login node of the cluster.") from None
    sys.stderr.write(done.stderr)
    if done.returncode == 127:
        raise UserError("sbatch is not here; submit on a login node of the cluster.")
    if done.returncode == SITE_IS_WRONG:
        raise UserError("slurm/site.sh does not work; what is wrong is above.")
    if done.returncode:
        raise UserError(f"sbatch refused the job (code {done.returncode}); its words are above.")
    return done.stdout.strip().splitlines()[-1].split(";")[0]
