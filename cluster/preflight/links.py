"""Judges the network test: which nodes did not join, and whose network is slow?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from cpt_merge.cluster.preflight.judgement import Judgement, compare_clocks
from cpt_merge.cluster.preflight.reports import STEPS, ProcessReport, folder_of, read_processes
from cpt_merge.core.distributed import wait_for
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.recipe import Recipe

SLOW = 1 / 3  # of the median
GB = 1e9
Reports = Mapping[str, list[ProcessReport]]  # by node


def judge_network(recipe: Recipe, nodes: list[str], wait: float) -> Judgement:
    """Wait at most `wait` seconds until all processes have ended their test, and compare the nodes.

    Raises `UserError` with the error of all processes, if they all report the same one.
    """
    folder = folder_of(recipe)
    reports: dict[str, list[ProcessReport]] = {}

    def all_have_ended() -> bool:
        reports.update(read_processes(folder))
        found = [process for node in nodes for process in reports.get(node, [])]
        return (
            bool(found) and len(found) == found[0].size and all(process.ended for process in found)
        )

    wait_for(all_have_ended, "the network test of all nodes", timeout=wait)
    reports = {node: reports.get(node, []) for node in nodes}
    errors = {process.error for processes in reports.values() for process in processes}
    if all(reports.values()) and len(errors) == 1 and errors != {""}:
        raise UserError(errors.pop())  # this is no node's fault
    judgement = Judgement(nodes, facts={node: _facts(reports[node]) for node in nodes})
    steps = {node: _least_step(node, reports) for node in nodes}
    if min(steps.values()) < len(STEPS) - 1:
        _blame_the_first_to_stop(reports, steps, judgement)
    else:
        _compare_links(reports, judgement)
        compare_clocks({node: found[0].clock for node, found in reports.items()}, judgement)
    judgement.processes_left = sum(
        len(found) for node, found in reports.items() if node not in judgement.faults
    )
    return judgement


def _least_step(node: str, reports: Reports) -> int:
    """How far the node's slowest process got; -1 if one has not even started."""
    processes = reports[node]
    size = max((one.size for found in reports.values() for one in found), default=0)
    incomplete = sum(map(len, reports.values())) < size
    per_node = max(map(len, reports.values()))  # all nodes have the same number of processes
    if not processes or (incomplete and len(processes) < per_node):
        return -1
    return min(process.step for process in processes)


def _blame_the_first_to_stop(
    reports: Reports, steps: Mapping[str, int], judgement: Judgement
) -> None:
    """Blame the nodes that got least far: the others waited for them."""
    least = min(steps.values())
    first = next(
        (node for node, found in reports.items() if any(one.rank == 0 for one in found)), None
    )
    only_first_moved = all((step == least) == (node != first) for node, step in steps.items())
    if first and least == STEPS.index("started") and only_first_moved:
        error = _error(reports[first])
        judgement.blame(
            first, f"no other node reaches it{error}; look at its network and firewall."
        )
        if len(steps) > 2:  # of two nodes, either may be the cause
            return
    for node, step in steps.items():
        error = _error(reports[node])
        if step < 0:
            judgement.blame(
                node, f"a process of it did not start the network test{error}; look at its own log."
            )
        elif step == least:
            judgement.blame(
                node,
                f"it {STEPS[step]} and got no further{error}; look at its network and its GPUs.",
            )
        elif node not in judgement.faults:
            judgement.note(node, f"it {STEPS[step]} and waited for others.")


def _error(processes: list[ProcessReport]) -> str:
    return next((f" ({process.error.rstrip('.')})" for process in processes if process.error), "")


def _compare_links(reports: Reports, judgement: Judgement) -> None:
    """Blame nodes whose faster link is slow: a slow neighbour slows only one of a node's links."""
    best = {node: max(_links(found).values(), default=0.0) for node, found in reports.items()}
    if len(best) < 3:
        return
    median = statistics.median(best.values())
    for node, speed in best.items():
        if speed < SLOW * median:
            judgement.blame(
                node,
                f"its network moves {speed / GB:.2f} GB/s where others move {median / GB:.2f}; "
                "look at its cable, its port, and the interface that NCCL or gloo uses "
                "(NCCL_SOCKET_IFNAME).",
            )


def _links(processes: list[ProcessReport]) -> dict[str, float]:
    """Neighbour -> bytes per second, of the slowest process."""
    found: dict[str, float] = {}
    for process in processes:
        for neighbour, speed in process.links.items():
            found[neighbour] = min(speed, found.get(neighbour, speed))
    return found


def _facts(processes: list[ProcessReport]) -> list[str]:
    if not processes or processes[0].size == 1:
        return ["one process: no network"]
    whole = min(process.bandwidth for process in processes)
    return [
        f"all-reduce of {processes[0].size} processes {whole / GB:.2f} GB/s"
        if whole
        else "not measured",
        *(f"{speed / GB:.2f} GB/s with {node}" for node, speed in _links(processes).items()),
    ]
