"""Finds models by hub id or local path."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from cpt_merge.core.artifact import fingerprint
from cpt_merge.core.errors import UserError
from cpt_merge.core.foreign_formats import describe_file, describe_folder
from cpt_merge.core.hub_repository import HubUnreachableError, Repository, Snapshot
from cpt_merge.core.progress import say_once

_NEEDED = ("*.json", "*.model", "*.jinja", "README.md", "*.txt")
_WEIGHTS = "*.safetensors"
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
# the same weights in other formats: folders (original/, metal/, onnx/), and Mistral's own files
_OTHER_COPIES = ("*/*", "consolidated*")


def is_local(name: str) -> bool:
    """False for what can only be a hub id (org/model or org/model@revision); True for a path,
    existing or not.

    If the folder org exists here, org/model is a path, probably a misspelt one.
    """
    hub_id = name.partition("@")[0]
    looks_local = name.startswith((".", "/", "~")) or hub_id.count("/") != 1
    return looks_local or Path(name).exists() or Path(hub_id).parent.is_dir()


def is_here(name: str) -> bool:
    """Whether a model is a local path or complete in the hub's cache."""
    return is_local(name) or is_complete(Repository.parse("model", name).cached())


def is_complete(snapshot: Snapshot | None) -> bool:
    """Whether the hub's cache has all files that are needed of a model."""
    return snapshot is not None and not snapshot.missing(needed_files(snapshot.files))


def model_directory(name: str) -> Path:
    """The local directory of a model; a hub id is downloaded into the hub's cache.

    Raises `UserError` if the name is neither a directory with a model or an adapter, nor one on the
    hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(
                describe_folder(path)
                or f"{path} contains no config.json; give the directory of a Hugging Face model."
            )
        return path
    if path.is_file():
        raise UserError(describe_file(path))
    if is_local(name):
        raise UserError(
            f"model {name} does not exist here; give a directory, or a hub id like org/model "
            "(whose first part must not be a folder here)."
        )
    repository = Repository.parse("model", name)
    try:
        return download_model(repository.find())
    except HubUnreachableError:
        found = repository.unlisted()
        if found is None:
            raise
    say_once(
        f"{repository}: the hub cannot be reached; using what its cache has, {found}, which may be "
        "incomplete (an older client left no list of its files)"
    )
    return found


def model_fingerprint(name: str) -> str:
    """The fingerprint of a model; for a hub id that is its commit, and nothing is downloaded."""
    if not is_local(name):
        with suppress(HubUnreachableError):
            return f"hub:{Repository.parse('model', name).find().identity}"
    return fingerprint(model_directory(name))


def download_model(snapshot: Snapshot) -> Path:
    """The directory of a model, with all files that are needed of it."""
    names = needed_files(snapshot.files)
    downloaded = snapshot.download(names)
    paths = [path for path in map(snapshot.path, names) if path is not None]
    if not paths:
        raise UserError(
            f"{snapshot.repository} contains no files of a model (it has "
            f"{', '.join(sorted(snapshot.files)[:5]) or 'none'}); name another repository."
        )
    if not downloaded:
        say_once(f"{snapshot.repository}: commit {snapshot.commit}, from the hub's cache")
    return paths[0].parent


def needed_files(names: Collection[str]) -> list[str]:
    """The files of a model that are read: no second copy of the weights in another format."""
    own = [name for name in sorted(names) if not any(fnmatch(name, one) for one in _OTHER_COPIES)]
    weights = [name for name in own if fnmatch(name, _WEIGHTS)]
    weights = weights or [name for name in own if any(fnmatch(name, x) for x in _PICKLED_WEIGHTS)]
    return [name for name in own if any(fnmatch(name, one) for one in _NEEDED)] + weights
