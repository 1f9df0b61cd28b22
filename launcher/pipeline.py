"""The whole pipeline: check what would stop a late stage, then run all stages in order."""

from __future__ import annotations

from cpt_merge.launcher.execute import run_stage
from cpt_merge.launcher.inputs import check_inputs
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import is_up_to_date
from cpt_merge.launcher.stages import stages_of
from cpt_merge.launcher.start import check_local_batch, check_one_machine


def run_pipeline(run: Run) -> None:
    """Run all stages in order. Errors that would stop a late stage are raised first."""
    stages = stages_of(run.recipe)
    if not all(is_up_to_date(run, stage) for stage in stages if stage.precious):
        check_one_machine(run.recipe)
        check_local_batch(run.recipe)
    check_inputs(run.recipe)
    with run.locked():
        for stage in stages:
            run_stage(run, stage)
