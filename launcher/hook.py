"""The post-training hook: the merge stage, on the trained shards in memory instead of on files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.launcher.execute import execute
from cpt_merge.launcher.stage import Stage, StageContext, prepare
from cpt_merge.merge.hook import merge_shards, plan_for_shards
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tracking import Tracker
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.run import Hook


def post_training_hook(
    training: StageContext, merge_stage: Stage, models: MergeInputs, out: Path
) -> Hook | None:
    """What a training calls with its shards; None if the recipe leaves the merge to its stage.

    It runs the merge stage in another way, and leaves it finished under the same key: file merge
    and hook make equal bytes from equal inputs, so the pipeline then skips the stage. `models` has
    the model that the training starts from.
    """
    run = training.run
    if not run.recipe.training.post_train_merge:
        return None
    plan_for_shards(run.recipe.merge, models)  # refuses now, not after days of training

    def merge(shards: list[LocalShard], parallel: Parallel) -> None:
        """The merge stage, on these shards; every rank calls it."""

        def merge_in_memory(context: StageContext, tracker: Tracker) -> dict[str, Any]:
            if parallel.world.is_main:  # of an attempt that ended before the stage was recorded
                shutil.rmtree(out, ignore_errors=True)
            return merge_shards(shards, run.recipe.merge, models, out, tracker, parallel)

        in_memory = replace(merge_stage, run=merge_in_memory)
        execute(prepare(run, in_memory, known={"cpt": f"stage:{training.key}"}))

    return merge
