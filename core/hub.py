"""Finds models by hub id or local path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpt_merge.core.errors import UserError
from cpt_merge.core.foreign_formats import describe_file, describe_folder
from cpt_merge.core.progress import say

NEEDED_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "README.md", "*.txt"]
PICKLED_FILES = [*NEEDED_FILES, "pytorch_model*.bin", "adapter_model.bin"]
# the same weights in other formats: folders (original/, metal/, onnx/), and Mistral's own files
OTHER_COPIES = ["*/*", "consolidated*"]


def is_local(name: str) -> bool:
    """False for what can only be a hub id (org/model); True for a path, existing or not.

    If the folder org exists here, org/model is a path, probably a misspelt one.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    return looks_local or Path(name).parent.is_dir()


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
    say(f"model {name}: looking it up on the hub")
    with hub_errors(name):
        path = _download(name, NEEDED_FILES)
        return path if any(path.glob("*.safetensors")) else _download(name, PICKLED_FILES)


def _download(name: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=OTHER_COPIES))


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn the errors of the hub client into a `UserError` that names the model."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"model {name} is gated; accept its terms at https://huggingface.co/{name}, then run "
            "`hf auth login`."
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"model {name} is neither a local directory nor on the hub; correct the name, or run "
            "`hf auth login` if it is private."
        ) from None
    except errors.NotASafetensorsRepoError:
        raise UserError(
            f"model {name} has no safetensors files on the hub; download it and give its directory."
        ) from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        raise UserError(
            f"the hub refuses to send model {name} (HTTP {code}); try again later, or download it "
            "in another way and give its directory."
        ) from None
    except (
        errors.LocalEntryNotFoundError,
        ConnectionError,
        errors.HTTPError,  # type: ignore[attr-defined]  # the HTTP library's own class
    ):
        raise UserError(
            f"model {name} is not a local directory, and the hub cannot be reached; correct the "
            f"path, or run `hf download {name}` where there is a network."
        ) from None
    except OSError as error:
        raise UserError(
            f"model {name} could not be downloaded: {error.strerror or type(error).__name__}; fix "
            "that and run the same command again."
        ) from None
