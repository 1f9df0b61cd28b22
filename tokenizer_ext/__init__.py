"""Extend a tokenizer with pieces for new languages, prove the result, and map its rows back to the base's."""

from cpt_merge.tokenizer_ext.config import TokenizerConfig
from cpt_merge.tokenizer_ext.run import run

__all__ = ["TokenizerConfig", "run"]
