"""Run `cpt-merge` in this process, which saves the seconds that a new Python takes to import torch."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cpt_merge.launcher.cli import main


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def cpt_merge(*arguments: str | Path) -> Done:
    """`cpt-merge ARGUMENTS`, with the output of the processes that it starts."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        with (
            _process_state(), _captured(1, out), _captured(2, errors), redirect_stdout(out),
            redirect_stderr(errors),
        ):  # fmt: skip
            code = main([str(argument) for argument in arguments])
        texts = []
        for file in (out, errors):
            file.flush()
            file.seek(0)
            texts.append(file.read())
    return Done(code, *texts)


@contextmanager
def _captured(descriptor: int, file: IO[str]) -> Iterator[None]:
    before = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        os.dup2(before, descriptor)
        os.close(before)


@contextmanager
def _process_state() -> Iterator[None]:
    """Put back what a command may change in its process: environment, signal handlers, folder."""
    environment, folder = dict(os.environ), Path.cwd()
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
