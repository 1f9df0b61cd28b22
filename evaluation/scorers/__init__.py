"""What says how toxic a reply is: one file per way, `scorer.py` is the interface."""
