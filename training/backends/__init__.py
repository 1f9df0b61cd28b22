"""One loop, several backends: what shards a model and its optimizer, steps them, and saves them.

torch_native.py   FSDP2, HSDP, and one process without sharding: torch's own modules, optimizer and checkpoints
zero.py           DeepSpeed ZeRO 1, 2 and 3
"""

from training.backends.backend import Backend, StepOutcome
from training.backends.build import build_backend

__all__ = ["Backend", "StepOutcome", "build_backend"]
