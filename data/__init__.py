"""From text to training sequences: sources, tokenising, store, mixture, order, packing."""
