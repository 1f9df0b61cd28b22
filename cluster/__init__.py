"""What surrounds a job on a cluster: preflight, attempts, and plans for clusters that are not here."""
