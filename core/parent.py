"""Processes that do not outlive the one that started them."""

from __future__ import annotations

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # of Linux' prctl


def end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when its parent dies, also of SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
