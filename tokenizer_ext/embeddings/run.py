"""Give the base a longer vocabulary: only the matrices with a row per token change, and of them only rows are added.

Old rows stay bit for bit (law 1). Rows of new pieces are initialised by `merge/initialisers.py`; the chat model's
special tokens (whose rows the merge takes from the chat model later) and padding start from the mean of the old rows.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32, narrow
from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.model_files import GENERATION_FILE, copy_files, resize_config
from cpt_merge.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint
from cpt_merge.checkpoint.tensor_kinds import kind_of, model_tensors
from cpt_merge.checkpoint.tokenizer_files import TOKENIZER_FILES
from cpt_merge.checkpoint.vocabulary_map import MAP_FILE, VocabularyMap
from cpt_merge.checkpoint.writer import CheckpointLayout, CheckpointWriter, TensorSpec, write_index
from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import Meter, say, timed
from cpt_merge.data.sources import Corpus
from cpt_merge.merge.config import EmbeddingsConfig
from cpt_merge.tokenizer_ext.embeddings.focus import MINIMUM, TokenSpace, train_space
from cpt_merge.tokenizer_ext.embeddings.initialisers import INITIALISERS, OldRows, Task, Use
from cpt_merge.tracking import Tracker

_BLOCK = 1 << 22  # elements copied at a time


def run(
    config: EmbeddingsConfig,
    base: Path,
    tokenizer: Path,
    corpus: Corpus,
    out: Path,
    tracker: Tracker,
) -> dict[str, Any]:
    """Write the base with rows for the extended vocabulary to `out` (missing or empty) and return row counts and norms.

    `corpus` is the text in the new languages; it is read if a method needs it. Raises `UserError` if the vocabulary
    map was made for another base.
    """
    source, vocabulary = Checkpoint.open(base), VocabularyMap.load(tokenizer)
    kept = model_tensors(source)
    matrices = [name for name in kept if kind_of(name) in ("embed", "head")]
    tied = not any(kind_of(name) == "head" and len(kept[name].shape) > 1 for name in matrices)
    _check(source, vocabulary, matrices)
    changed = _changed_files(source, kept, matrices)
    layout = CheckpointLayout.of_files(
        {
            _as_safetensors(file): [
                _resized(kept[name], vocabulary, matrices)
                for name in kept
                if kept[name].file == file
            ]
            for file in changed
        }
    )
    space = _space(config, tokenizer, corpus, vocabulary) if config.needs_text else None
    writer = CheckpointWriter(out, layout)
    results = _counts(vocabulary)
    with writer.alone(), Meter("embeddings", layout.nbytes / 1e6, "MB") as meter:
        for name, info in layout.tensors.items():
            _copy(source, name, writer)
            if name in matrices:
                task = _task(config, source, name, vocabulary, tied, space)
                results[f"{kind_of(name)}_norms"] = _append(config, task, name, vocabulary, writer)
            meter.advance(info.nbytes / 1e6)
        writer.close()
        linked = _link_others(source, kept, changed, writer.directory)
        if linked or list(layout.headers) != [SINGLE_FILE]:
            total = sum(layout.tensors.get(name, info).nbytes for name, info in kept.items())
            files = {name: _as_safetensors(info.file) for name, info in kept.items()}
            write_index(writer.directory / INDEX_FILE, files, total)
        write_json(writer.directory / "config.json", resize_config(source.config, vocabulary.rows))
        copy_files([tokenizer / name for name in (*TOKENIZER_FILES, MAP_FILE)], writer.directory)
        copy_files([base / GENERATION_FILE], writer.directory)
        writer.publish()
    say(
        f"embeddings: {vocabulary.base_rows:,} -> {vocabulary.rows:,} rows; {len(changed)} files new, {linked} linked"
    )
    tracker.summary({f"embeddings/{name}": value for name, value in results.items()})
    norms = {
        name.removesuffix("_norms"): value
        for name, value in results.items()
        if name.endswith("_norms")
    }
    rows = [
        [matrix, norm["old"], norm["new"], norm["new"] / norm["old"]]
        for matrix, norm in norms.items()
    ]
    tracker.table(
        "embeddings/norms", ["matrix", "mean norm of old rows", "of new pieces", "new / old"], rows
    )
    return results


def _check(source: Checkpoint, vocabulary: VocabularyMap, matrices: list[str]) -> None:
    if not matrices:
        raise UserError(
            f"{source.directory} holds no embedding matrix that is known by name; report its tensor names."
        )
    for name in matrices:
        rows = source.tensors[name].shape[0]
        if rows != vocabulary.base_rows:
            raise UserError(
                f"{name} of {source.directory} has {rows} rows and the vocabulary map was made for "
                f"{vocabulary.base_rows}; make the tokenizer again with this base."
            )


def _changed_files(
    source: Checkpoint, kept: dict[str, TensorInfo], matrices: list[str]
) -> list[str]:
    """The files that hold a matrix of the vocabulary, or a tied head that is not kept, or are no safetensors."""
    return sorted(
        {
            info.file
            for name, info in source.tensors.items()
            if name in matrices or name not in kept or info.file != _as_safetensors(info.file)
        }
    )


def _as_safetensors(file: str) -> str:
    """The name of a file of weights in the output: `pytorch_model.bin` becomes `model.safetensors`."""
    return (
        file
        if file.endswith(".safetensors")
        else f"{Path(file).stem.replace('pytorch_model', 'model')}.safetensors"
    )


def _resized(info: TensorInfo, vocabulary: VocabularyMap, matrices: list[str]) -> TensorSpec:
    shape = (vocabulary.rows, *info.shape[1:]) if info.name in matrices else info.shape
    return TensorSpec(info.name, info.dtype, shape)


def _copy(source: Checkpoint, name: str, writer: CheckpointWriter) -> None:
    """A tensor's elements as they are; of a matrix that grows these are its first ones."""
    size = source.tensors[name].size
    for start in range(0, size, _BLOCK):
        writer.write_flat(name, start, source.read_flat(name, start, min(start + _BLOCK, size)))


