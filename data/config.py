"""The recipe's `data` section."""

from __future__ import annotations

from typing import Any

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
    near_duplicates: float | None = key(
        None,
        "leave out documents that are as similar as this, or more, to an earlier one of any "
        "source: the share of their runs of five words (Chinese, Japanese: five letters) that both "
        "contain (Jaccard index), such as 0.8; if not set, none are looked for",
        ge=0.3,
        le=1,
    )
    keep_blocks: bool = key(
        True, "keep the tokenised blocks next to the store, as large as it, so that only text that "
        "is added later has to be tokenised",
    )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is in the store, for the key of a stage.

        What is off is left out.
        """
        return self.model_dump(exclude={"processes", "keep_blocks"}, exclude_none=True)
