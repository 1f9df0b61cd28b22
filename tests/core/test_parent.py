"""A process that asked for it ends when its parent is killed."""

import os
import signal
import subprocess
import sys

CHILD = (
    "from cpt_merge.core.parent import end_with_parent; import time; end_with_parent(); "
    "print('ready', flush=True); time.sleep(600)"
)
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


def test_it_ends_when_the_parent_is_killed() -> None:
    """The pipe that only the child still holds ends when the child does."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == b"ready\n"
        os.kill(parent.pid, signal.SIGKILL)
        assert parent.stdout.read() == b""
