"""Reports of nodes are compared: which nodes are bad, and may the job run without them?"""

from collections.abc import Callable

import pytest

from tests.cluster.preflight.conftest import PreflightJob


def test_the_job_runs_without_as_many_nodes_as_it_may_spare(
    job: Callable[..., PreflightJob],
) -> None:
    begun = job("launch.spare_nodes=1")
    begun.report("node1")
    begun.report("node2", problems=["GPU 3 is broken."])
    code, out, said = begun.call("--judge", "--nodes", "node1,node2")
    assert (code, out) == (0, "node2\n")
    assert "continuing without node2 (launch.spare_nodes = 1)" in said
    begun.report("node1", problems=["GPU 0 is broken."])
    assert begun.call("--judge", "--nodes", "node1", "--wait", "0")[0] == 2, "none is left"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clock": 40.0}, "its clock is 40.0 s ahead of the others"),
        ({"doing": "GPUs"}, "its check of GPUs did not end within 0 s"),
        ({"nonce": "of an earlier job"}, "it reads an old nonce"),
        (
            {"same": {"packages": {"torch": "2.12.0", "numpy": "2.4"}}},
            "packages: torch 2.12.0 instead of 2.13.0, which 2 of 3 nodes have; install",
        ),
        ({"same": {"packages": {"torch": "2.13.0"}}}, "numpy nothing instead of 2.4"),
    ],
)
def test_what_makes_a_node_bad(
    changes: dict[str, object], sentence: str, job: Callable[..., PreflightJob]
) -> None:
    begun = job()
    begun.report("node1")
    begun.report("node2", **changes)
    begun.report("node3")
    code, out, said = begun.call("--judge", "--nodes", "node1,node2,node3", "--wait", "0")
    assert (code, out) == (2, "node2\n")
    assert sentence in said


def test_without_a_majority_the_first_node_is_right(job: Callable[..., PreflightJob]) -> None:
    begun = job()
    begun.report("node2", same={"code": {"digest": "bb"}}, clock=-7.0)
    begun.report("node1")
    _, out, said = begun.call("--judge", "--nodes", "node1,node2")
    assert out == "node2\n"
    tie = "which as many nodes have (1 each; the first of them is taken as right)"
    assert f"code: digest bb instead of aa, {tie}" in said
    assert "its clock is 7.0 s behind" in said


def test_another_driver_is_a_note_only(job: Callable[..., PreflightJob]) -> None:
    begun = job()
    begun.report("node1", same={"driver": {"driver": "580.1"}})
    begun.report("node2", same={"driver": {"driver": "570.9"}})
    code, out, said = begun.call("--judge", "--nodes", "node1,node2")
    assert (code, out) == (0, "\n")
    assert "note  node2: driver" in said
