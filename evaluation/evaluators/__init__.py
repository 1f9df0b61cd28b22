"""What can be measured of a model: one evaluator per file; `evaluator.py` is their interface."""
