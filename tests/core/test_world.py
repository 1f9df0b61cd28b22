"""Which process this is: alone, torchrun or Slurm; an incomplete environment is an error."""

import socket

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.core.world import (
    READ_BY_US,
    Rendezvous,
    World,
    find_rendezvous,
    find_world,
    first_host,
)

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}


def test_alone() -> None:
    assert find_world({}) == World()


def test_torchrun_and_slurm() -> None:
    assert find_world(TORCHRUN) == World(3, 8, 1, "torchrun")
    assert find_world(SLURM) == World(3, 8, 1, "slurm")


def test_how_a_process_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    world = find_world(TORCHRUN)
    for name in ("ACCELERATE_MIXED_PRECISION", READ_BY_US):
        monkeypatch.delenv(name, raising=False)
    assert (World().started, world.started) == ("started alone", "started by torchrun")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert world.started == "started by accelerate launch"
    monkeypatch.setenv(READ_BY_US, "true")  # under torchrun, with the recipe's configuration
    assert world.started == "started by torchrun"


def test_inside_an_interactive_allocation_one_is_alone() -> None:
    assert find_world({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == World()


def test_torchrun_within_slurm_is_torchrun() -> None:
    assert find_world({**SLURM, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize("missing", TORCHRUN)
def test_a_missing_variable_is_an_error(missing: str) -> None:
    with pytest.raises(UserError, match=missing):
        find_world({name: value for name, value in TORCHRUN.items() if name != missing})


def test_a_contradiction_is_an_error() -> None:
    with pytest.raises(UserError, match="contradict"):
        find_world({**TORCHRUN, "RANK": "8"})


def test_a_step_without_its_size_is_an_error() -> None:
    with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS"):
        find_world({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("gpu[07-09,12],login1", "gpu07"), ("a-b.c1,d", "a-b.c1"), ("r[1-2]n[3-4]",
     None), ("", None),
     ("x[3]-ib,y", "x3-ib")],
)  # fmt: skip
def test_the_first_of_a_node_list(nodes: str, first: str | None) -> None:
    if first:
        assert first_host(nodes) == first
    else:
        with pytest.raises(UserError, match="MASTER_ADDR"):
            first_host(nodes)


STEP = {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "4711"}


def test_under_slurm_the_processes_meet_at_what_follows_from_the_job() -> None:
    assert find_rendezvous(World(3, 8, 1, "slurm"), STEP) == Rendezvous("localhost", 19711)
    assert find_rendezvous(World(0, 8, 0, "slurm"), STEP) == Rendezvous("localhost", 19711)


def test_what_is_set_comes_first() -> None:
    given = {**STEP, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "2000"}
    assert find_rendezvous(World(3, 8, 1, "slurm"), given) == Rendezvous("127.0.0.1", 2000)


@pytest.mark.parametrize(
    ("launcher", "environment", "sentence"),
    [("torchrun", {}, "MASTER_ADDR"), ("slurm", {"SLURM_JOB_ID": "1"}, "SLURM_STEP_NODELIST"),
     ("slurm", {"SLURM_STEP_NODELIST": "localhost"}, "SLURM_JOB_ID"),
     ("slurm", {**STEP, "SLURM_STEP_NODELIST": "no-such-node.invalid"},
      "cannot resolve no-such-node.invalid")],
)  # fmt: skip
def test_nobody_meets_at_localhost_because_a_variable_is_missing(
    launcher: str, environment: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        find_rendezvous(World(1, 2, 0, launcher), environment)


def test_a_port_in_use_is_said_by_rank_0() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        given = {**STEP, "MASTER_PORT": str(taken.getsockname()[1])}
        with pytest.raises(UserError, match="set MASTER_PORT"):
            find_rendezvous(World(0, 2, 0, "slurm"), given)
        find_rendezvous(World(1, 2, 0, "slurm"), given)  # whose node need not have it free
