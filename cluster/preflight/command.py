"""`cpt-merge preflight`: the call that its options name, and the first of them, --begin."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cpt_merge.cluster.preflight.judgement import announce, judge_nodes
from cpt_merge.cluster.preflight.links import judge_network
from cpt_merge.cluster.preflight.network import check_network
from cpt_merge.cluster.preflight.node import check_node
from cpt_merge.cluster.preflight.reports import node_name, open_reports
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import console
from cpt_merge.launcher.inputs import check_inputs
from cpt_merge.launcher.recipe import Recipe

NETWORK_STEPS = 4  # of the network test, `wait` seconds each; then each process has reported


@dataclass(frozen=True)
class PreflightOptions:
    """The options of the command."""

    begin: bool
    network: bool
    judge: bool
    nodes: list[str]
    wait: float  # seconds


def preflight(recipe: Recipe, options: PreflightOptions) -> None:
    """One call of the preflight. Outside Slurm, without options: all checks of this machine."""
    in_job = "SLURM_JOB_ID" in os.environ
    if (options.begin and (options.judge or options.network)) or (
        bool(options.nodes) != options.judge
    ):
        raise UserError(
            "give --begin, --network, `--judge --nodes A,B`, `--judge --network --nodes A,B`, "
            "or none of them."
        )
    if options.begin:
        _begin(recipe)
    elif options.judge and options.network:
        wait = NETWORK_STEPS * options.wait
        announce(recipe, judge_network(recipe, options.nodes, wait), network=True)
    elif options.judge:
        announce(recipe, judge_nodes(recipe, options.nodes, options.wait))
    elif in_job:
        try:
            (check_network if options.network else check_node)(recipe, options.wait)
        except UserError as error:  # the task succeeds all the same: --judge decides for the job
            console.print(f"preflight: {node_name()}: {error}", markup=False)
    elif options.network:
        raise UserError(
            "--network measures between the tasks of a Slurm job; call it by srun within one."
        )
    else:
        _begin(recipe)
        check_node(recipe, options.wait)
        announce(recipe, judge_nodes(recipe, [node_name()], options.wait))


def _begin(recipe: Recipe) -> None:
    """Check the inputs, and open an empty folder of reports. Raises `UserError`."""
    check_inputs(recipe)
    open_reports(recipe)
