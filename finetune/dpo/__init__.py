"""The processes of a direct preference optimisation."""
