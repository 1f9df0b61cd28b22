"""Processes that a launcher started say the same message once, and leave nothing behind."""

import os
import tempfile
from pathlib import Path

import pytest

from cpt_merge.core.world import World
from cpt_merge.launcher import cli


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is one of two of torchrun; the folder of temporary files."""
    monkeypatch.setattr(cli, "find_world", lambda: World(1, 2, 1, "torchrun"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def say_in_a_child(sentence: str) -> None:
    """What a process with the same parent as another one would do; it ends at once."""
    child = os.fork()
    if not child:
        cli._print_once(sentence)
        os._exit(0)
    os.waitpid(child, 0)


def test_a_message_of_several_processes_is_printed_once(
    launched: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getppid", lambda: 12345)  # the launcher of this process and the child
    said: list[object] = []
    monkeypatch.setattr(cli, "_SAID", said)
    cli._print_once("this is wrong.")
    say_in_a_child("this is wrong.")
    say_in_a_child("that is wrong.")
    assert capfd.readouterr().err.count("this is wrong") == 1
    assert list(launched.iterdir()) == []
    for name in said:
        name.close()  # type: ignore[attr-defined]  # as the process that printed it ends
    say_in_a_child("this is wrong.")
    assert capfd.readouterr().err.count("this is wrong") == 1
