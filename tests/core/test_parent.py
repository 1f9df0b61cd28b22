"""A process that asked for it ends when its parent is killed."""

import time

import pytest

from tests.processes import Processes

LIMIT = 30.0  # seconds; only reached by a child that lives on
WAIT = "import time; print('ready', flush=True); time.sleep(600)"
CHILD = f"from cpt_merge.core.parent import end_with_parent; end_with_parent(); {WAIT}"
# a stage that `accelerate launch` starts for one process, without torchrun's agent
STAGE = f"""
import cpt_merge.launcher.cli as cli
def wait(words):
    {WAIT}
cli.main = wait
cli.stage_main("train")
"""


@pytest.mark.parametrize(
    ("child", "variables"), [(CHILD, {}), (STAGE, {"ACCELERATE_MIXED_PRECISION": "no"})]
)
def test_it_ends_when_the_parent_is_killed(
    child: str, variables: dict[str, str], processes: Processes
) -> None:
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    parent = processes.python("-c", command, env=variables)
    parent.wait_for("ready")
    assert len(processes.left()) == 2
    parent.kill()
    deadline = time.monotonic() + LIMIT
    while processes.left():
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.02)
