"""A language model as judge: requests (`client.py`), prompts, and how its answers are read."""
