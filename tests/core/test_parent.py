"""A process that asked for it ends when its parent is killed."""

import os
import signal
import subprocess
import sys

import pytest

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
def test_it_ends_when_the_parent_is_killed(child: str, variables: dict[str, str]) -> None:
    """The pipe that only the child still holds ends when the child does."""
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, env=os.environ | variables
    ) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == b"ready\n"
        os.kill(parent.pid, signal.SIGKILL)
        assert parent.stdout.read() == b""
