"""Hugging Face checkpoints on disk, read lazily and written by any number of processes."""
