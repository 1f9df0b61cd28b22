"""Find new pieces: count words, then continue byte-pair encoding or follow a list."""
