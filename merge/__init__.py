"""The chat vector.

`merged = cpt + ratio * (chat - base)`, from files, shards or models in memory.
"""

from cpt_merge.merge.config import MergeConfig

__all__ = ["MergeConfig"]
