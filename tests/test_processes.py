"""The fixture that starts processes leaves none behind."""

import signal
from pathlib import Path

import pytest

from tests.processes import Processes, started_processes

CHILD_IN_ITS_OWN_SESSION = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("started", child.pid, flush=True)
time.sleep(600)
"""


def test_everything_that_was_started_ends_with_the_block(tmp_path: Path) -> None:
    with started_processes(tmp_path) as processes:
        process = processes.python("-S", "-c", CHILD_IN_ITS_OWN_SESSION)
        process.wait_for("started")
        assert len(processes.left()) == 2
    assert processes.left() == []
    assert process.returncode == -signal.SIGKILL


def test_waiting_ends_when_the_process_does(processes: Processes) -> None:
    process = processes.python("-S", "-c", "print('it is over'); raise SystemExit(3)")
    with pytest.raises(pytest.fail.Exception, match=r"ended with 3 without 'never'"):
        process.wait_for("never")
    process.wait_for("it is over")
    assert process.finish() == 3
