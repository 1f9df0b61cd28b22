"""Several processes, one training run: what shards a model and its optimizer, steps them, and saves them.

fsdp.py        FSDP2, HSDP, and one process without sharding: torch's own modules, optimizer and checkpoints
deepspeed.py   DeepSpeed ZeRO 1, 2 and 3
"""
