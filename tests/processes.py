"""The one way in which tests start processes: each is watched by its output and ended in all cases.

A test asks for the fixture `processes`:

    process = processes.python("-m", "cpt_merge.training", recipe)
    process.wait_for("step 3")                     # a line of its output; fails at once if the process ends
    process.wait_until(path.is_file, "a checkpoint")
    process.signal(signal.SIGTERM)
    assert process.finish() == 75, process.stderr

    done = processes.run_python("-c", code)        # start and wait for the end

At the end of the test every process that descends from a started one is killed, also those that are in a session of
their own (torchrun's workers): all of them carry a mark in their environment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 300.0  # seconds; only reached by a process that hangs
MARK = "CPT_MERGE_TEST"


class Process:
    """A started process. Its output goes to files, so it never blocks on a full pipe."""

    def __init__(self, command: list[str], folder: Path, **options: Any) -> None:
        self.command = command
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        with self._stdout.open("wb") as output, self._stderr.open("wb") as errors:
            self._popen = subprocess.Popen(
                command, stdout=output, stderr=errors, start_new_session=True, **options
            )

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its session and of its process group."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; None while the process runs."""
        return self._popen.poll()

    @property
    def stdout(self) -> str:
        """What it has written to stdout."""
        return self._stdout.read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """What it has written to stderr."""
        return self._stderr.read_text(encoding="utf-8", errors="replace")

    def write(self, text: str) -> None:
        """Write to stdin; needs `stdin=subprocess.PIPE` at the start."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(text.encode())
        self._popen.stdin.flush()

    def close_stdin(self) -> None:
        """End its input."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def wait_until(
        self, condition: Callable[[], Any], what: str = "the event", limit: float = LIMIT
    ) -> None:
        """Wait for a condition. Fails, with the output, when the process ends first or at the limit."""
        deadline = time.monotonic() + limit
        while not condition():
            ended = self.returncode is not None
            if ended and condition():  # it came about just before the end
                return
            if ended or time.monotonic() > deadline:
                reason = f"ended with {self.returncode}" if ended else f"ran for {limit:.0f} s"
                pytest.fail(f"the process {reason} without {what}\n{self._tail()}")
            time.sleep(0.02)

    def wait_for(self, text: str, limit: float = LIMIT) -> None:
        """Wait until its stdout or stderr contains a text."""
        self.wait_until(lambda: text in self.stdout or text in self.stderr, repr(text), limit)

    def signal(self, number: int) -> None:
        """Send a signal to this process alone."""
        self._popen.send_signal(number)

    def signal_group(self, number: int) -> None:
        """Send a signal to this process and those that it started in its group, as a terminal does."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """Kill this process alone and wait for its end."""
        self._popen.kill()
        self._popen.wait()

    def finish(self, limit: float = LIMIT) -> int:
        """Wait for the end; returns the exit code."""
        try:
            return self._popen.wait(limit)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the process has not ended after {limit:.0f} s\n{self._tail()}")

    def _tail(self) -> str:
        return f"{self.command}\n{self.stdout[-3000:]}\n{self.stderr[-3000:]}"


class Processes:
    """Starts processes, and ends all of them and their descendants."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._mark = folder, uuid.uuid4().hex
        self._started: list[Process] = []

    def start(
        self, *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT,
        stdin: int | None = subprocess.DEVNULL,
    ) -> Process:  # fmt: skip
        """Start a command. `env` is added to this process's environment."""
        folder = self._folder / str(len(self._started))
        folder.mkdir(parents=True)
        environment = {**os.environ, **(env or {}), MARK: self._mark}
        words = [str(word) for word in command]
        process = Process(words, folder, env=environment, cwd=cwd, stdin=stdin)
        self._started.append(process)
        return process

    def python(self, *arguments: str | Path, **options: Any) -> Process:
        """Start this Python with arguments; options as for `start`."""
        return self.start(sys.executable, *arguments, **options)

    def run(self, *command: str | Path, limit: float = LIMIT, **options: Any) -> Process:
        """Start a command and wait for its end."""
        process = self.start(*command, **options)
        process.finish(limit)
        return process

    def run_python(self, *arguments: str | Path, limit: float = LIMIT, **options: Any) -> Process:
        """Start this Python and wait for its end."""
        return self.run(sys.executable, *arguments, limit=limit, **options)

    def end_all(self) -> None:
        """Kill what is left of all that was started."""
        for process in self._started:
            with suppress(ProcessLookupError):
                process.signal_group(signal.SIGKILL)
            if process.returncode is None:
                process.kill()
        while left := self.left():  # a process that was just forked is found in the next round
            for number in left:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.02)

    def left(self) -> list[int]:
        """The ids of all living processes that descend from a started one."""
        mark = f"{MARK}={self._mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):  # it has ended, or belongs to somebody else
                    if mark in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
        return found


@contextmanager
def started_processes(folder: Path) -> Iterator[Processes]:
    """`Processes` for fixtures of a wider scope; ends all of them at the end of the block."""
    all_of_them = Processes(folder)
    try:
        yield all_of_them
    finally:
        all_of_them.end_all()


@pytest.fixture
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Starts processes for one test and ends them in all cases."""
    with started_processes(tmp_path_factory.mktemp("processes")) as all_of_them:
        yield all_of_them
