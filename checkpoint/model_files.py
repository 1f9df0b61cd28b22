"""The files of a model directory that are not weights."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.dtypes import FLOATS, TORCH_NAMES
from cpt_merge.checkpoint.loaded import written_config
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import heads_of
from cpt_merge.checkpoint.writer import CheckpointLayout
from cpt_merge.core.progress import say_once

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
_COMPANIONS = "*processor_config.json"  # of images, video and sound, and what joins them to text


def model_config(source: Checkpoint, layout: CheckpointLayout) -> dict[str, Any]:
    """The config.json of `source`, with the type that most tensors of the layout have.

    It says whether the layout has a head of its own.
    """
    types = Counter(info.dtype for info in layout.tensors.values() if info.dtype in FLOATS)
    names = {stored: name for name, stored in TORCH_NAMES.items()}
    config = written_config(source.config, tied=not heads_of(layout))
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, field: names[types.most_common(1)[0][0]]}


def copy_companions(sources: Sequence[Path], directory: Path) -> None:
    """Copy what else belongs to a model: the settings of its processors of images and sound.

    Of files that several sources have, the first source's is taken. Python files, which loaders
    would run, are never copied; one line names them.
    """
    for source in sources:
        for path in sorted(source.glob("*.json")):
            if path.match(_COMPANIONS) and not (directory / path.name).exists():
                copy_files([path], directory)
        code = sorted(path.name for path in source.glob("*.py"))
        if code:
            say_once(
                f"{source} contains code that its model may need ({', '.join(code)}); code is "
                "never run or copied here: copy it next to the weights if you trust it"
            )


def copy_files(paths: list[Path], directory: Path) -> None:
    """Copy the files that exist."""
    for path in paths:
        if path.is_file():
            shutil.copyfile(path, directory / path.name)
