"""The backend, which accelerate's configuration chooses."""

from __future__ import annotations

from cpt_merge.core.errors import UserError
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.backend import Backend
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.distributed.settings import BackendSettings
from cpt_merge.training.model.choice import Choice
from cpt_merge.training.phases import PhaseSetup


def build_backend(setup: PhaseSetup, parallel: Parallel) -> Backend:
    """The backend that was asked for, with its weights loaded. Raises as `check_backend` does."""
    asked = parallel.settings
    if check_backend(asked, setup.config) != asked:
        raise ValueError("start_parallel was not given the recipe's training.offload")
    if asked.backend == "deepspeed":
        from cpt_merge.training.distributed.deepspeed import ZeroBackend

        return ZeroBackend.build(setup, parallel)
    from cpt_merge.training.distributed.fsdp import TorchBackend

    return TorchBackend.build(setup, parallel)


def check_choice(asked: BackendSettings, choice: Choice) -> None:
    """Raise `UserError` for a backend in which documents are not kept apart in the way chosen."""
    if asked.backend == "deepspeed":
        from cpt_merge.training.distributed.deepspeed import check_documents

        if asked.zero_stage == 3:
            check_documents(choice)


def check_backend(asked: BackendSettings, config: TrainingConfig) -> BackendSettings:
    """The backend as it will be, with what the recipe offloads.

    Raises `UserError` for one that is not available or contradicts the recipe.
    """
    asked = asked.with_offload(config.offload)
    precision = config.precision
    wanted = {"bf16": "bf16", "pure-bf16": "bf16", "fp32": "no"}[precision]
    if asked.mixed_precision not in ("no", wanted):
        raise UserError(
            f"the accelerate config asks for mixed_precision: {asked.mixed_precision} but "
            f"training.precision is {precision}; set mixed_precision: 'no' there, "
            "since the recipe decides."
        )
    if asked.backend == "deepspeed":
        from cpt_merge.training.distributed.deepspeed import check_zero

        check_zero(asked, config)
    return asked
