"""Hugging Face checkpoints on disk: read lazily, written in place by any number of processes, without a model."""
