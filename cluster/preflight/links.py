"""Which nodes did not join, and between which is the network slow?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from cpt_merge.cluster.preflight.judge import Verdict, compare_clocks
from cpt_merge.cluster.preflight.report import (
    STEPS,
    ProcessReport,
    folder_of,
    read_processes,
    wait_until,
)
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.recipe import Recipe

SLOW = 1 / 3  # of the median
GB = 1e9
Reports = Mapping[str, list[ProcessReport]]  # by node


def judge_network(recipe: Recipe, nodes: list[str], wait: float) -> Verdict:
    """Wait until all processes have ended their test, `wait` seconds at most, and compare the nodes.

    Raises `UserError` with what all processes say, if they say the same.
    """
    folder = folder_of(recipe)
    reports: dict[str, list[ProcessReport]] = {}

    def all_there() -> bool:
        reports.update(read_processes(folder))
        here = [process for node in nodes for process in reports.get(node, [])]
        return bool(here) and len(here) == here[0].size and all(process.ended for process in here)

    wait_until(all_there, wait)
    reports = {node: reports.get(node, []) for node in nodes}
    _raise_common_error(reports)
    verdict = Verdict(nodes, facts={node: _facts(reports[node]) for node in nodes})
    steps = {node: _least_step(node, reports) for node in nodes}
    if min(steps.values()) < len(STEPS) - 1:
        _blame_the_first_to_stop(reports, steps, verdict)
    else:
        _compare_links(reports, verdict)
        compare_clocks({node: processes[0].clock for node, processes in reports.items()}, verdict)
    verdict.processes_left = sum(
        len(found) for node, found in reports.items() if node not in verdict.faults
    )
    return verdict


def _raise_common_error(reports: Reports) -> None:
    """What every process of every node says is no node's fault."""
    errors = {process.error for processes in reports.values() for process in processes}
    if all(reports.values()) and len(errors) == 1 and errors != {""}:
        raise UserError(errors.pop())


def _least_step(node: str, reports: Reports) -> int:
    """How far the node's slowest process came; -1 if one has not even started."""
    processes = reports[node]
    there, size = (
        sum(map(len, reports.values())),
        max((p.size for ps in reports.values() for p in ps), default=0),
    )
    missing = there < size and len(processes) < max(
        map(len, reports.values())
    )  # all nodes have as many
    return -1 if missing or not processes else min(process.step for process in processes)


def _blame_the_first_to_stop(reports: Reports, steps: Mapping[str, int], verdict: Verdict) -> None:
    """Those that came least far held up the others, who waited for them."""
    least = min(steps.values())
    first = next(
        (node for node, processes in reports.items() if any(p.rank == 0 for p in processes)), None
    )
    if (
        first
        and least == STEPS.index("started")
        and all((step == least) == (node != first) for node, step in steps.items())
    ):
        verdict.blame(
            first,
            f"no other node reaches it{_said(reports[first])}; look at its network and firewall.",
        )
        if len(steps) > 2:  # of two, either may be the one
            return
    for node, step in steps.items():
        said = _said(reports[node])
        if step < 0:
            verdict.blame(
                node, f"a process of it did not start the network test{said}; look at its own log."
            )
        elif step == least:
            verdict.blame(
                node,
                f"it {STEPS[step]} and came no further{said}; look at its network and its GPUs.",
            )
        elif node not in verdict.faults:
            verdict.note(node, f"it {STEPS[step]} and waited for others.")


def _said(processes: list[ProcessReport]) -> str:
    return next((f" ({process.error.rstrip('.')})" for process in processes if process.error), "")


def _compare_links(reports: Reports, verdict: Verdict) -> None:
    """A node is slow if its faster link to a neighbour is slow: a slow neighbour slows one of them only."""
    best = {
        node: max(_links(processes).values(), default=0.0) for node, processes in reports.items()
    }
    if len(best) < 3:
        return
    median = statistics.median(best.values())
    for node, speed in best.items():
        if speed < SLOW * median:
            verdict.blame(
                node, f"its network moves {speed / GB:.2f} GB/s where others move {median / GB:.2f}; "
                "look at its cable, its port, and which interface NCCL or gloo takes (NCCL_SOCKET_IFNAME).",
            )  # fmt: skip


def _links(processes: list[ProcessReport]) -> dict[str, float]:
    """Neighbour -> bytes per second, by the slowest process."""
    found: dict[str, float] = {}
    for process in processes:
        for neighbour, speed in process.links.items():
            found[neighbour] = min(speed, found.get(neighbour, speed))
    return found


def _facts(processes: list[ProcessReport]) -> list[str]:
    links = [
        f"{speed / GB:.2f} GB/s with {neighbour}" for neighbour, speed in _links(processes).items()
    ]
    if not processes or processes[0].size == 1:
        return ["one process: no network"]
    whole = min(process.bandwidth for process in processes)
    return [
        f"all-reduce of {processes[0].size} processes {whole / GB:.2f} GB/s"
        if whole
        else "not measured",
        *links,
    ]
