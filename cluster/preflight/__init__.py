"""Checks before node-hours are burnt: is every node of the job fit, and do they reach each other fast enough?

    --begin             once, on the first node        begin.py    what would stop the run on any node; the nonce
    (none)              one srun for each node         node.py     what a node finds out about itself
    --judge --nodes     on the first node              judge.py    compares the nodes, names the bad ones
    --network           the task layout of training    network.py  joins, and measures what an all-reduce moves
    --judge --network   on the first node              links.py    names nodes that did not join, and slow ones

No node waits for another before it has said what it knows: reports are files in RUN/slurm/preflight/JOB-RESTART, so a
node that hangs or is gone is named by its missing report. They stay there as evidence.
"""
