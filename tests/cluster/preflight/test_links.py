"""Reports of the network test are compared: slow nodes, and nodes that held up the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cluster.preflight.conftest import PreflightJob


def judged(begun: PreflightJob, nodes: int) -> tuple[int, str, str]:
    """The judgement of nodes 1 .. `nodes`, without waiting."""
    named = ",".join(f"node{number + 1}" for number in range(nodes))
    return begun.call("--judge", "--network", "--nodes", named, "--wait", "0")


def write_links(begun: PreflightJob, count: int, speeds: dict[tuple[int, int], float]) -> None:
    """Reports of nodes with one process each and these links."""
    for number in range(1, count + 1):
        links = {
            f"node{sum(pair) - number}": speed for pair, speed in speeds.items() if number in pair
        }
        begun.process(f"node{number}", number - 1, count, bandwidth=1e9, links=links)


def test_the_node_whose_links_are_both_slow_is_named(job: Callable[..., PreflightJob]) -> None:
    begun = job("launch.spare_nodes=1")
    write_links(begun, 3, {(1, 2): 1e9, (2, 3): 2e9, (1, 3): 20e9})
    code, out, said = judged(begun, 3)
    assert (code, out) == (0, "node2\n")
    assert "BAD   node2: its network moves 2.00 GB/s where others move 20.00" in said
    write_links(begun, 2, {(1, 2): 1e9})
    assert judged(begun, 2)[:2] == (0, "\n"), "of two nodes, neither is the slow one"


def test_fewer_processes_must_still_divide_the_batch(job: Callable[..., PreflightJob]) -> None:
    begun = job("launch.spare_nodes=1")
    for rank in range(4):
        begun.process(f"node{rank + 1}", rank, 4, clock=1e9 + 100 * (rank == 2))
    code, out, said = judged(begun, 4)
    assert (code, out) == (2, "node3\n")
    assert "does not divide over 3 processes (without node3)" in said


def test_nodes_that_were_left_out_before_the_network_test_count(
    job: Callable[..., PreflightJob],
) -> None:
    begun = job("launch.spare_nodes=1")
    begun.report("node1")
    begun.report("node2")
    found = begun.call("--judge", "--nodes", "node1,node2,node3", "--wait", "0")
    assert found[:2] == (0, "node3\n")
    begun.process("node1", 0, 2)
    begun.process("node2", 1, 2, clock=2e9)
    assert judged(begun, 2)[:2] == (2, "node3,node2\n")


REACHED = "reached the first process"


@pytest.mark.parametrize(
    ("steps", "bad"),
    [
        (["joined", "joined", REACHED, "joined"], "node3"),
        ([REACHED, "started", "started", "started"], "node1"),  # no node reaches the first
        (["measured its links", "joined", "joined", "measured its links"], "node2,node3"),
        (["joined", None, "joined", "joined"], "node2"),
        ([REACHED, None], "node2"),
        ([REACHED, "started"], "node1,node2"),  # either may be the cause
    ],
)
def test_the_nodes_that_got_least_far_blocked_the_others(
    steps: list[str | None], bad: str, job: Callable[..., PreflightJob]
) -> None:
    begun = job()
    for rank, step in enumerate(steps):
        if step:
            error = "timed out" if step == "joined" else ""
            begun.process(f"node{rank + 1}", rank, len(steps), step, error=error)
    assert judged(begun, len(steps))[1] == f"{bad}\n"
