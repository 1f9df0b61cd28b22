"""Models by hub id or local path."""

from __future__ import annotations

from pathlib import Path

from core.errors import UserError
from core.progress import say

NEEDED_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "README.md", "*.txt"]


def model_directory(name: str) -> Path:
    """The local directory of a model; a hub id is downloaded into the hub's cache.

    Raises `UserError` if it is neither a directory with a config.json nor a model that the hub has.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} holds no config.json; give the directory of a Hugging Face model.")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"model {name} does not exist; correct `models` (a directory, or a hub id like org/model).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        say(f"model {name}: looking it up on the hub")
        return Path(snapshot_download(name, allow_patterns=NEEDED_FILES))
    except RepositoryNotFoundError:
        raise UserError(f"model {name} is neither a local directory nor on the hub; correct `models`.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model {name} is no local directory and the hub did not give it ({reason[:160]}).") from None
