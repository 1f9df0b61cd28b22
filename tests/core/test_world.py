"""Where am I: alone, torchrun, Slurm; half a description is an error."""

import pytest

from core.errors import UserError
from core.world import World, find_world

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}


def test_alone() -> None:
    assert find_world({}) == World()


def test_torchrun_and_slurm() -> None:
    assert find_world(TORCHRUN) == World(3, 8, 1, "torchrun")
    assert find_world(SLURM) == World(3, 8, 1, "slurm")


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
