"""The post-training hook: the merge stage, done on the trained shards in memory instead of on files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

from cpt_merge.core.artifact import stage_key
from cpt_merge.launcher.stages import Run, find_stage, merge_inputs
from cpt_merge.merge.hook import LocalShard, merge_shards, plan_for_shards
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tracking import Tracker
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.run import Hook


def post_training_hook(run: Run, training_key: str) -> Hook | None:
    """What training calls with its shards; None where the recipe leaves the merge to the merge stage.

    It is the merge stage with another way to run, and leaves it finished under the key that the stage would have:
    file merge and hook make equal bytes for equal inputs, so the pipeline skips the stage.
    """
    if not run.recipe.training.post_train_merge:
        return None
    # what would refuse the merge is found now, not after days of training
    models = MergeInputs(run.resized, run.base, run.chat, run.tokenizer)
    plan_for_shards(run.recipe.merge, models)

    def merge(shards: list[LocalShard], parallel: Parallel) -> None:
        """The merge stage, on these shards; every rank calls it."""
        from cpt_merge.launcher.pipeline import execute

        def merge_in_memory(run: Run, key: str, tracker: Tracker) -> dict[str, Any]:
            if parallel.world.is_main:  # of an attempt that ended before the stage was recorded
                shutil.rmtree(run.merged, ignore_errors=True)
            return merge_shards(shards, run.recipe.merge, models, run.merged, tracker, parallel)

        stage = replace(find_stage("merge"), run=merge_in_memory)
        config = dict(stage.config(run.recipe))
        inputs = merge_inputs(run, f"stage:{training_key}")
        execute(run, stage, stage_key(stage.name, config, inputs), config, inputs)

    return merge
