"""The folder of a stage that is about to run: continue in it, empty it, or move it aside.

`core.artifact.Staging` cannot be used: W&B's files name the log's path, so it must not move.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpt_merge.core.artifact import STAGE_FILE, write_json
from cpt_merge.core.errors import Interrupted
from cpt_merge.core.progress import say
from cpt_merge.launcher.stage import Stage
from cpt_merge.tracking.unsent import holds_unsent

BEGUN_FILE = "begun.json"  # the key of the result that a folder was begun for
LOG = "log"


@contextmanager
def stage_folder(folder: Path, stage: Stage, key: str) -> Iterator[None]:
    """Make room for the stage's new result. The previous result comes back if the stage fails.

    A resumable stage's folder is kept while its key is the same, so that it continues. A precious
    one holds days of work: one that was made with other settings is moved aside, never removed.
    """
    before = folder.with_name(folder.name + ".before")
    if stage.accumulates or (stage.resumable and _was_begun(folder, key)):
        (folder / STAGE_FILE).unlink(missing_ok=True)
    elif stage.precious:
        _move_aside(folder, key)
    elif (folder / STAGE_FILE).is_file():
        _remove(before, folder)
        os.replace(folder, before)
    elif _was_begun(folder, key):
        _remove_all_but_the_log(folder)
    elif folder.exists():
        _remove(folder, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / BEGUN_FILE, {"key": key})
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
    begun = folder / BEGUN_FILE
    return begun.is_file() and key in begun.read_text()


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


def _move_aside(folder: Path, key: str) -> None:
    """Keep what other settings made, and take back what these settings made earlier."""
    names = [folder.with_name(f"{folder.name}.old-{number}") for number in range(1, 1000)]
    mine = next((path for path in names if _was_begun(path, key)), None)
    if folder.exists():
        aside = next(path for path in names if not path.exists())
        os.replace(folder, aside)
        say(f"{folder.name}: settings or inputs changed; the previous result is now {aside}")
    if mine:
        os.replace(mine, folder)
        (folder / STAGE_FILE).unlink(missing_ok=True)
        say(f"{folder.name}: {mine} was made with these settings; it is taken back and continued")
