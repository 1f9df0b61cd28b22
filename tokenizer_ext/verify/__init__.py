"""Prove the guarantees of an extended tokenizer on the files that were written."""
