"""Training on conversations: the training loop on a store that counts replies, or compares them."""

from cpt_merge.finetune.config import FinetuneConfig, FurtherTraining, PreferenceConfig

__all__ = ["FinetuneConfig", "FurtherTraining", "PreferenceConfig"]
