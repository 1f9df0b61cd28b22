"""A training whose length changed continues an earlier one; `training/growth.py` has the rule.

The earlier result is moved aside, whole. The new folder begins with the checkpoint that both have
in common (hard links, so it takes no space until the earlier one is removed) and with the log.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt_merge.core.artifact import read_json_lines, read_record, write_json, write_json_lines
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted
from cpt_merge.launcher.freshness import different_keys
from cpt_merge.launcher.stage import StageContext
from cpt_merge.launcher.stage_folder import BEGUN_FILE, Begun, asides, next_aside, read_begun

if TYPE_CHECKING:
    from cpt_merge.data.sources import Corpus
    from cpt_merge.training.config import TrainingConfig
    from cpt_merge.training.growth import Branch
    from cpt_merge.training.stretches import Stretch


@dataclass(frozen=True)
class Continued:
    """An earlier training, and what the one of now continues from."""

    folder: Path  # of the earlier one
    begun: Begun
    branch: Branch

    def __str__(self) -> str:
        branch, curve = self.branch, self.branch.state.curve
        step = f"step {branch.state.step:,}"
        text = f"it continues {self.folder} of {counted(branch.steps, 'step')} from {step}"
        if branch.rewarmed:
            return (
                f"{text}; the learning rate rises again from {curve['origin']:.3g} of its peak in "
                f"{counted(curve['warmup'], 'step')} and falls until step {curve['stop']:,}"
            )
        if branch.repeats:
            text += ", where the learning rate had not begun to fall"
        return f"{text}; its steps up to there are those of the new length"


def find_continued(context: StageContext) -> Continued | None:
    """The earlier training that this one continues, if its length is what differs.

    Raises `UserError` if it could be continued with another mixture only.
    """
    folders = [folder for folder in (context.folder, *asides(context.folder)) if folder.is_dir()]
    earlier = [(folder, begun) for folder in folders if (begun := _read_begun(folder))]
    if any(begun.key == context.key for _, begun in earlier):
        return None  # that one is continued as it is
    found = [one for folder, begun in earlier if (one := _continued(context, folder, begun))]
    here = [one for one in found if one.folder == context.folder]
    return max(here or found, key=lambda one: one.branch.state.step, default=None)


def _read_begun(folder: Path) -> Begun | None:
    """What a training was made of, which its record tells where `begun.json` has the key alone."""
    begun = read_begun(folder)
    if begun and not begun.config and (record := read_record(folder)) and record.key == begun.key:
        return replace(begun, config=record.config, inputs=record.inputs)
    return begun


def _continued(context: StageContext, folder: Path, begun: Begun) -> Continued | None:
    if not _differs_in_length(context, begun):
        return None
    from cpt_merge.training.growth import find_checkpoint, recorded_config
    from cpt_merge.training.stretches import same_until

    old, new = recorded_config(begun.config), context.run.recipe.training
    corpus = context.run.recipe.corpus
    before = _with_amounts(corpus, begun.config["mixture"])
    read = _stretches(context, before, old), _stretches(context, corpus, new)
    until, checkpoints = same_until(*read), folder / "checkpoints"
    if branch := find_checkpoint(checkpoints, old, new, context.key, until):
        return Continued(folder, begun, branch)
    budgets = any(one.tokens or one.epochs for one in corpus.sources)
    if until or not budgets or before.amounts() != corpus.amounts() or folder != context.folder:
        return None
    if not find_checkpoint(checkpoints, old, new, context.key, old.steps):
        return None  # also with the same shares
    (was, *_), (now, *_) = read
    changed = [
        f"{one.name} {one.share:.2%} instead of {other.share:.2%}"
        for one, other in zip(was.shares, now.shares, strict=True)
        if one.share != other.share
    ]
    raise UserError(
        f"training.tokens was {old.tokens:,} when {folder} was trained, and with {new.tokens:,} "
        f"the sources' shares are others ({', '.join(changed)}), so it is not a part of the "
        f"longer run; multiply their `tokens` and `epochs` by {new.tokens / old.tokens:g}, or "
        "give the run a new name to train from the start."
    )


def _differs_in_length(context: StageContext, begun: Begun) -> bool:
    from cpt_merge.training.growth import but_for_length

    config = json.loads(json.dumps(context.config, default=str))
    return (
        begun.inputs == context.inputs
        and any(begun.config.get(name) != config[name] for name in ("tokens", "phases"))
        and but_for_length(begun.config) == but_for_length(config)
    )


def _with_amounts(corpus: Corpus, amounts: Mapping[str, Any]) -> Corpus:
    """The corpus with the amounts that it had; its text is the same."""
    sources = [
        source.model_copy(update=was)
        for source, was in zip(corpus.sources, amounts["sources"], strict=True)
    ]
    return corpus.model_copy(update={"sources": sources, "shares": amounts["shares"]})


def _stretches(context: StageContext, corpus: Corpus, config: TrainingConfig) -> list[Stretch]:
    from cpt_merge.data.store import Store
    from cpt_merge.training.stretches import stretches_of

    sizes = [source.train.tokens for source in Store.open(context.run.store).info.sources]
    return stretches_of(config, corpus, sizes)


def what_training_does(context: StageContext) -> str | None:
    """One sentence on what becomes of an earlier training of other settings; None if there is none.

    Raises `UserError` as `find_continued` does.
    """
    folder = context.folder
    begun = _read_begun(folder)
    if continued := find_continued(context):
        return f"training: {continued}"
    if begun is None or begun.key == context.key or not (folder / "checkpoints").is_dir():
        return None
    if any(one.key == context.key for one in map(read_begun, asides(folder)) if one):
        return None
    config = json.loads(json.dumps(context.config, default=str))
    changed = [*different_keys(begun.config, config)] if begun.config else []
    if begun.inputs and begun.inputs != context.inputs:
        changed.append("what it is made of")
    return (
        f"training: it starts from the first step ({', '.join(changed) or 'settings'} changed); "
        f"{folder} is moved to {next_aside(folder)}"
    )


def begin_longer(context: StageContext, continued: Continued, aside: Path) -> None:
    """Fill the stage's folder with what the training continues from.

    `aside` is where the previous content of the folder is now. A kill leaves the earlier training
    whole, and nothing under the folder's name.
    """
    from cpt_merge.training.distributed.checkpoint import STATE_FILE

    branch, target = continued.branch, context.folder
    source = aside if continued.folder == target else continued.folder
    new = target.with_name(f"{target.name}.growing")
    shutil.rmtree(new, ignore_errors=True)
    checkpoint = Path("checkpoints") / branch.checkpoint.name
    own = shutil.ignore_patterns(STATE_FILE)
    shutil.copytree(source / checkpoint, new / checkpoint, ignore=own, copy_function=_link)
    write_json(new / checkpoint / STATE_FILE, asdict(branch.state))
    _copy_records(source, new, branch.state.step)
    # W&B cannot take rows back: if steps are done again at another rate, its run is a new one
    anew = branch.repeats
    left_out = shutil.ignore_patterns("wandb", *(["run.json", "nodes"] if anew else []))
    if (source / "log").is_dir():
        shutil.copytree(source / "log", new / "log", ignore=left_out)
    tracked = "" if anew else continued.begun.tracked_key
    begun = Begun(context.key, context.config, context.inputs, tracked)
    write_json(new / BEGUN_FILE, asdict(begun))
    os.replace(new, target)
    if not anew:
        for path in [*source.glob("log/wandb"), *source.glob("log/nodes/*/wandb")]:
            os.replace(path, target / path.relative_to(source))


def _copy_records(source: Path, new: Path, step: int) -> None:
    """Copy what callbacks recorded of the steps; who reads a table cuts its rows off."""
    for path in source.glob("*.jsonl"):
        rows = read_json_lines(path)
        kept = [row for row in rows if not isinstance(row, dict) or row.get("step", 0) <= step]
        write_json_lines(new / path.name, kept)


def _link(source: str, target: str) -> str:
    """A hard link, or a copy where there are none; the files of checkpoints never change."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
