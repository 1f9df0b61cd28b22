"""Extend a tokenizer with pieces for new languages, prove the result, and resize the base's
embeddings.

`extend.extend_tokenizer`, `embeddings.resize.resize_embeddings` and
`verify.check_tokenizer.check_tokenizer` are the calls; `cpt_merge` offers all three. Only the
sections of the recipe are imported here, so that importing is fast.
"""

from cpt_merge.tokenizer_ext.config import TokenizerConfig
from cpt_merge.tokenizer_ext.embeddings.config import EmbeddingsConfig

__all__ = ["EmbeddingsConfig", "TokenizerConfig"]
