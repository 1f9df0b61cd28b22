"""The network test: real processes join, measure each link, and miss one that does not come."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt_merge.cluster.preflight import network
from cpt_merge.cluster.preflight.network import check_network, ring
from cpt_merge.cluster.preflight.reports import read_processes
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.recipe import load_recipe
from tests.cluster.preflight.conftest import JOB, PreflightJob
from tests.distributed import run_ranks


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_a_ring_has_all_neighbours_and_no_node_twice_in_a_round(count: int) -> None:
    rounds = ring(count)
    edges = {frozenset(pair) for together in rounds for pair in together}
    assert edges == {
        frozenset((number, (number + 1) % count)) for number in range(count) if count > 1
    }
    assert sum(map(len, rounds)) == len(edges)
    for together in rounds:
        assert len({node for pair in together for node in pair}) == 2 * len(together)


def network_test(arguments: list[str], size: int, wait: float) -> str:
    """One process on its own node, of `size` expected ones. Returns the error, if any."""
    network.BYTES["cpu"] = 2**16
    node = f"node{int(os.environ['RANK']) + 1}"
    os.environ.update(JOB, WORLD_SIZE=str(size), SLURMD_NODENAME=node)
    try:
        check_network(load_recipe(Path(arguments[0]), arguments[1:]), wait)
    except UserError as error:
        return str(error)
    return ""


def test_processes_join_and_measure_every_link(job: Callable[..., PreflightJob]) -> None:
    begun = job("training.global_batch_size=9")
    assert run_ranks(network_test, 3, begun.arguments, 3, 60.0) == ["", "", ""]
    reports = {node: found[0] for node, found in read_processes(begun.folder).items()}
    assert {node: set(report.links) for node, report in reports.items()} == {
        "node1": {"node2", "node3"},
        "node2": {"node1", "node3"},
        "node3": {"node1", "node2"},
    }
    assert all(report.bandwidth > 0 for report in reports.values())
    assert all(min(report.links.values()) > 0 for report in reports.values())
    clocks = [report.clock for report in reports.values()]
    assert max(clocks) - min(clocks) < 2
    code, out, said = begun.call("--judge", "--network", "--nodes", "node1,node2,node3")
    assert code in (0, 2), out  # the links of one machine may differ
    assert "all-reduce of 3 processes" in said


def test_a_node_that_does_not_come_is_named_by_those_that_wait(
    job: Callable[..., PreflightJob],
) -> None:
    begun = job("training.global_batch_size=9")
    errors = run_ranks(network_test, 2, begun.arguments, 3, 1.0)
    assert "2/3 clients joined" in errors[0]
    nodes = "node1,node2,node3"
    code, out, said = begun.call("--judge", "--network", "--nodes", nodes, "--wait", "0")
    assert (code, out) == (2, "node3\n")
    assert "a process of it did not start the network test" in said


def test_an_error_of_every_process_is_no_nodes_fault(
    job: Callable[..., PreflightJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = job()
    with monkeypatch.context() as task:
        task.setenv("SLURM_STEP_NUM_TASKS", "3")
        task.setenv("SLURM_LOCALID", "0")
        for rank in range(3):
            task.setenv("SLURM_PROCID", str(rank))
            task.setenv("SLURMD_NODENAME", f"node{rank + 1}")
            with pytest.raises(UserError, match="does not divide over 3 processes"):
                check_network(begun.recipe, 60)
    code, out, sentence = begun.call("--judge", "--network", "--nodes", "node1,node2,node3")
    assert (code, out) == (2, "")
    assert (
        "training.global_batch_size = 8 does not divide over 3 processes; set 9, or take 2."
        in sentence
    )
