"""One file per facet of a model; `facet.py` says what a facet is."""
