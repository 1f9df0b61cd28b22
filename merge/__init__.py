"""Embedding rows and the chat vector: `merged = cpt + ratio * (chat - base)`, from files or from the trained shards."""

from cpt_merge.merge.config import MergeConfig

__all__ = ["MergeConfig"]
