"""Give a model rows for a longer vocabulary: only matrices with a row per token change, and only by
new rows. The model is the base, or another one that training starts from (`start_rows.py`), of
which every row that it has already is taken.

Old rows stay equal bit for bit (invariant "old ids fixed"). Rows of new pieces are initialised by
one of the `methods`; the chat model's special tokens, whose rows the merge later takes from the
chat model, and padding start from the mean of the old rows.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cpt_merge.checkpoint.adapters import MERGE_IT
from cpt_merge.checkpoint.dtypes import narrow
from cpt_merge.checkpoint.loaded import is_tied, loaded, written_config
from cpt_merge.checkpoint.model_files import GENERATION_FILE, copy_companions, copy_files
from cpt_merge.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint
from cpt_merge.checkpoint.tensor_kinds import is_by_token, kind_of, vocabulary_rows
from cpt_merge.checkpoint.text_only import has_towers, text_only
from cpt_merge.checkpoint.text_sections import resize_config
from cpt_merge.checkpoint.tokenizer_files import TOKENIZER_FILES
from cpt_merge.checkpoint.vocabulary_map import MAP_FILE, VocabularyMap
from cpt_merge.checkpoint.writer import CheckpointLayout, CheckpointWriter, TensorSpec, write_index
from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import Meter, say, timed
from cpt_merge.data.sources import Corpus
from cpt_merge.tokenizer_ext.embeddings.config import EmbeddingsConfig
from cpt_merge.tokenizer_ext.embeddings.methods import INITIALISERS
from cpt_merge.tokenizer_ext.embeddings.methods.auto import letterless_tokens
from cpt_merge.tokenizer_ext.embeddings.methods.method import NewRows, Use
from cpt_merge.tokenizer_ext.embeddings.old_rows import OldRows
from cpt_merge.tokenizer_ext.embeddings.start_rows import StartRows
from cpt_merge.tokenizer_ext.embeddings.token_space import MINIMUM, TokenSpace, train_space
from cpt_merge.tracking import Cell, Tracker

_BLOCK = 1 << 22  # elements copied at a time
_NOT_RESIZED = (
    "embed_tokens_per_layer.weight", ".tid2eid",  # Gemma 3n, DeepSeek V4
    "final_logits_bias", "predictions.bias", "generator_lm_head.bias",  # BART, BERT, ELECTRA
)  # fmt: skip
_NORM_COLUMNS = ["matrix", "mean norm of old rows", "of new pieces", "new / old"]


def resize_embeddings(
    config: EmbeddingsConfig,
    base: Path,
    tokenizer: Path,
    out: Path,
    corpus: Corpus | None = None,
    tracker: Tracker | None = None,
    without_towers: bool = False,
    start: Path | None = None,
) -> dict[str, Any]:
    """Write the model in `base` with rows for the extended `tokenizer` to `out`, which is missing
    or empty; or the model in `start`, whose rows are found by the names of their tokens.

    `tokenizer` is a directory that `extend_tokenizer` wrote. `corpus` is text in the new languages;
    only the method `focus` reads it. `without_towers` writes the text decoder of a wrapper as a
    model of its own. Returns the number of rows of each kind, and for each matrix
    the mean norms of old and new rows. Raises `UserError` if the vocabulary map was made for
    another base, or `start` does not fit it.
    """
    model = start or base
    stored, vocabulary = Checkpoint.open(model), VocabularyMap.load(tokenizer)
    source = loaded(stored)
    if without_towers and (start is None or has_towers(source)):
        source = text_only(source)
    aligned = StartRows.align(source, tokenizer, vocabulary) if start else None
    resize = _Resize(config, source, stored, vocabulary, tokenizer, aligned)
    resize.check()
    layout = resize.layout()
    space = resize.token_space(corpus)
    writer = CheckpointWriter(out, layout)
    norms: dict[str, dict[str, float]] = {}
    with writer.alone(), Meter("embeddings", layout.nbytes / 1e6, "MB") as meter:
        for name, info in layout.tensors.items():
            resize.copy(name, writer)
            if name in resize.matrices:
                of_rows = resize.append(name, writer, space)
                if len(info.shape) == 2:  # no bias of the head
                    norms[kind_of(name)] = of_rows
            meter.advance(info.nbytes / 1e6)
        linked = resize.link_unchanged_files(writer.directory)
        if linked or list(layout.headers) != [SINGLE_FILE]:
            kept = source.tensors.items()
            total = sum(layout.tensors.get(name, info).nbytes for name, info in kept)
            files = {name: _as_safetensors(info.file) for name, info in kept}
            write_index(writer.directory / INDEX_FILE, files, total)
        write_json(writer.directory / "config.json", resize.model_config())
        copy_files([tokenizer / name for name in (*TOKENIZER_FILES, MAP_FILE)], writer.directory)
        copy_files([model / GENERATION_FILE], writer.directory)
        if not without_towers:
            copy_companions([model], writer.directory)
    say(
        f"embeddings: {vocabulary.base_rows:,} -> {vocabulary.rows:,} rows; "
        f"{len(resize.changed_files)} files written, {linked} linked"
    )
    results = _row_counts(vocabulary)
    if aligned:
        results["from_start"] = sum(map(aligned.has, range(vocabulary.rows)))
        say(f"embeddings: {results['from_start']:,} of {vocabulary.rows:,} rows are {model}'s")
    results |= {f"{kind}_norms": norm for kind, norm in norms.items()}
    _log(tracker or Tracker(), results, norms)
    return results


def _log(tracker: Tracker, results: dict[str, Any], norms: dict[str, dict[str, float]]) -> None:
    """Log the results, and the mean norms of old and new rows as a table."""
    rows: list[list[Cell]] = [
        [kind, norm["old"], norm["new"], norm["new"] / norm["old"]] for kind, norm in norms.items()
    ]
    tracker.summary({f"embeddings/{name}": value for name, value in results.items()})
    tracker.table("embeddings/norms", _NORM_COLUMNS, rows)


@dataclass(frozen=True)
class _Resize:
    """A model, the map of its longer vocabulary, and what follows from the two."""

    config: EmbeddingsConfig
    source: Checkpoint  # with the tensors that loaders use; the output has these
    stored: Checkpoint  # with all tensors
    vocabulary: VocabularyMap
    tokenizer: Path
    start: StartRows | None = None  # where the rows are, if the model is not the base

    @cached_property
    def matrices(self) -> list[str]:
        """The tensors with a row per token whose rows are not those of the output."""
        if self.start:
            unchanged = self.start.are_all(vocabulary_rows(self.source))
        else:
            unchanged = self.vocabulary.rows == self.vocabulary.base_rows
        if unchanged:
            return []
        return [name for name in self.source.tensors if is_by_token(name)]

    @cached_property
    def tied(self) -> bool:
        """Whether the input embedding is the output head, too."""
        return is_tied(self.source)

    @cached_property
    def changed_files(self) -> list[str]:
        """The base's files that hold such a matrix, a tensor that is dropped, or tensors in another
        form than they are written.
        """
        everything = {**self.stored.tensors, **self.source.tensors}
        return sorted(
            {
                info.file
                for name, info in everything.items()
                if name in self.matrices
                or name not in self.source.tensors
                or name not in self.stored.tensors
                or not info.files <= self.stored.unchanged_files
                or info.file != _as_safetensors(info.file)
            }
        )

    def check(self) -> None:
        """Raise `UserError` for a base that cannot grow, or one that the map was not made for."""
        if self.source.adapted is not None:
            what = "a model to start from" if self.start else "a base"
            raise UserError(
                f"{self.source.directory} is a LoRA adapter, and {what} must be a whole model; "
                f"{MERGE_IT}."
            )
        rows = vocabulary_rows(self.source)
        if self.matrices:
            check_resizable(self.source)
        if not self.start and rows != self.vocabulary.base_rows:
            raise UserError(
                f"the embedding of {self.source.directory} has {rows} rows, but the vocabulary "
                f"map was made for {self.vocabulary.base_rows}; make the tokenizer again with "
                "this base."
            )

    def model_config(self) -> dict[str, Any]:
        """The config.json of the output."""
        config = self.source.config
        if self.matrices:
            config = resize_config(config, self.vocabulary.rows)
        return written_config(config, self.tied)

    def layout(self) -> CheckpointLayout:
        """The files to write."""
        specs: dict[str, list[TensorSpec]] = {_as_safetensors(f): [] for f in self.changed_files}
        for name, info in self.source.tensors.items():
            if info.file in self.changed_files:
                grows = name in self.matrices
                shape = (self.vocabulary.rows, *info.shape[1:]) if grows else info.shape
                specs[_as_safetensors(info.file)].append(TensorSpec(name, info.copied_dtype, shape))
        return CheckpointLayout.of_files({file: some for file, some in specs.items() if some})

    def token_space(self, corpus: Corpus | None) -> TokenSpace | None:
        """The space of the new text's tokens, where a method needs it.

        Reports how many new pieces are not in it.
        """
        if not self.config.needs_text:
            return None
        if corpus is None:
            raise UserError("the method focus reads text in the new languages; give a corpus.")
        config, new = self.config, self.vocabulary.new
        with timed("embeddings: the new text's tokens"):
            space = train_space(
                corpus, self.tokenizer, self.vocabulary.rows, config.focus_characters, config.seed
            )
        unknown = sum(not space.known[piece.id] for piece in new)
        say(
            f"embeddings: {unknown:,} of {len(new):,} new pieces occur less than {MINIMUM} times "
            "in the text that focus reads; they start from their constituents alone"
        )
        return space

    @cached_property
    def letterless(self) -> frozenset[int]:
        """The constituents that hold no whole letter."""
        constituents = {id_ for piece in self.vocabulary.new for id_ in piece.constituents}
        return letterless_tokens(self.tokenizer, constituents)

    def copy(self, name: str, writer: CheckpointWriter) -> None:
        """Copy the elements of a tensor that the model has."""
        source, info = self.source, self.source.tensors[name]
        if self.start and name in self.matrices:
            for row, start, stop in self.start.runs():
                values = source.read_copied(name, start * info.row_size, stop * info.row_size)
                writer.write(name, row, values)
            return
        for first in range(0, info.size, _BLOCK):  # in a matrix that grows: the first ones
            last = min(first + _BLOCK, info.size)
            writer.write_flat(name, first, source.read_copied(name, first, last))

    def append(
        self, name: str, writer: CheckpointWriter, space: TokenSpace | None
    ) -> dict[str, float]:
        """Write the rows of a matrix that the model lacks.

        Returns the mean norms of the old rows and of the new pieces' rows.
        """
        config, info = self.config, writer.layout.tensors[name]
        old = OldRows(self.source, name, self.start.old if self.start else None)
        if not np.isfinite(old.mean).all():
            raise UserError(
                f"{name} of {self.source.directory} contains NaN or Inf; download the model again, "
                "or use another base."
            )
        use: Use = "head" if kind_of(name) == "head" else "both" if self.tied else "input"
        method = config.head if use == "head" else config.input
        if len(info.shape) == 1:
            method = "mean"  # a bias has no directions
        task = NewRows(
            pieces=[piece for piece in self.vocabulary.new if self._lacks(piece.id)],
            old=old,
            random=np.random.default_rng([config.seed, use == "head"]),
            use=use,
            space=space,
            letterless=self.letterless if method == "auto" else frozenset(),
        )
        number, norms = 0, 0.0
        for rows in INITIALISERS[method](task):
            for row in rows:
                writer.write(name, task.pieces[number].id, narrow(row, info.dtype))
                number, norms = number + 1, norms + float(np.linalg.norm(row))
        for id_ in [token.id for token in self.vocabulary.chat] + self.vocabulary.padding:
            if self._lacks(id_):
                writer.write(name, id_, narrow(old.mean, info.dtype))
        return {"old": round(old.mean_norm, 4), "new": round(norms / max(number, 1), 4)}

    def _lacks(self, row: int) -> bool:
        return not (self.start and self.start.has(row))

    def link_unchanged_files(self, directory: Path) -> int:
        """Hard-link the files that do not change, or copy them to another file system.

        Returns their number.
        """
        files = {info.file for info in self.source.tensors.values()} - set(self.changed_files)
        for file in sorted(files):
            original = (self.source.directory / file).resolve()  # the hub's cache has symlinks
            try:
                os.link(original, directory / file)
            except OSError:
                shutil.copyfile(original, directory / file)
        return len(files)


def check_resizable(model: Checkpoint) -> None:
    """Raise `UserError` for a loaded model whose vocabulary cannot grow.

    Each of its tables by token needs one row for each row of the embedding, and a place in its
    configuration that says how many there are.
    """
    rows = vocabulary_rows(model)
    for name, info in model.tensors.items():
        if name.endswith(_NOT_RESIZED):
            reason = "is a further table with a row for each token, which cannot be extended"
        elif is_by_token(name) and info.shape[0] != rows:
            reason = f"has {info.shape[0]} rows where the embedding has {rows}"
        else:
            continue
        raise UserError(
            f"{name} of {model.directory} {reason}; use another base, or train this one on its "
            "own vocabulary."
        )


def _as_safetensors(file: str) -> str:
    """The file's name in the output: `pytorch_model.bin` becomes `model.safetensors`."""
    if file.endswith(".safetensors"):
        return file
    return f"{Path(file).stem.replace('pytorch_model', 'model')}.safetensors"


def _row_counts(vocabulary: VocabularyMap) -> dict[str, Any]:
    return {
        "rows": vocabulary.rows,
        "old": vocabulary.base_rows,
        "new": len(vocabulary.new),
        "chat": len(vocabulary.chat),
        "padding": len(vocabulary.padding),
    }
