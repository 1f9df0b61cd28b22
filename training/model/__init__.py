"""The model as training uses it: loading, loss, attention, recomputation, precision."""
