"""The one exception that is meant for people."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The text is one sentence: what, where, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """Work was stopped on request, its state is saved, and the same command continues it. Exit code 75.

    `reason`: the signal, or what else asked for it.
    """

    def __init__(self, text: str, reason: str = "") -> None:
        super().__init__(text)
        self.reason = reason
