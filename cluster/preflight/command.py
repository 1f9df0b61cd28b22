"""`cpt-merge preflight`: which of the calls it is."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cpt_merge.cluster.preflight.begin import begin
from cpt_merge.cluster.preflight.judge import judge_nodes, pass_sentence
from cpt_merge.cluster.preflight.links import judge_network
from cpt_merge.cluster.preflight.network import check_network
from cpt_merge.cluster.preflight.node import check_node
from cpt_merge.cluster.preflight.report import node_name
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import console
from cpt_merge.launcher.recipe import Recipe

ENDS_AFTER = 4  # steps of the network test, `wait` seconds each, after which its processes have all said something


@dataclass(frozen=True)
class Request:
    """The options of the command."""

    begin: bool
    network: bool
    judge: bool
    nodes: list[str]
    wait: float  # seconds


def preflight(recipe: Recipe, request: Request) -> None:
    """One call of the preflight; outside Slurm, without options, all checks of this machine."""
    if (request.begin and (request.judge or request.network)) or bool(
        request.nodes
    ) != request.judge:
        raise UserError(
            "give --begin, --network, `--judge --nodes A,B`, `--judge --network --nodes A,B`, or none."
        )
    if request.begin:
        begin(recipe)
    elif request.judge and request.network:
        pass_sentence(
            recipe, judge_network(recipe, request.nodes, ENDS_AFTER * request.wait), network=True
        )
    elif request.judge:
        pass_sentence(recipe, judge_nodes(recipe, request.nodes, request.wait), network=False)
    elif request.network and "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            "--network measures between the tasks of a Slurm job; call it by srun within one."
        )
    elif request.network or "SLURM_JOB_ID" in os.environ:
        _take_part(recipe, request)
    else:
        begin(recipe)
        check_node(recipe, request.wait)
        pass_sentence(recipe, judge_nodes(recipe, [node_name()], request.wait), network=False)


def _take_part(recipe: Recipe, request: Request) -> None:
    """The part of one task. It ends well whatever it finds: what that means for the job, the judge says."""
    try:
        (check_network if request.network else check_node)(recipe, request.wait)
    except UserError as error:
        console.print(f"preflight: {node_name()}: {error}", markup=False)
