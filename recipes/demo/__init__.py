"""The demo's inputs: a tiny English base and chat pair, and text in Traditional Chinese, Korean and
English.
"""
