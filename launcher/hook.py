"""The post-training hook: the merge stage, done on the trained shards in memory instead of on files."""

from __future__ import annotations

import time
from contextlib import nullcontext

from core.artifact import StageRecord, stage_key, write_record
from core.progress import say
from launcher.stages import Run, find_stage
from merge.hook import LocalShard, Ranks, merge_shards
from merge.plan import plan
from training.parallel import Parallel
from training.run import Hook


def post_training_hook(run: Run, training_key: str) -> Hook | None:
    """What training calls with its shards; None where the recipe leaves the merge to the merge stage.

    It leaves the merge stage finished, under the key that the stage itself would give: file merge and hook make equal
    bytes, so the pipeline skips the stage.
    """
    if not run.recipe.training.post_train_merge:
        return None
    # what would refuse the merge is found now, not after days of training
    plan(run.recipe.merge, run.resized, run.base, run.chat, run.tokenizer)

    def merge(shards: list[LocalShard], parallel: Parallel) -> None:
        from launcher.pipeline import open_tracker, replacing

        stage, started, main = find_stage("merge"), time.time(), parallel.world.is_main
        config = dict(stage.config(run.recipe))
        inputs = {"cpt": f"stage:{training_key}", "tokenizer": run.finished("tokenizer"), **run.pair_inputs()}
        key = stage_key(stage.name, config, inputs)
        say("── merge (post-training hook) ──")
        with replacing(run.folder("merge"), stage, key) if main else nullcontext():
            parallel.barrier()
            tracker = open_tracker(run, stage.name, key, config, inputs)
            ranks = Ranks(parallel.world.rank, parallel.barrier)
            results = merge_shards(
                shards, run.recipe.merge, run.resized, run.base, run.chat, run.tokenizer, run.merged, tracker, ranks
            )
        if main:
            record = StageRecord(stage.name, key, config, inputs, results=results, tracking=tracker.record())
            record = write_record(run.folder("merge"), record, started)
            say(f"merge: finished in {record.seconds:.1f} s -> {run.merged}")
        tracker.finish()

    return merge
