"""Where events go: the local log and W&B."""
