"""The recipe's `data` section."""

from __future__ import annotations

from cpt_merge.core.config import Section, key


class DataConfig(Section):
    """How the text is turned into a token store."""

    processes: int | None = key(
        None,
        "tokenising processes on each node; if not set, one per core, and fewer for little text",
        gt=0,
    )
    deduplicate: bool = key(
        False, "leave out documents with the same normalised text as an earlier one of any source"
    )
    keep_blocks: bool = key(
        True, "keep the tokenised blocks next to the store, as large as it, so that only text that "
        "is added later has to be tokenised",
    )  # fmt: skip
