"""A lock names its holder, and ends with it."""

import os
import socket
from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.core.lock import Lock


def test_a_second_process_learns_who_holds_the_lock(tmp_path: Path) -> None:
    first, second = (Lock(tmp_path / "lock", tmp_path, "choose another folder") for _ in range(2))
    first.take()
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(UserError, match=f"is in use by {holder}; wait for it, or choose another"):
        second.take()
    assert (first.held, second.held) == (True, False)
    first.release()
    assert os.listdir(tmp_path) == []
    second.take()
    assert second.held
    second.release()


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock", tmp_path, "wait")
    child = os.fork()
    if child == 0:
        lock.take()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "lock").exists()
    lock.take()
    lock.release()
