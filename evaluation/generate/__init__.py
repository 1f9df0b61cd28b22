"""Replies from a model in this process or from an endpoint."""
