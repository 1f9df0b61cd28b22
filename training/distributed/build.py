"""Which backend: accelerate's configuration decides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpt_merge.core.errors import UserError
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.backend import Backend
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.phases import Phase


@dataclass(frozen=True)
class Start:
    """What a backend begins with."""

    config: TrainingConfig
    phase: Phase
    model: Path  # the checkpoint whose weights are loaded
    base_rows: int  # rows of the vocabulary before its extension


def build_backend(start: Start, parallel: Parallel) -> Backend:
    """The backend that was asked for, its weights loaded. Raises `UserError` if it cannot be had."""
    precision, asked = start.config.precision, parallel.asked
    wanted = {"bf16": "bf16", "pure-bf16": "bf16", "fp32": "no"}[precision]
    if asked.mixed_precision not in ("no", wanted):
        raise UserError(
            f"the accelerate config asks for mixed_precision: {asked.mixed_precision} but training.precision is "
            f"{precision}; set mixed_precision: 'no' there, the recipe decides."
        )
    if asked.backend == "deepspeed":
        from cpt_merge.training.distributed.deepspeed import ZeroBackend

        return ZeroBackend.build(start, parallel)
    from cpt_merge.training.distributed.fsdp import TorchBackend

    return TorchBackend.build(start, parallel)
