"""The merge as a stage: files in, a chat model out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoint.writer import CheckpointWriter
from merge import ancestry, finish, report
from merge.config import MergeConfig
from merge.engine import merge_files
from merge.plan import plan
from tracking.tracker import Tracker


def run(
    config: MergeConfig, cpt: Path, base: Path, chat: Path, tokenizer: Path, out: Path, tracker: Tracker
) -> dict[str, Any]:
    """Write `cpt + ratio * (chat - base)` to `out` and return the numbers that are worth a summary.

    `base` and `chat` are the original pair with their own tokenizers, `tokenizer` holds the extended one (and its
    vocabulary map), `out` is missing or empty. Raises `UserError` for models that do not fit together.
    """
    the_plan = plan(config, cpt, base, chat, tokenizer)
    report.warn(ancestry.warnings(ancestry.sample(the_plan)))
    writer = CheckpointWriter(out, the_plan.layout())
    with writer.alone():
        statistics = merge_files(the_plan, writer)
        writer.close()
        results = finish.write_merged(the_plan, statistics, writer.directory)
        writer.publish()
    report.log(results, out, tracker)
    return results
