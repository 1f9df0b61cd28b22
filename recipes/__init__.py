"""Recipes: one YAML per real use, and the preparation of the demo's own inputs."""
