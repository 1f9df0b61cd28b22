"""One file per evaluator of a model; `evaluator.py` says what a evaluator is."""
