"""Slurm jobs (preflight, attempts) and plans for clusters that are not here."""
