"""The backend, which accelerate's configuration chooses."""

from __future__ import annotations

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say_once
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.agreement import not_used
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
    """The backend as it will be, with what the recipe offloads; a line says what has no effect.

    Raises `UserError` for one that is not available or contradicts the recipe.
    """
    asked = asked.agreed(config)
    if unused := not_used(asked.others, config):
        say_once(
            "not used of the accelerate configuration, since the recipe decides: "
            f"{', '.join(unused)}"
        )
    if asked.backend == "deepspeed":
        from cpt_merge.training.distributed.deepspeed import check_zero

        check_zero(asked)
        if config.shield:
            raise UserError(
                "training.shield freezes columns of gradients, which DeepSpeed keeps as one flat "
                "vector; use FSDP2 (launch.accelerate_config: fsdp2)."
            )
    return asked
