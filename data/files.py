"""Which files a path names: a file, a directory, a glob, or a dataset that `datasets` saved."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.reader import read_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted, say_once
from cpt_merge.data.readers import FORMATS, WHOLE_FILES, format_of
from cpt_merge.data.readers.streams import COMPRESSIONS

_SHOWN = 3  # names in a message
_STATE, _DICT = "state.json", "dataset_dict.json"  # of `Dataset.save_to_disk`
_ABOUT_DATASETS = {_STATE, _DICT, "dataset_info.json", "dataset_infos.json"}


def plain_path(path: str) -> str:
    """The path, or a hub's dataset without its revision: org/data of org/data@revision."""
    name, _, revision = path.partition("@")
    is_hub_id = name.count("/") <= 1 and not path.startswith((".", "/", "~"))
    return name if revision and is_hub_id and not format_of(Path(path)) else path


def find_files(path: str, whole_files: bool = False, split: str = "train") -> list[Path]:
    """The local files of a source, sorted; empty if the path can only be a dataset's hub id.

    A path is local if it exists, contains a wildcard, starts with `.`, `/` or `~`, has a known
    ending, or is in a folder that exists. Raises `UserError` for a local path without text.
    """
    local = Path(path).expanduser()
    if (local / _DICT).is_file():
        local = _of_split(local, split)
    elif split != "train" and (local.exists() or _has_wildcard(path)):
        raise UserError(f"text source {path} has no splits, so no {split!r}; remove its `split`.")
    if local.is_dir():
        return _mention_twins(path, _in_directory(local, whole_files))
    if local.is_file():
        return [local]
    if _has_wildcard(path):
        return _mention_twins(path, _matching(path, local, whole_files))
    hub_id = plain_path(path)
    looks_local = path.startswith((".", "/", "~")) or hub_id.count("/") > 1
    in_a_folder = "/" in path and Path(hub_id).parent.is_dir()
    if looks_local or in_a_folder or format_of(local) or format_of(local, whole_files=True):
        raise UserError(f"text source {path} does not exist; correct its path in the recipe.")
    return []


def _matching(path: str, pattern: Path, whole_files: bool) -> list[Path]:
    """The files that match, and those in folders that are named like files, as Spark writes."""
    root, below = Path(pattern.anchor), str(pattern.relative_to(pattern.anchor))
    found = sorted(root.glob(below))
    visible = found if _names_hidden(below) else _visible(path, found, root)
    files, folders = list[Path](), list[Path]()
    for entry in _existing(visible):
        if not entry.is_dir():
            files.append(entry)
        elif format_of(entry, whole_files):
            files += _in_directory(entry, whole_files)
        else:
            folders.append(entry)
    if not files:
        raise UserError(f"no file matches the source path {path!r}; correct it in the recipe.")
    if folders and "**" not in path:
        say_left_out(path, [folder.name for folder in folders], "folder")
    return list(dict.fromkeys(files))


def _existing(files: list[Path]) -> list[Path]:
    """The files. Raises `UserError` for a link to a file that is not there."""
    for file in files:
        if not file.exists():
            raise UserError(f"text file {file} is a link to nothing; repair or remove it.")
    return files


def _mention_twins(path: str, files: list[Path]) -> list[Path]:
    """The files; those that are there compressed as well are mentioned."""
    forms = defaultdict[Path, list[Path]](list)
    for file in files:
        compressed = file.suffix.lower() in COMPRESSIONS
        forms[file.with_suffix("") if compressed else file].append(file)
    twins = [found for found in forms.values() if len(found) > 1]
    if twins:
        names = " and ".join(file.name for file in twins[0])
        say_once(
            f"{path}: {counted(len(twins), 'file')} will be read in more than one form, such as "
            f"{names}; if they are copies, remove one of each"
        )
    return files


def _has_wildcard(path: str) -> bool:
    return any(character in path for character in "*?[")


def _of_split(directory: Path, split: str) -> Path:
    """The folder of a split of a directory that `DatasetDict.save_to_disk` wrote."""
    splits = _listed(directory / _DICT, "splits", str)
    if split not in splits:
        raise UserError(
            f"{directory} has the splits {', '.join(splits)} and no {split!r}; set the source's "
            "`split`."
        )
    return directory / split


def _in_directory(directory: Path, whole_files: bool) -> list[Path]:
    if (directory / _STATE).is_file():
        return _saved_dataset(directory)
    visible = _visible(str(directory), _all_files(directory), directory)
    files = [
        file
        for file in visible
        if format_of(file, whole_files) and file.name not in _ABOUT_DATASETS
    ]
    _existing(files)
    if not files:
        endings = ", ".join(WHOLE_FILES if whole_files else FORMATS)
        raise UserError(f"{directory} contains no {endings} file; point the source at the text.")
    if others := [file for file in visible if file not in set(files)]:
        say_left_out(str(directory), [file.name for file in others], "other file")
    return files


def _all_files(directory: Path) -> list[Path]:
    """The files in a directory, in its folders, and in folders that are linked there."""
    found, entered = list[Path](), set[str]()
    for folder, folders, names in os.walk(directory, onerror=_refuse, followlinks=True):
        entered.add(os.path.realpath(folder))
        folders[:] = [
            name for name in folders if os.path.realpath(Path(folder, name)) not in entered
        ]
        found += [Path(folder, name) for name in names]
    return sorted(file for file in found if file.is_file() or file.is_symlink())


def _refuse(error: OSError) -> None:
    raise UserError(f"folder {error.filename} cannot be read: {error.strerror}.") from error


def _saved_dataset(directory: Path) -> list[Path]:
    """The files of a directory that `Dataset.save_to_disk` wrote, in order."""
    path = directory / _STATE
    if read_json(path).get("_indices_data_files"):
        raise UserError(
            f"{directory} contains a selection of rows; save the dataset again after "
            "`flatten_indices()`."
        )
    files = [directory / str(entry["filename"]) for entry in _listed(path, "_data_files", dict)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{path} lists {file.name}, which is not there; copy it again.")
    return files


def _listed(path: Path, name: str, kind: type) -> list[Any]:
    """A list in a file about a saved dataset. Raises `UserError` if it is damaged."""
    found = read_json(path).get(name)
    if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
        raise UserError(f"{path} has no list {name!r}, as `save_to_disk` writes; save it again.")
    return found


def _visible(path: str, files: Iterable[Path], root: Path) -> list[Path]:
    """Files neither hidden nor in hidden folders, such as .cache and .ipynb_checkpoints."""
    visible, hidden = list[Path](), list[Path]()
    for file in files:
        (hidden if _names_hidden(str(file.relative_to(root))) else visible).append(file)
    if hidden:
        say_left_out(path, [file.name for file in hidden], "hidden file")
    return visible


def _names_hidden(path: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in Path(path).parts)


def say_left_out(path: str, names: list[str], kind: str) -> None:
    """Say once which files of a source are not read."""
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    say_once(f"{path}: leaving out {counted(len(names), kind)} ({shown})")
