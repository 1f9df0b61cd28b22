"""The merge as a stage: files in, a chat model out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import fingerprint
from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.core.progress import say
from cpt_merge.core.world import find_world
from cpt_merge.merge import ancestry, finish, report
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.engine import merge_files
from cpt_merge.merge.plan import MergeInputs, MergePlan, check_output, plan
from cpt_merge.merge.slices import give_back_freed_memory
from cpt_merge.merge.tokens import describe
from cpt_merge.merge.vectors import check_base
from cpt_merge.merge.work import Work, staging
from cpt_merge.tracking import Tracker

_ORDER = "1"  # changes with the order of the arithmetic or the blocks: an older unfinished merge is of no use then


def run(config: MergeConfig, inputs: MergeInputs, out: Path, tracker: Tracker) -> dict[str, Any]:
    """Write `cpt + ratio * (chat - base)` to `out` and return the numbers that are worth a summary.

    Called by one process, or by all of a launcher's, which divide the work; the results are the first one's. `out` is
    missing or empty; what a killed run left beside it is continued. Raises `RefusedError` for what does not fit.
    """
    world, out = find_world(), out.absolute()
    the_plan = plan(config, inputs)
    the_digest = digest(the_plan)
    if world.is_main:
        staging(out, the_digest).finish_commit()
    finished = report.read_finished(out, the_digest)
    if finished is not None:
        say(f"merge: {out} holds the result of this very merge already")
        return finished if world.is_main else {}
    check_output(the_plan, out)
    for vector in the_plan.vectors:
        check_base(vector.source)
    if world.is_main:
        for line in describe(the_plan.changes, the_plan.cpt_rows, the_plan.rows):
            say(f"merge: {line}")
        report.warn(ancestry.warnings(the_plan, ancestry.sample(the_plan)))
    give_back_freed_memory()  # the vocabularies
    work = Work(out, the_plan.layout(), the_digest, world)
    return _merge(the_plan, work, tracker)


def _merge(the_plan: MergePlan, work: Work, tracker: Tracker) -> dict[str, Any]:
    """Raises `Interrupted` where the work can be continued, `UserError` where it is of no use."""
    try:
        work.open()
        statistics = merge_files(the_plan, work)
        if not work.world.is_main:
            work.close()
            work.wait_for(
                lambda: report.read_finished(work.out, work.digest) is not None,
                "the first process to finish",
            )
            return {}
        give_back_freed_memory()
        results = finish.write_merged(the_plan, statistics, work.directory, work.digest)
        work.publish()
    except (KeyboardInterrupt, Interrupted) as stop:
        sentence = f"the merge was stopped; the same command continues it (from {work.directory})."
        work.abandon(sentence)
        raise Interrupted(sentence, getattr(stop, "reason", "SIGINT")) from None
    except UserError as error:
        work.abandon(str(error), useless=True)
        raise
    except BaseException as error:
        work.abandon(f"a process of this merge failed ({error}); the same command continues it.")
        raise
    report.log(results, work.out, tracker)
    return results


def digest(the_plan: MergePlan) -> str:
    """What tells this merge from others: rules, inputs, layout."""
    models = {label: fingerprint(model.directory) for label, model in the_plan.models().items()}
    headers = [header.hex() for header in the_plan.layout().headers.values()]
    text = json.dumps(
        [_ORDER, the_plan.config.model_dump(), models, fingerprint(the_plan.tokenizer), headers],
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]
