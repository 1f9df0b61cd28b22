"""A lock that ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from core.errors import UserError


class Lock:
    """Held from `take` to `release`, on a file of its own that is removed then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def take(self) -> None:
        """Raises `UserError` if another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                raise UserError(f"{self.path} is held by another process; wait for it, or write elsewhere.") from None
            if self._is_still_there(handle):
                self._handle = handle
                return
            os.close(handle)  # its holder removed it in between

    def release(self) -> None:
        """Let others in."""
        if self._handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None

    def _is_still_there(self, handle: int) -> bool:
        try:
            return os.stat(self.path).st_ino == os.fstat(handle).st_ino
        except FileNotFoundError:
            return False
