"""What a stage leaves behind: a directory, complete once its `stage.json` is there, which is written last.

A stage is skipped when the `stage.json` that it left has the same key: a digest of its configuration and of the
fingerprints of its inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cpt_merge.core.errors import UserError

STAGE_FILE = "stage.json"
RECORDED_PACKAGES = (
    "cpt-merge",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "sentencepiece",
    "wandb",
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
    results: dict[str, Any] = field(
        default_factory=dict
    )  # numbers worth reading without opening the artifact
    tracking: dict[str, Any] = field(default_factory=dict)  # mode, run id, group
    versions: dict[str, str] = field(default_factory=dict)


def stage_key(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """16 hexadecimal digits that change when the stage's configuration or any input changes."""
    text = json.dumps([stage, config, inputs], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_record(directory: Path) -> StageRecord | None:
    """The record of a finished stage, or None where it is not finished."""
    path = directory / STAGE_FILE
    if not path.is_file():
        return None
    try:
        return StageRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove {directory} to make it again."
        ) from None


def write_record(directory: Path, record: StageRecord, started: float) -> StageRecord:
    """Mark `directory` as complete. `started` is `time.time()` at the stage's start. Returns what was written."""
    complete = StageRecord(
        **{
            **asdict(record),
            "seconds": round(time.time() - started, 2),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": installed_versions(),
        }
    )
    write_json(directory / STAGE_FILE, asdict(complete))
    return complete


def installed_versions() -> dict[str, str]:
    """Python's version and those of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
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
    """Write beside, fsync, rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """`write_text` of one row of JSON a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json_lines(path: Path) -> list[Any]:
    """The rows, none where there is no file; text within may hold any line end but \\n. `UserError` if damaged."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        return [json.loads(line) for line in text.split("\n") if line]
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); mend it, or remove it and lose what it shows."
        ) from None


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON, non-ASCII kept."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def make_writable(folder: Path, named: str) -> None:
    """Make a folder, and a file in it that is gone at once, before hours are spent on what shall go there.

    `named` is what the user called it. Raises `UserError`.
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


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, that takes the place of `target` when the block ends well and vanishes when it does not."""
    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    os.replace(beside, target)


def fingerprint(path: str | Path) -> str:
    """A digest that changes when a file or directory does, without reading gigabytes.

    A finished stage's directory is known by its key. Of other directories, small files count with their content
    and large ones (over 16 MiB: weights, corpora) by size, modification time and first 64 KiB. What is not a local
    path (a hub id) stands for itself.
    """
    path = Path(path)
    if not path.exists():
        return f"hub:{path}"
    if path.is_file():
        return _file_fingerprint(path)
    record = read_record(path)
    if record:
        return f"stage:{record.key}"
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path)}\0{_file_fingerprint(file)}\n".encode())
    return digest.hexdigest()[:16]


def _file_fingerprint(path: Path) -> str:
    stat = path.stat()
    digest = hashlib.sha256(str(stat.st_size).encode())
    with open(path, "rb") as file:
        if stat.st_size <= 16 * 2**20:
            digest.update(file.read())
        else:
            digest.update(f"{stat.st_mtime_ns}".encode() + file.read(65536))
    return digest.hexdigest()[:16]
