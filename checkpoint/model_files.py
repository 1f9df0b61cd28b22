"""The files of a model directory that are not weights."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.dtypes import FLOATS, TORCH_NAMES
from cpt_merge.checkpoint.loaded import tie_config
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import kind_of
from cpt_merge.checkpoint.writer import CheckpointLayout

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"


def model_config(source: Checkpoint, layout: CheckpointLayout) -> dict[str, Any]:
    """The config.json of `source`, with the type that most tensors of the layout have.

    It says whether the layout has a head of its own.
    """
    types = Counter(info.dtype for info in layout.tensors.values() if info.dtype in FLOATS)
    names = {stored: name for name, stored in TORCH_NAMES.items()}
    tied = not any(kind_of(name) == "head" for name in layout.tensors)
    config = tie_config(source.config, tied)
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, field: names[types.most_common(1)[0][0]]}


def copy_files(paths: list[Path], directory: Path) -> None:
    """Copy the files that exist."""
    for path in paths:
        if path.is_file():
            shutil.copyfile(path, directory / path.name)
