"""What a node finds out about itself, check by check; none needs another node."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from cpt_merge.cluster.preflight.gpus import check_gpus
from cpt_merge.cluster.preflight.report import NodeReport, folder_of, node_name
from cpt_merge.cluster.preflight.room import check_room
from cpt_merge.cluster.preflight.shared import check_clock, check_shared
from cpt_merge.cluster.preflight.software import check_software
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.recipe import Recipe

Check = Callable[[NodeReport, Recipe, float], None]

# In this order: what may hang comes last, and a report that ends early says where
CHECKS: dict[str, Check] = {
    "shared file system": check_shared,
    "clock": check_clock,
    "software": check_software,
    "memory and temporary disk": check_room,
    "GPUs": check_gpus,
}


def check_node(recipe: Recipe, wait: float) -> None:
    """Write this node's report, anew before every check, so that one that hangs can be named.

    Raises `UserError` if the node cannot write it, or does not see within `wait` seconds what the first node wrote:
    then nobody will see its report either.
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
            report.problems.append(
                f"{name}: {' '.join(str(error).split())[:300] or type(error).__name__}"
            )
    report.doing = ""
    report.write(folder)
    if report.nonce is None:
        raise UserError(report.problems[0])
