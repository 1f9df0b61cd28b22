"""Measurements that README and docs quote; each prints the command that repeats it."""
