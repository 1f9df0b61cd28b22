"""What becomes of a text between its file and the tokenizer: one module for each kind of step."""
