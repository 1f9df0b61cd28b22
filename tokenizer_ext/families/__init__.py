"""The two families of BPE tokenizers that can be extended, and the format of `tokenizer.json`."""
