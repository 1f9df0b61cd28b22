"""Replies from a model in memory (`transformers.py`) and answers from endpoints (`endpoint.py`)."""
