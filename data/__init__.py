"""Text to token store to training sequences: sources, tokenising, mixture, order, packing."""
