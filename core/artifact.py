"""Files and directories that survive a kill, and the record that a finished stage leaves.

Invariant "nothing half-written": everything is written under a temporary name, synced to disk, and
renamed; the marker of an unfinished directory is removed last. A killed run leaves the last good
state and continues from it.

A stage's directory is complete once it contains `stage.json`. The stage is skipped if its key there
is unchanged: a digest of its configuration and of the fingerprints of its inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cpt_merge.core.errors import UserError
from cpt_merge.core.file_digests import file_digest
from cpt_merge.core.hub_repository import identity
from cpt_merge.core.progress import say

STAGE_FILE = "stage.json"
UNFINISHED_FILE = "unfinished"
_PACKAGES = (
    "cpt-merge torch transformers accelerate datasets tokenizers sentencepiece wandb".split()
)


@dataclass(frozen=True)
class StageRecord:
    """The content of a `stage.json`."""

    stage: str
    key: str
    config: dict[str, Any]
    inputs: dict[str, str]  # name -> fingerprint
    seconds: float = 0.0
    finished: str = ""  # UTC, ISO 8601
    results: dict[str, Any] = field(default_factory=dict)  # numbers for a summary
    tracking: dict[str, Any] = field(default_factory=dict)  # mode, run id, group
    versions: dict[str, str] = field(default_factory=dict)


def stage_key(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """16 hexadecimal digits that change when the stage's configuration or any input changes."""
    text = json.dumps([stage, config, inputs], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_record(directory: Path) -> StageRecord | None:
    """The record of a finished stage; None if the stage is not finished."""
    path = directory / STAGE_FILE
    if not path.is_file():
        return None
    try:
        return StageRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove {directory} to run the stage again."
        ) from None


def write_record(directory: Path, record: StageRecord, started: float) -> StageRecord:
    """Mark a stage's directory as complete. `started` is `time.time()` at the stage's start."""
    complete = replace(
        record,
        seconds=round(time.time() - started, 2),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=installed_versions(),
    )
    write_json(directory / STAGE_FILE, asdict(complete))
    return complete


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a temporary file, fsync, rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write numpy arrays by name, as `write_text` writes text; `numpy.load` reads them."""
    import numpy as np  # takes a while, and few need it

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; non-ASCII characters are kept."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """`write_text` of one JSON value per line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file with one JSON value per line; an empty list if there is no file.

    Only "\\n" ends a line: text from the web holds U+2028 and others. Raises `UserError` if the
    file is damaged.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        return [json.loads(line) for line in text.split("\n") if line]
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); fix it, or remove it and lose what it shows."
        ) from None


