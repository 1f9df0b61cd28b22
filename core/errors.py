"""The exceptions that are meant for users."""

from __future__ import annotations

from cpt_merge.core.redaction import without_secrets


class UserError(Exception):
    """Something that the user can fix. The text is one sentence: what, where, what to do.

    The command line prints it without a traceback and exits with code 2. Keys and passwords in it
    are hidden.
    """

    def __str__(self) -> str:
        return str(without_secrets(super().__str__()))


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """Work was stopped on request and the same command continues it. Exit code 75.

    `reason` is the signal, or what else asked for the stop.
    """

    def __init__(self, text: str, reason: str = "") -> None:
        super().__init__(text)
        self.reason = reason
