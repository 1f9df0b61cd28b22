"""Checks before a job uses its nodes: is each fit, and is the network between them fast?

    --begin             once, on the first node     command.py    inputs and disk; writes the nonce
    (no option)         one srun for each node      node.py       what a node finds out about itself
    --judge --nodes     on the first node           judgement.py  compares the nodes, names bad ones
    --network           training's task layout      network.py    joins, measures all-reduces
    --judge --network   on the first node           links.py      names nodes that did not join, or
                                                                  whose network is slow

No node waits for another before it has reported what it knows: reports are files in
RUN/slurm/preflight/JOB-RESTART. So a node that hangs or is lost is found by its missing report.
"""
