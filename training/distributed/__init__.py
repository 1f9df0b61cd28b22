"""What shards a model and its optimizer over processes, steps them, saves them and stops them.

backend.py      what the loop asks of a backend
fsdp.py         FSDP2, HSDP, and one process without sharding (compute_copy.py)
deepspeed.py    DeepSpeed ZeRO 1, 2 and 3 (deepspeed_compat.py: what is not public in it)
build.py        which of them
checkpoint.py   checkpoints of a run in progress
stopping.py     all processes stop at the same micro-batch
offload.py      what backends share that keep the optimizer or all weights in the CPU's memory
parallel.py     process groups, device, mesh
"""
