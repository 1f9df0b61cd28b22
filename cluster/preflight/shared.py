"""Is the run's folder the same one on all nodes, and do the nodes agree what time it is?"""

from __future__ import annotations

import json
import time

from cpt_merge.cluster.preflight.begin import NONCE_FILE
from cpt_merge.cluster.preflight.report import NODE_PREFIX, NodeReport, folder_of, wait_until
from cpt_merge.launcher.recipe import Recipe


def check_shared(report: NodeReport, recipe: Recipe, wait: float) -> None:
    """Read the nonce that the first node wrote. The other direction is proved by the judge, who reads the report."""
    path = folder_of(recipe) / NONCE_FILE
    if wait_until(path.is_file, wait):
        report.nonce = json.loads(path.read_text(encoding="utf-8"))["nonce"]
    else:
        report.problems.append(
            f"{path} is not there, which the first node wrote; `runs` must lie on a file system that all nodes share."
        )


def check_clock(report: NodeReport, recipe: Recipe, wait: float) -> None:
    """How far the node's clock is ahead of the one that dates its files: a file server's is the same for all nodes.

    0 if the file's date lies between the times before and after writing it. Some parallel file systems date files by
    the node's own clock; the network test compares the clocks themselves.
    """
    folder = folder_of(recipe)
    before = time.time()
    report.write(folder)
    after = time.time()
    dated = (folder / f"{NODE_PREFIX}{report.node}.json").stat().st_mtime
    report.clock = before - dated if dated < before else min(after - dated, 0.0)
    report.facts.append(f"clock {report.clock:+.1f} s")
