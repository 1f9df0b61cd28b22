"""The recipe's `data` section."""

from __future__ import annotations

from cpt_merge.core.config import Section, key


class DataConfig(Section):
    """How the text is turned into a token store."""

    processes: int | None = key(
        None,
        "tokenising processes on each node; all its cores, but fewer for little text, if not set",
        gt=0,
    )
    deduplicate: bool = key(
        False, "leave out documents whose exact text, normalised, an earlier one of any source has"
    )
