"""Whether a log contains anything that is not at W&B. Does not import wandb without need."""

from __future__ import annotations

from pathlib import Path

from cpt_merge.tracking.sinks.local import read_run


def holds_unsent(directory: Path) -> bool:
    """Whether a stage's log has attempts that are still to be uploaded."""
    if not (directory / "wandb").is_dir():
        return False
    from cpt_merge.tracking.sinks.wandb_history import (  # takes a second to import
        not_uploaded,
        of_other_runs,
    )

    run_id = read_run(directory).get("run_id")
    return run_id is not None and bool(
        not_uploaded(directory, run_id) or of_other_runs(directory, run_id)
    )
