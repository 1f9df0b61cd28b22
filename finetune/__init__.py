"""Fine-tuning on conversations: the training loop on a store that counts replies only."""

from cpt_merge.finetune.config import FinetuneConfig

__all__ = ["FinetuneConfig"]
