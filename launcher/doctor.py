"""`cpt-merge doctor`: what this machine has, what is missing, and how to fix it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from textwrap import shorten

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted
from cpt_merge.core.world import find_world

INSTALL = "pip install -c constraints.txt -e ."
MOST_GROUPS = 6  # of nodes in the same partition and state that are shown


@dataclass(frozen=True)
class Finding:
    """One line of the output."""

    subject: str
    found: str
    fix: str = ""  # empty if nothing is wrong
    fatal: bool = False  # no run can start

    @property
    def mark(self) -> str:
        """The word at the beginning of the line."""
        if self.fatal:
            return "[red]missing[/]"
        return "[yellow]note[/]" if self.fix else "[green]ok[/]"


def show_doctor() -> bool:
    """Print the findings. True if a run can start here."""
    findings = [finding for check in CHECKS for finding in check()]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        text = f"{finding.found}\n  {finding.fix}" if finding.fix else finding.found
        table.add_row(finding.mark, finding.subject, text)
    Console().print(table)
    return not any(finding.fatal for finding in findings)


def requirements() -> list[Requirement]:
    """The requirements of pyproject.toml, with its extras.

    Raises `PackageNotFoundError` if cpt-merge is not installed.
    """
    return [Requirement(text) for text in requires("cpt-merge") or []]


def _packages() -> Iterator[Finding]:
    try:
        needed = requirements()
    except PackageNotFoundError:
        yield Finding("cpt-merge", "not installed in this Python", INSTALL, fatal=True)
        return
    wrong = []
    for requirement in needed:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    if wrong:
        yield Finding("packages", "; ".join(wrong), INSTALL, fatal=True)
    else:
        shown = ("torch", "transformers", "accelerate", "datasets", "wandb")
        yield Finding("packages", ", ".join(f"{name} {version(name)}" for name in shown))


def _devices() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            yield Finding(
                f"GPU {number}", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
            )
        nccl = dist.is_nccl_available()
        yield Finding(
            "backend",
            "nccl and gloo" if nccl else "gloo only",
            "" if nccl else "install a CUDA build of torch",
        )
    else:
        built = torch.version.cuda
        build = f"CUDA {built} build" if built else "CPU build"
        driver = shutil.which("nvidia-smi") and not built
        fix = "a driver is installed: install a CUDA build of torch" if driver else ""
        yield Finding("GPU", f"none that torch can use ({build} of torch)", fix)
        yield Finding(
            "backend", "gloo on CPU: enough for the demo and the tests, slow for real models"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield Finding("CPU", f"{counted(os.cpu_count() or 1, 'core')}, {memory:.0f} GB memory")


def _processes() -> Iterator[Finding]:
    try:
        world = find_world()
        yield Finding("process", f"rank {world.rank} of {world.size}, {world.started}")
    except UserError as error:
        yield Finding("process", "the launcher's variables are incomplete", str(error), fatal=True)


def _slurm() -> Iterator[Finding]:
    if not shutil.which("sbatch"):
        yield Finding("Slurm", "not available (only `cpt-merge submit` needs it)")
        return
    command = ["sinfo", "-h", "-o", "%P %D %t"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        slow = isinstance(error, subprocess.TimeoutExpired)
        found = "sinfo does not answer within 10 s" if slow else "sinfo cannot be started"
        yield Finding("Slurm", found, "ask the cluster's administrators")
        return
    if done.returncode:
        reason = "; ".join(dict.fromkeys(done.stderr.split("\n"))).strip("; ")
        fix = "log in to a node where sinfo works"
        yield Finding("Slurm", shorten(reason, 300, placeholder=" ..."), fix)
    else:
        groups = done.stdout.splitlines()
        more = f"; {len(groups) - MOST_GROUPS} more" if len(groups) > MOST_GROUPS else ""
        yield Finding("Slurm", "; ".join(groups[:MOST_GROUPS]) + more)


def _tracking() -> Iterator[Finding]:
    from cpt_merge.tracking.wandb_compat import find_key

    if find_key():
        yield Finding(
            "W&B", "a key is available: runs are logged online when the server can be reached"
        )
    else:
        yield Finding(
            "W&B",
            "no key: runs are logged offline; `cpt-merge sync` uploads them later",
            "wandb login",
        )


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free / 1e9
    advice = "free some: a 7B model in bf16 takes 14 GB, a checkpoint of its training 81 GB"
    yield Finding("disk", f"{free:,.0f} GB free here", "" if free > 5 else advice)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _packages,
    _devices,
    _processes,
    _slurm,
    _tracking,
    _disk,
)
