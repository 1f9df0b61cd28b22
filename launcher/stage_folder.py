"""The folder of a stage that is about to run: continue in it, empty it, or move it aside.

`core.artifact.Staging` cannot be used: W&B's files name the log's path, so it must not move.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import STAGE_FILE, write_json
from cpt_merge.core.errors import Interrupted
from cpt_merge.core.progress import say
from cpt_merge.launcher.stage import Stage
from cpt_merge.tracking.unsent import holds_unsent

BEGUN_FILE = "begun.json"  # what a folder was begun for
LOG = "log"


@dataclass(frozen=True)
class Begun:
    """The content of a `begun.json`: the result that a folder was begun for."""

    key: str
    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    tracked: str = ""  # the key of the result whose W&B run this one continues

    @property
    def tracked_key(self) -> str:
        """The key that names its W&B run."""
        return self.tracked or self.key


def read_begun(folder: Path) -> Begun | None:
    """What a folder was begun for; None if that is not known."""
    try:
        return Begun(**json.loads((folder / BEGUN_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def stage_folder(
    folder: Path, stage: Stage, begun: Begun, fill: Callable[[Path], None] | None = None
) -> Iterator[None]:
    """Make room for the stage's new result. The previous result comes back if the stage fails.

    A resumable stage's folder is kept while its key is the same, so that it continues. A precious
    one holds days of work: one that was made with other settings is moved aside, never removed.
    Then `fill` is called with its new place, and makes the folder of what continues from there.
    """
    key = begun.key
    before = folder.with_name(folder.name + ".before")
    if stage.accumulates or (stage.resumable and _was_begun(folder, key)):
        (folder / STAGE_FILE).unlink(missing_ok=True)
    elif stage.precious:
        aside = _move_aside(folder, key)
        if fill:
            fill(aside)
    elif (folder / STAGE_FILE).is_file():
        _remove(before, folder)
        os.replace(folder, before)
    elif _was_begun(folder, key):
        _remove_all_but_the_log(folder)
    elif folder.exists():
        _remove(folder, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = read_begun(folder)
        tracked = earlier.tracked if earlier and earlier.key == key else begun.tracked
        write_json(folder / BEGUN_FILE, asdict(replace(begun, tracked=tracked)))
        yield
    except Interrupted:
        raise  # the same command continues it
    except BaseException:
        if (before / STAGE_FILE).is_file():
            _remove(folder, folder)
            os.replace(before, folder)
        raise
    _remove(before, folder)


def _was_begun(folder: Path, key: str) -> bool:
    begun = read_begun(folder)
    return begun is not None and begun.key == key


def asides(folder: Path) -> list[Path]:
    """The folders to which results of other settings were moved."""
    return [path for path in _names_aside(folder) if path.is_dir()]


def next_aside(folder: Path) -> Path:
    """Where the next result of other settings will be moved."""
    return next(path for path in _names_aside(folder) if not path.exists())


def _names_aside(folder: Path) -> list[Path]:
    return [folder.with_name(f"{folder.name}.old-{number}") for number in range(1, 1000)]


def _remove(result: Path, folder: Path) -> None:
    """Remove a result, but move a log that W&B lacks to a place next to the stage's `folder`."""
    log = result / LOG
    if holds_unsent(log):
        places = (folder.with_name(f"{folder.name}.unsent-{number}") for number in range(1, 1000))
        aside = next(path for path in places if not path.exists())
        aside.mkdir()
        os.replace(log, aside / LOG)
        say(
            f"{folder.name}: an earlier log that is not at W&B is now {aside / LOG}; "
            "cpt-merge sync uploads it"
        )
    shutil.rmtree(result, ignore_errors=True)


def _remove_all_but_the_log(folder: Path) -> None:
    """Empty a folder that an unfinished attempt left; the new attempt continues its W&B run."""
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif path.name != LOG:
            shutil.rmtree(path)


def _move_aside(folder: Path, key: str) -> Path:
    """Keep what other settings made, and take back what these settings made earlier.

    Returns where the folder is now.
    """
    aside = next_aside(folder)
    mine = next((path for path in asides(folder) if _was_begun(path, key)), None)
    if folder.exists():
        os.replace(folder, aside)
        say(f"{folder.name}: settings or inputs changed; the previous result is now {aside}")
    if mine:
        os.replace(mine, folder)
        (folder / STAGE_FILE).unlink(missing_ok=True)
        say(f"{folder.name}: {mine} was made with these settings; it is taken back and continued")
    return aside
