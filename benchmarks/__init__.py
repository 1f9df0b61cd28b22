"""Measurements that README and docs quote, with the commands that repeat them."""
