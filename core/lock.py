"""A lock between processes that ends with the process that holds it.

The `filelock` package was weighed and is not used: on a file system without flock it silently takes
a lock that outlives a killed process, it leaves lock files behind, and it does not say who holds a
lock.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from cpt_merge.core.errors import UserError


class Lock:
    """Held from `take` to `release`, or to the end of the process. The lock file names the holder.

    `what` is locked, in the words of a message; `advice` says what to do if it is in use.
    """

    def __init__(self, path: Path, what: Path, advice: str) -> None:
        self.path, self.what, self.advice = path, what, advice
        self._handle: int | None = None

    def take(self) -> None:
        """Raises `UserError` if another process holds the lock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.read(handle, 1000).decode(errors="replace").strip() or "another process"
                os.close(handle)
                raise UserError(
                    f"{self.what} is in use by {holder}; wait for it, or {self.advice}."
                ) from None
            if self._is_current(handle):
                break
            os.close(handle)  # the previous holder removed the file in the meantime
        self._handle = handle
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())

    @property
    def held(self) -> bool:
        """Whether this process holds the lock."""
        return self._handle is not None

    def release(self) -> None:
        """Let other processes take the lock."""
        if self._handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None

    def _is_current(self, handle: int) -> bool:
        """Whether the open file is still the one at the path."""
        try:
            return os.stat(self.path).st_ino == os.fstat(handle).st_ino
        except FileNotFoundError:
            return False
