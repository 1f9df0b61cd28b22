"""The files of a dataset on the hub, and which of them are a configuration and split of it.

Only files are used: they are downloaded into the hub's cache and read as local ones. Which files
belong to a configuration and split is decided by `datasets` itself. It treats a folder as it treats
a repository, so it is given a folder of empty files with the names of the repository's: the list
of a commit's files is in the cache, and the answer needs no network and no data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from cpt_merge.core.artifact import fingerprint, stage_key, write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub_repository import Repository, Snapshot, StoredFile
from cpt_merge.data.files import say_left_out
from cpt_merge.data.readers import FORMATS, WHOLE_FILES, format_of

_CARDS = ("README.md", ".huggingface.yaml")  # where a repository lists configurations and splits
_CONVERTED = "refs/convert/parquet"  # the branch in which the hub keeps datasets as parquet files


@dataclass(frozen=True)
class HubFile:
    """One data file of a dataset on the hub."""

    dataset: str  # owner/name
    revision: str  # the commit
    name: str  # in the repository
    stored: StoredFile

    def __str__(self) -> str:
        return f"{self.dataset}@{self.revision[:7]}/{self.name}"

    @property
    def origin(self) -> str:
        """The fingerprint of the dataset: its commit."""
        return f"hub:{self.dataset}@{self.revision}"

    @property
    def path(self) -> Path | None:
        """Where the hub's cache has it; None if it is not complete there."""
        return self._snapshot.path(self.name)

    def download(self) -> Path:
        """The file in the hub's cache; no request is made if it is there. Raises `UserError`."""
        self._snapshot.download([self.name])
        path = self.path
        if path is None:
            raise UserError(f"{self} is damaged in the hub's cache; remove it there.")
        return path

    @property
    def _snapshot(self) -> Snapshot:
        repository = Repository("dataset", self.dataset, self.revision)
        return Snapshot(repository, self.revision, {self.name: self.stored})


TextFile = Path | HubFile


def download_all(files: Sequence[HubFile]) -> None:
    """Download files of one commit, several at a time. Raises `UserError`."""
    repository = Repository("dataset", files[0].dataset, files[0].revision)
    listed = {file.name: file.stored for file in files}
    Snapshot(repository, files[0].revision, listed).download(listed)


def at_hand(file: TextFile) -> Path:
    """A file here; that of a hub's dataset is downloaded if the cache lacks it."""
    return file.download() if isinstance(file, HubFile) else file


def is_at_hand(file: TextFile) -> bool:
    """Whether nothing has to be downloaded to read a file."""
    return isinstance(file, Path) or file.path is not None


def size_of(file: TextFile) -> int:
    """The bytes of a file, here or on the hub."""
    return file.stored.size if isinstance(file, HubFile) else file.stat().st_size


def text_fingerprint(file: TextFile) -> str:
    """The fingerprint of a file, which depends on its content alone."""
    return f"hub:{file.stored.blob}" if isinstance(file, HubFile) else fingerprint(file)


def hub_dataset_files(
    repository: Repository, subset: str | None, split: str, whole_files: bool = False
) -> list[HubFile]:
    """The files of a split, in the order in which `datasets` reads them; none is downloaded.

    `subset` is a configuration, or a folder of the repository. Raises `UserError` for a dataset
    that does not exist, has no such configuration or split, is a script, or is no text.
    """
    snapshot = repository.find()
    splits = _splits(repository, snapshot.commit, subset)
    names = splits.get(split, [])
    if not names:
        raise UserError(
            f"{repository} has no split {split!r} but {', '.join(splits)}; set the source's "
            "`split`."
        )
    readable = [name for name in names if format_of(Path(name), whole_files)]
    others = [name for name in names if name not in set(readable)]
    if not readable:
        endings = ", ".join(WHOLE_FILES if whole_files else FORMATS)
        raise UserError(
            f"{repository} is no text that is read here: {names[0]} is none of {endings} (also "
            "compressed); convert it."
        )
    if others:
        say_left_out(str(repository), others, "other file")
    return [
        HubFile(repository.name, snapshot.commit, name, snapshot.files[name]) for name in readable
    ]


@cache
def _splits(repository: Repository, commit: str, subset: str | None) -> dict[str, list[str]]:
    """The names of the files of each split. They are found once and kept next to the cached files:
    `datasets` takes long for repositories of many files, and every process asks.
    """
    key = stage_key(
        "splits", {"subset": subset}, {"commit": commit, "datasets": version("datasets")}
    )
    kept = repository.folder / "cpt-merge" / f"{key}.json"
    if kept.is_file():
        found: dict[str, list[str]] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    found = _find_splits(repository, commit, subset)
    with suppress(OSError):  # of a cache that may only be read
        write_json(kept, found)
    return found


def _find_splits(repository: Repository, commit: str, subset: str | None) -> dict[str, list[str]]:
    snapshot = Repository(repository.kind, repository.name, commit).find()
    script = f"{repository.name.rpartition('/')[2]}.py"
    if script in snapshot.files:
        raise UserError(
            f"{repository} is a Python script ({script}), which is not executed; if the hub has "
            f"converted it, use {repository.name}@{_CONVERTED} with `subset: CONFIGURATION`."
        )
    cards = [name for name in _CARDS if name in snapshot.files]
    snapshot.download(cards)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "repository"
        _lay_out(folder, snapshot, cards)
        found = _data_files(folder, repository, subset)
        outside = [one for files in found.values() for one in files if not _is_in(one, folder)]
        if outside:
            name = outside[0].removeprefix(f"{folder}/")
            raise UserError(
                f"{repository} names {name} as its data, which is not in the repository; download "
                "it and name the files."
            )
        return {
            split: [Path(file).relative_to(folder).as_posix() for file in files]
            for split, files in found.items()
        }


def _is_in(file: str, folder: Path) -> bool:
    return ".." not in Path(file).parts and Path(file).is_relative_to(folder)


def _lay_out(folder: Path, snapshot: Snapshot, cards: list[str]) -> None:
    """Make empty files with the names of the repository's; those that describe it are copied."""
    for name in snapshot.files:
        parts = PurePosixPath(name).parts
        if ".." in parts or parts[0] == "/":
            raise UserError(f"{snapshot} contains {name}, which leaves its folder.")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = snapshot.path(name) if name in cards else None
        path.write_bytes(stored.read_bytes() if stored else b"")


def _data_files(folder: Path, repository: Repository, subset: str | None) -> dict[str, list[str]]:
    """The paths of the files of each split of a configuration."""
    import datasets

    known: list[str] = []
    try:
        options: dict[str, Any] = {"name": subset}
        if subset and _is_in(str(folder / subset), folder) and (folder / subset).is_dir():
            known = datasets.get_dataset_config_names(str(folder))
            options = {"name" if subset in known else "data_dir": subset}
        builder = datasets.load_dataset_builder(
            str(folder), cache_dir=str(folder.parent / "cache"), **options
        )
    except Exception as error:  # of any kind: README.md may contain anything
        with suppress(Exception):
            known = datasets.get_dataset_config_names(str(folder))
        if known and subset not in known and (subset or len(known) > 1):
            wrong = f"has no configuration {subset!r} but" if subset else "has the configurations"
            raise UserError(
                f"{repository} {wrong} {', '.join(known)}; set the source's `subset`."
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{repository} contains no data files that `datasets` finds "
            f"({reason.replace(f'{folder}', repository.name).rstrip('.')})."
        ) from None
    return {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
