"""Has the node memory and temporary disk left, or did an earlier job leave it full?"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cpt_merge.cluster.preflight.report import NodeReport
from cpt_merge.launcher.recipe import Recipe

GB = 1e9
TEMPORARY = 1 * GB  # compilers' caches, sockets, notes
LEAST_MEMORY = 1 / 4  # of what the job was given


def check_room(report: NodeReport, recipe: Recipe, wait: float) -> None:
    """Free space of the temporary folder, and memory that is available against what the job was given."""
    temporary = tempfile.gettempdir()
    disk = shutil.disk_usage(temporary).free
    if disk < TEMPORARY:
        report.problems.append(
            f"{temporary} has {disk / GB:.2f} GB left; clear it, or set TMPDIR to another disk."
        )
    given, free = memory(Path("/proc/meminfo").read_text())
    if free < LEAST_MEMORY * given:
        report.problems.append(
            f"{free / GB:,.1f} GB of memory are free of the {given / GB:,.1f} GB that the job may use; "
            "look for processes that an earlier job left there."
        )
    report.facts.append(f"{free / GB:,.0f} GB memory and {disk / GB:,.0f} GB in {temporary} free")


def memory(meminfo: str, environment: Mapping[str, str] = os.environ) -> tuple[float, float]:
    """(bytes that the job may use on this node, bytes available); `meminfo` is the text of /proc/meminfo."""
    kilobytes = {
        line.split(":")[0]: float(line.split()[1]) for line in meminfo.splitlines() if ":" in line
    }
    megabytes = environment.get("SLURM_MEM_PER_NODE", "")
    given = (
        float(megabytes) * 2**20
        if megabytes.isdigit() and megabytes != "0"
        else kilobytes["MemTotal"] * 1024
    )
    return given, kilobytes["MemAvailable"] * 1024
