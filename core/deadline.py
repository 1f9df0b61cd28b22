"""When this process must stop: at `--stop-at` or at the end of the Slurm job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timedelta

from cpt_merge.core.errors import UserError

# both in seconds since 1970; the first is set by `--stop-at` and inherited by child processes
STOP_AT = "CPT_MERGE_STOP_AT"
JOB_END = "SLURM_JOB_END_TIME"


def parse_stop_at(text: str, now: datetime) -> float:
    """Seconds since 1970 of `2026-11-24T18:00` (local time), `18:00` (the next one), `+90m`, `+8h`.

    Raises `UserError` for anything else, and for a time in the past.
    """
    units = {"s": "seconds", "m": "minutes", "h": "hours"}
    try:
        if text.startswith("+"):
            moment = now + timedelta(**{units[text[-1]]: float(text[1:-1])})
        elif len(text) == 5:
            clock = datetime.strptime(text, "%H:%M")
            moment = now.replace(hour=clock.hour, minute=clock.minute, second=0, microsecond=0)
            moment += timedelta(days=1) if moment <= now else timedelta()
        else:
            moment = datetime.fromisoformat(text)
    except (ValueError, KeyError):
        raise UserError(
            f"--stop-at {text} is not a time; write 2026-11-24T18:00, 18:00, +90m or +8h."
        ) from None
    if moment.timestamp() <= now.timestamp():
        raise UserError(f"--stop-at {text} is in the past; it is {now:%Y-%m-%dT%H:%M} now.")
    return moment.timestamp()


def deadline(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds since 1970; infinite without a limit. Raises `UserError` for a malformed variable."""
    found = float("inf")
    for name in (STOP_AT, JOB_END):
        if text := environment.get(name):
            try:
                found = min(found, float(text))
            except ValueError:
                raise UserError(
                    f"{name}={text} is not a time in seconds since 1970; unset it."
                ) from None
    return found
