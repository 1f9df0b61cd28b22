"""Finds models by hub id or local path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say

NEEDED_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "README.md", "*.txt"]


def is_local(name: str) -> bool:
    """False for what can only be a hub id (org/model); True for a path, existing or not.

    If the folder org exists here, org/model is a path, probably a misspelt one.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    return looks_local or Path(name).parent.is_dir()


def model_directory(name: str) -> Path:
    """The local directory of a model; a hub id is downloaded into the hub's cache.

    Raises `UserError` if the name is neither a directory with a config.json nor a model on the hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} contains no config.json; give the directory of a Hugging Face model."
            )
        return path
    if is_local(name):
        raise UserError(
            f"model {name} does not exist here; give a directory, or a hub id like org/model "
            "(whose first part must not be a folder here)."
        )
    from huggingface_hub import snapshot_download

    say(f"model {name}: looking it up on the hub")
    with hub_errors(name):
        path = Path(snapshot_download(name, allow_patterns=NEEDED_FILES))
        if any(path.glob("*.safetensors")):
            return path
        return Path(snapshot_download(name, allow_patterns=[*NEEDED_FILES, "pytorch_model*.bin"]))


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn the errors of the hub client into a `UserError` that names the model."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except RepositoryNotFoundError:
        raise UserError(
            f"model {name} is neither a local directory nor on the hub; correct the name."
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        said = shorten(reason, 200, placeholder=" ...")
        raise UserError(
            f"model {name} is not a local directory and could not be downloaded ({said})."
        ) from None
