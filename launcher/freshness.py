"""Whether the results that a stage is about to use are still those of the recipe and its files.

A stage alone (`cpt-merge train RECIPE`) uses what earlier stages left. If the base, a list, a
setting or a stage has changed since one of those was made, the results do not belong together, and
the stage is refused. Changed text is refused where the store of it is used, in training, before
days of work; further on, the trained model is what it is, and one line says that its text changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import StageRecord, read_record
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted, say
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import Stage

_SHOWN = 3


@dataclass(frozen=True)
class _Change:
    """Something that differs from what a stage was made of."""

    text: str  # "ko.jsonl has changed"
    of_text: bool  # of the corpus, or of what is read of it


def check_current(run: Run, stage: Stage) -> None:
    """Raise `UserError` if results that the stage would use no longer belong together."""
    for made in _builds_on(stage):
        record = read_record(run.folder(made.name))
        if record is None:
            continue
        changes = list(_changes(run, made, record))
        uses_store = made in stage.inputs.values() and made.output and made.output.kind == "store"
        refused = [one for one in changes if uses_store or not one.of_text]
        if refused:
            raise UserError(
                f"{stage.name} would use {run.folder(made.name)}, but since that was made "
                f"{_listed(refused)}; run `cpt-merge {made.command} RECIPE` and the stages after "
                "it again (`cpt-merge run RECIPE` does), or undo the change."
            )
        if changes:
            say(
                f"{stage.name}: {run.folder(made.name)} is used as it is, although since it was "
                f"made {_listed(changes)}; `cpt-merge run RECIPE` would make it again"
            )


def _builds_on(stage: Stage) -> list[Stage]:
    """All stages that a stage builds on, the first one first."""
    found: dict[str, Stage] = {}
    for other in stage.inputs.values():
        found |= {one.name: one for one in [*_builds_on(other), other]}
    return list(found.values())


def _listed(changes: list[_Change]) -> str:
    more = len(changes) - _SHOWN
    texts = [change.text for change in changes[:_SHOWN]] + ([f"{more} more"] if more > 0 else [])
    return ", ".join(texts)


def _changes(run: Run, stage: Stage, record: StageRecord) -> Iterator[_Change]:
    """What has changed since the stage was finished, but for the results of other stages."""
    config = json.loads(json.dumps(dict(stage.config(run.recipe)), default=str))
    for key in different_keys(record.config, config):
        yield _Change(f"the setting {key} has changed", key.startswith(("corpus", "mixture")))
    try:
        read = stage.reads(run)
    except UserError as error:  # a file that is gone cannot be compared, nor is it needed
        say(f"{stage.name}: its result is used as it is ({str(error).rstrip('.')})")
        read = {}
    for name, digest in read.items():
        before = record.inputs.get(name)
        if before is not None and before != digest:
            finished = datetime.fromisoformat(record.finished).timestamp()
            yield from _changed_input(run, name, before, digest, finished)
    for name, other in stage.inputs.items():
        if name not in read and record.inputs.get(name) != other.fingerprint(run):
            yield _Change(f"{other.name} has been run again", of_text=False)


def different_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """The keys, as section.key, whose values differ."""
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from (f"{name}.{key}" for key in different_keys(old, new))
        else:
            yield name


def _changed_input(
    run: Run, name: str, before: str, now: str, finished: float
) -> Iterator[_Change]:
    kind, _, path = name.partition(" ")
    if kind == "text":
        yield _Change(_changed_text(run, path, before.split(), now.split()), of_text=True)
    elif kind == "list":
        verb = "has changed" if Path(path).exists() else "is gone"
        yield _Change(f"{path} {verb}", of_text=False)
    else:
        directories = {"base": run.base, "chat": run.chat, "start": run.start}
        newer = _files_since(directories[name], finished) if name in directories else ""
        what = "the model to start from" if name == "start" else f"the {name} model"
        yield _Change(f"{what}{newer} has changed", of_text=False)


def _changed_text(run: Run, path: str, before: list[str], now: list[str]) -> str:
    """The digests of a source's files are in their order; a commit of the hub has one for all."""
    if len(before) == len(now) == 1:
        return f"{path} has changed"
    from cpt_merge.data.sources import source_files

    files = {
        file: digest
        for source in run.recipe.named_sources.values()
        if source.path == path
        for file, digest in zip(source_files(source), now, strict=False)
    }
    new = [str(file) for file, digest in files.items() if digest not in before]
    if len(new) > 1:
        return f"{new[0]} and {len(new) - 1} more have changed"
    if not new and len(now) < len(before):
        return f"{path} has lost {counted(len(before) - len(now), 'file')}"
    return f"{new[0] if new else path} has changed"


def _files_since(directory: Path, finished: float) -> str:
    """The files of a model that were written later, as far as modification times tell."""
    files = (file for file in directory.rglob("*") if file.is_file())
    newer = sorted(file.name for file in files if file.stat().st_mtime > finished)
    return f" ({', '.join(newer[:_SHOWN])})" if newer else ""
