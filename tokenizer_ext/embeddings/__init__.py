"""Embedding rows for the extended vocabulary: resize the matrices and initialise the new rows."""
