"""What a node finds out about itself, check by check. No check needs another node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cpt_merge.cluster.preflight.gpus import check_gpus
from cpt_merge.cluster.preflight.reports import (
    NODE_PREFIX,
    NONCE_FILE,
    NodeReport,
    folder_of,
    node_name,
)
from cpt_merge.cluster.preflight.software import check_software
from cpt_merge.core.distributed import wait_for
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.recipe import Recipe

GB = 1e9
TEMPORARY = 1 * GB  # for compilers' caches and sockets
LEAST_MEMORY = 1 / 4  # of what the job was given


def check_node(recipe: Recipe, wait: float) -> None:
    """Run all checks. The report is written before each of them, so that one that hangs is named.

    Raises `UserError` if the node cannot write its report, or does not see the first node's file
    within `wait` seconds: then nobody can see its report either.
    """
    report, folder = NodeReport(node_name()), folder_of(recipe)
    for name, check in CHECKS.items():
        report.doing = name
        report.write(folder)
        try:
            check(report, recipe, wait)
        except UserError as error:
            report.problems.append(str(error))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            text = " ".join(str(error).split())[:300] or type(error).__name__
            report.problems.append(f"{name}: {text}")
    report.doing = ""
    report.write(folder)
    if report.nonce is None:
        raise UserError(report.problems[0])


def _check_shared(report: NodeReport, recipe: Recipe, wait: float) -> None:
    """Read the first node's nonce. The judge proves the other direction by reading this report."""
    path = folder_of(recipe) / NONCE_FILE
    if wait_for(path.is_file, str(path), timeout=wait):
        report.nonce = json.loads(path.read_text(encoding="utf-8"))["nonce"]
    else:
        report.problems.append(
            f"{path}, which the first node wrote, does not exist here; "
            "`runs` must be on a file system that all nodes share."
        )


def _check_clock(report: NodeReport, recipe: Recipe, wait: float) -> None:
    """Compare the node's clock with the date of a file, which a file server sets for all nodes.

    The difference is 0 if the date is between the times before and after writing. Some parallel
    file systems use the node's own clock; the network test therefore compares the clocks
    themselves.
    """
    folder = folder_of(recipe)
    before = time.time()
    report.write(folder)
    after = time.time()
    dated = (folder / f"{NODE_PREFIX}{report.node}.json").stat().st_mtime
    report.clock = before - dated if dated < before else min(after - dated, 0.0)
    report.facts.append(f"clock {report.clock:+.1f} s")


def check_room(report: NodeReport, recipe: Recipe, wait: float) -> None:
    """Look for a temporary disk or a memory that an earlier job left full."""
    temporary = tempfile.gettempdir()
    disk = shutil.disk_usage(temporary).free
    if disk < TEMPORARY:
        report.problems.append(
            f"{temporary} has {disk / GB:.2f} GB left; clear it, or set TMPDIR to another disk."
        )
    given, free = memory(Path("/proc/meminfo").read_text())
    if free < LEAST_MEMORY * given:
        report.problems.append(
            f"{free / GB:,.1f} GB of memory are free of the {given / GB:,.1f} GB that the job may "
            "use; look for processes that an earlier job left behind."
        )
    report.facts.append(f"{free / GB:,.0f} GB memory and {disk / GB:,.0f} GB in {temporary} free")


def memory(meminfo: str, environment: Mapping[str, str] = os.environ) -> tuple[float, float]:
    """(bytes that the job may use on this node, bytes available), from /proc/meminfo's text."""
    kilobytes = {
        line.split(":")[0]: float(line.split()[1]) for line in meminfo.splitlines() if ":" in line
    }
    given = kilobytes["MemTotal"] * 1024
    megabytes = environment.get("SLURM_MEM_PER_NODE", "")
    if megabytes.isdigit() and megabytes != "0":  # 0 stands for all memory of the node
        given = float(megabytes) * 2**20
    return given, kilobytes["MemAvailable"] * 1024


# The checks that may hang come last
CHECKS: dict[str, Callable[[NodeReport, Recipe, float], None]] = {
    "shared file system": _check_shared,
    "clock": _check_clock,
    "software": check_software,
    "memory and temporary disk": check_room,
    "GPUs": check_gpus,
}
