"""A language model as judge: how it is asked (`client.py`), in which words (`prompts.py`), and what it said."""
