"""Trained shards to a Hugging Face checkpoint: each rank writes its own rows."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from cpt_merge.checkpoint.dtypes import FLOATS, TORCH_NAMES, Dtype, Float32, rounded, widen
from cpt_merge.checkpoint.loaded import open_model
from cpt_merge.checkpoint.model_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    copy_companions,
    copy_files,
    model_config,
)
from cpt_merge.checkpoint.positions import Extend, raise_limit
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tokenizer_files import TOKENIZER_FILES
from cpt_merge.checkpoint.vocabulary_map import MAP_FILE
from cpt_merge.checkpoint.writer import SHARD_BYTES, CheckpointLayout, CheckpointWriter, TensorSpec
from cpt_merge.core.artifact import write_json
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say

_CHUNK = 1 << 18  # elements converted at a time


@dataclass(frozen=True)
class LocalShard:
    """Rows [start_row, start_row + len(values)) of a trained tensor; `shape` is that of the whole.

    May be empty. A tensor that several ranks have is passed by one of them; a tied head is not
    passed.
    """

    name: str
    shape: tuple[int, ...]
    start_row: int
    values: torch.Tensor

    @property
    def start(self) -> int:
        """The first element, counted in the whole tensor."""
        return self.start_row * math.prod(self.shape[1:])

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + self.values.numel()

    def read(self, first: int, last: int) -> Float32:
        """Elements [first, last) of the whole tensor, in float32 on the CPU."""
        part = self.values.detach().reshape(-1)[first - self.start : last - self.start]
        values: Float32 = part.to("cpu", torch.float32).numpy()
        return values


@dataclass(frozen=True)
class StoredShard(LocalShard):
    """A whole tensor that training does not change, read from its checkpoint; no values here."""

    source: Checkpoint

    def read(self, first: int, last: int) -> Float32:
        """Elements [first, last), in float32."""
        return widen(
            self.source.read_flat(self.name, first, last), self.source.info(self.name).dtype
        )


def export_shards(
    shards: Iterable[LocalShard],
    like: Path,
    tokenizer: Path,
    out: Path,
    ranks: Ranks,
    dtype: Dtype | None = None,
    shard_size: int = SHARD_BYTES,
    extend: Extend | None = None,
) -> None:
    """Write the trained model as a Hugging Face checkpoint; a collective.

    Names, shapes, configuration and (without `dtype`) types are those of `like`, the checkpoint
    that training started from; `extend` makes the configuration with other positions. Raises
    `UserError` if a shard does not fit it, or if a row is written twice or never.
    """
    source = open_model(like)
    wanted = TORCH_NAMES[dtype] if dtype else None
    specs = [
        TensorSpec(
            name, (wanted if info.dtype in FLOATS else None) or info.copied_dtype, info.shape
        )
        for name, info in source.tensors.items()
    ]
    writer = CheckpointWriter(out, CheckpointLayout.by_size(specs, shard_size), ranks.rank)
    with writing_together(writer, source, ranks):
        for shard in shards:
            check_shard(shard, writer.layout, like)
            for first in range(shard.start, shard.stop, _CHUNK):
                values = shard.read(first, min(first + _CHUNK, shard.stop))
                narrow = rounded(values, writer.layout.tensors[shard.name].dtype, shard.name)
                writer.write_flat(shard.name, first, narrow)
    if ranks.is_main:
        config = model_config(source, writer.layout)
        extended = extend(config) if extend else config
        write_json(writer.directory / CONFIG_FILE, extended)
        others = [tokenizer / name for name in (*TOKENIZER_FILES, MAP_FILE)]
        copy_files([like / GENERATION_FILE, *others], writer.directory)
        raise_limit(writer.directory, extended, config)
        copy_companions([like], writer.directory)
        writer.publish()
    ranks.barrier()


def untrained_shards(model: Path, trained: Container[str], ranks: Ranks) -> list[StoredShard]:
    """What a checkpoint has besides the trained parameters, on the first rank; one line names it.

    These are buffers, and modules that are not built for training, such as a vision tower.
    """
    source = open_model(model)
    found = [
        StoredShard(name, info.shape, 0, torch.empty(info.shape, device="meta"), source)
        for name, info in source.tensors.items()
        if info.dtype in FLOATS and name not in trained
    ]
    if found:
        say(
            f"model: {len(found)} tensors of {model} are not trained and stay as they are: "
            f"{found[0].name}{', ...' if found[1:] else ''}"
        )
    return found if ranks.is_main else []


@contextmanager
def writing_together(writer: CheckpointWriter, like: Checkpoint, ranks: Ranks) -> Iterator[None]:
    """Rank 0 prepares, all ranks write in the block; afterwards the data of all is on disk."""
    if ranks.is_main:
        writer.prepare()
    ranks.barrier()
    yield
    if ranks.is_main:
        tensors = writer.layout.tensors.items()
        untrained = [name for name, info in tensors if info.dtype not in FLOATS]  # masks
        writer.copy(like, untrained)
    writer.close()
    ranks.barrier()


def check_shard(shard: LocalShard, layout: CheckpointLayout, like: Path) -> None:
    """Raise `UserError` if the layout has no tensor of this name and shape."""
    info = layout.tensors.get(shard.name)
    if info is None or info.shape != tuple(shard.shape):
        found = f"shape {info.shape}" if info else "no such tensor"
        raise UserError(
            f"the trained {shard.name} has shape {tuple(shard.shape)}, {like} has {found}; "
            "export with the checkpoint that training started from."
        )