def make_writable(folder: Path, named: str) -> None:
    """Make a folder and prove that files can be written to it, before hours of work need that.

    `named` is what the user called the folder. Raises `UserError`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{named} {folder} cannot be written ({reason}); choose another folder."
        ) from None


def check_writable(folder: Path, named: str) -> None:
    """`make_writable` for a command that must write nothing: the permissions are looked at."""
    place = existing_parent(folder)
    reason = "" if place.is_dir() else f"{place} is not a directory"
    if not reason and not os.access(place, os.W_OK | os.X_OK):
        reason = f"{place} is read-only"
    if reason:
        raise UserError(f"{named} {folder} cannot be written ({reason}); choose another folder.")


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def read_marker(directory: Path) -> str | None:
    """The key of the unfinished work in a directory; None if it is finished or missing."""
    try:
        return (directory / UNFINISHED_FILE).read_text(encoding="utf-8")
    except OSError:
        return None


class Staging:
    """A directory that is filled under a temporary name and takes its own name when it is complete.

        TARGET.tmp/             what is being made, by any number of processes
        TARGET.tmp/unfinished   the marker; it holds the key and is removed last

    What a killed process left is recognised by the marker: work with the same key continues, work
    with another key is removed. A directory without a marker belongs to somebody else and is never
    removed. A directory that has its own name is whole, even if it still has a marker: then only
    scratch files are left to remove.

    `key` is a digest of everything that the result depends on; work without a key always starts
    over. `scratch` are patterns of files that are of use only until the directory is complete. A
    finished target that exists already is an error, unless `replace` is set.
    """

    def __init__(
        self,
        target: Path,
        key: str = "",
        *,
        suffix: str = ".tmp",
        scratch: Sequence[str] = (),
        replace: bool = False,
    ) -> None:
        self.target, self.key = target, key
        self.directory = target.with_name(target.name + suffix)
        self.scratch, self.replace = scratch, replace

    @property
    def is_begun(self) -> bool:
        """Whether the directory exists, for this key, and is ready to be filled."""
        return read_marker(self.directory) == self.key

    def check_target(self) -> None:
        """Raise `UserError` unless the target is missing, empty, or left by unfinished work."""
        if self.replace or read_marker(self.target) is not None:
            return
        if self.target.is_symlink() or os.path.ismount(self.target):
            raise UserError(
                f"{self.target} is a link or a mount point, which cannot be replaced; "
                "name a directory inside it."
            )
        above = existing_parent(self.target.parent)
        if not above.is_dir():
            raise UserError(
                f"{self.target} cannot be written, because {above} is not a directory; choose "
                "another output directory."
            )
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise UserError(
                f"{self.target} exists and is not empty; choose another output directory or "
                "remove it."
            )

    def begin(self, prepare: Callable[[], None] = lambda: None) -> bool:
        """Make the directory, or find the one that a killed process left. Called by one process.

        `prepare` fills a new directory with what other processes rely on; only then does the
        marker hold the key. Returns True if earlier work continues. Raises `UserError` if the
        target or the temporary name is in use.
        """
        self.check_target()
        if self.key and self.is_begun:
            return True
        for left in (self.target, self.directory):
            marker = read_marker(left)
            if marker is not None:
                if marker and self.key:
                    say(f"{left} is unfinished work with other inputs or settings; starting over")
                _remove_marker_last(left)
        self.directory.mkdir(parents=True, exist_ok=True)
        if {path.name for path in self.directory.iterdir()} - {f"{UNFINISHED_FILE}.tmp"}:
            raise UserError(
                f"{self.directory} is in the way and was not left by an unfinished run; move it."
            )
        write_text(self.directory / UNFINISHED_FILE, "")
        try:
            prepare()
        except BaseException:
            self.discard()
            raise
        fsync(self.directory)
        write_text(self.directory / UNFINISHED_FILE, self.key)
        return False

    def commit(self) -> None:
        """Make everything durable, rename the directory, and remove scratch files, marker last."""
        for path in (*self.directory.rglob("*"), self.directory):
            if not path.is_symlink():
                fsync(path)
        if self.replace and self.target.exists():
            write_text(self.target / UNFINISHED_FILE, "")
            _remove_marker_last(self.target)
        os.replace(self.directory, self.target)
        fsync(self.target.parent)
        self._remove_scratch()

    def finish_commit(self) -> None:
        """Finish a commit that was killed after the rename; any key's, if this has none."""
        marker = read_marker(self.target)
        if marker is not None and self.key in ("", marker):
            self._remove_scratch()

    def discard(self) -> None:
        """Remove the unfinished directory."""
        if self.directory.is_dir():
            _remove_marker_last(self.directory)

    def remove_target(self) -> None:
        """Remove the finished directory, which loses its name first: no half of it is ever seen."""
        write_text(self.target / UNFINISHED_FILE, "")
        os.replace(self.target, self.directory)
        self.discard()

    @contextmanager
    def filling(self) -> Iterator[Path]:
        """For one process: begin, the block, commit. If the block fails, nothing is left behind."""
        self.begin()
        try:
            yield self.directory
            self.commit()
        except BaseException:
            self.discard()
            raise

    def _remove_scratch(self) -> None:
        for pattern in self.scratch:
            for path in self.target.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        (self.target / UNFINISHED_FILE).unlink(missing_ok=True)
        fsync(self.target)


def _remove_marker_last(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != UNFINISHED_FILE:
            path.unlink(missing_ok=True)
    shutil.rmtree(directory)


class KeptLines:
    """Results that are kept by key until the whole that they belong to is done: one JSON line each.

    Rank 0 alone reads and writes. A line that a kill cut short is left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """The newest result of every key."""
        found: dict[str, dict[str, Any]] = {}
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        for line in filter(None, text.split("\n")):
            try:
                row = json.loads(line)
                found[row.pop("key")] = row
            except (ValueError, KeyError, TypeError, AttributeError):
                say(f"{self.path}: a line that was cut short is left out")
        return found

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        """Append a result durably, on a line of its own."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.is_file() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            line = json.dumps({"key": key, **result}, ensure_ascii=False)
            file.write(f"{chr(10) if cut else ''}{line}\n")
            file.flush()
            os.fsync(file.fileno())
        fsync(self.path.parent)

    def clear(self) -> None:
        """Remove the file: the whole is done."""
        self.path.unlink(missing_ok=True)


def fingerprint(path: str | Path) -> str:
    """A digest that changes when the content of a file or directory changes, and only then.

    The directory of a finished stage is identified by its key, a snapshot in the hub's cache by its
    commit, files by `file_digest`; hidden files do not count. A name that is not a local path (a
    hub id) stands for itself.
    """
    path = Path(path)
    if not path.exists():
        return f"hub:{path}"
    if path.is_file():
        return file_digest(path)
    if commit := identity(path):
        return f"hub:{commit}"
    record = read_record(path)
    if record:
        return f"stage:{record.key}"
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        name = file.relative_to(path)
        if not any(part.startswith(".") for part in name.parts):  # the hub client's own notes
            digest.update(f"{name}\0{file_digest(file)}\n".encode())
    return digest.hexdigest()[:16]
