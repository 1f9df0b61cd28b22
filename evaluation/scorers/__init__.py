"""Scorers of how toxic a reply is, one per file; `scorer.py` is their interface."""