def _space(
    config: EmbeddingsConfig, tokenizer: Path, corpus: Corpus, vocabulary: VocabularyMap
) -> TokenSpace:
    """The space of the text's tokens. Says how many new pieces are not in it."""
    with timed("embeddings: the new text's tokens"):
        space = train_space(
            corpus, tokenizer, vocabulary.rows, config.focus_characters, config.seed
        )
    unknown = sum(not space.known[piece.id] for piece in vocabulary.new)
    say(
        f"embeddings: {unknown:,} of {len(vocabulary.new):,} new pieces occur less than {MINIMUM} times in the text "
        "that focus reads; they start from their constituents alone"
    )
    return space


def _task(
    config: EmbeddingsConfig,
    source: Checkpoint,
    name: str,
    vocabulary: VocabularyMap,
    tied: bool,
    space: TokenSpace | None,
) -> Task:
    use: Use = "head" if kind_of(name) == "head" else "both" if tied else "input"
    random = np.random.default_rng([config.seed, use == "head"])
    return Task(vocabulary.new, OldRows(source, name), random, use, space)


def _append(
    config: EmbeddingsConfig,
    task: Task,
    name: str,
    vocabulary: VocabularyMap,
    writer: CheckpointWriter,
) -> dict[str, float]:
    """Write the rows beyond the base's. Returns the mean norm of the old rows and of the new pieces' rows."""
    info, old = writer.layout.tensors[name], task.old
    method = config.head if task.use == "head" else config.input
    method = method if len(info.shape) > 1 else "mean"  # a bias has no directions

    def write(row: int, values: Float32) -> None:
        writer.write(name, row, narrow(values, info.dtype))

    number, norms = 0, 0.0
    for rows in INITIALISERS[method](task):
        for row in rows:
            write(vocabulary.new[number].id, row)
            number, norms = number + 1, norms + float(np.linalg.norm(row))
    for row_id in [token.id for token in vocabulary.chat] + vocabulary.padding:
        write(row_id, old.mean)
    return {"old": round(old.mean_norm, 4), "new": round(norms / max(number, 1), 4)}


def _link_others(
    source: Checkpoint, kept: dict[str, TensorInfo], changed: list[str], directory: Path
) -> int:
    """Hard-link the files that do not change, or copy them where that cannot be. Returns their number."""
    files = sorted({info.file for info in kept.values()} - set(changed))
    for file in files:
        original = (source.directory / file).resolve()  # the hub's cache holds links to its blobs
        try:
            os.link(original, directory / file)
        except OSError:
            shutil.copyfile(original, directory / file)
    return len(files)


def _counts(vocabulary: VocabularyMap) -> dict[str, Any]:
    return {
        "rows": vocabulary.rows,
        "old": vocabulary.base_rows,
        "new": len(vocabulary.new),
        "chat": len(vocabulary.chat),
        "padding": len(vocabulary.padding),
    }
