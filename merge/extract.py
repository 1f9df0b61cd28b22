"""Write a chat vector to a directory, to keep, to share, and to add to other models.

    vector.safetensors    chat - base, with the chat model's names and rows (or several files and
                          an index); rows of the chat format's tokens are the chat model's own rows
    vector.json           what it was made from, and what a merge must know of the base
    config.json, ...      the chat model's configuration, tokenizer and template
    base/                 the base's configuration and tokenizer, by which rows are aligned

In float32, the default, a merge with the vector gives the same bytes as a merge with the pair.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml

from cpt_merge.checkpoint.dtypes import FLOATS, TORCH_NAMES, Dtype, Float32, rounded
from cpt_merge.checkpoint.model_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    copy_companions,
    copy_files,
)
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import is_by_token, vocabulary_rows
from cpt_merge.checkpoint.token_changes import TokenChanges
from cpt_merge.checkpoint.tokenizer_files import TOKENIZER_FILES, TokenizerFiles, write_templates
from cpt_merge.checkpoint.writer import (
    SHARD_BYTES,
    CheckpointLayout,
    CheckpointWriter,
    TensorSpec,
    natural,
)
from cpt_merge.core.artifact import fingerprint, installed_versions, write_json, write_text
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub_repository import shown_name
from cpt_merge.core.progress import Meter, say
from cpt_merge.core.world import find_world
from cpt_merge.merge import merge_report
from cpt_merge.merge.ancestry import pair_warnings
from cpt_merge.merge.card import LICENCE_FIELDS, front_matter
from cpt_merge.merge.files import MAX_THREADS
from cpt_merge.merge.fit import RefusedError, open_fitting
from cpt_merge.merge.plan import short_table_problems
from cpt_merge.merge.rows import (
    OutputTokens,
    Role,
    RowAlignment,
    align_by_position,
    align_rows,
    unshared_tokens,
    with_rows,
)
from cpt_merge.merge.vectors import BASE_FOLDER, STEM, VECTOR_FILE, Pair, RowPairs, sample_digest

BLOCK = 1 << 19  # elements


def extract(
    base: Path, chat: Path, out: Path, dtype: Dtype = "float32", shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `chat - base` to `out`, which is missing or empty.

    Raises `UserError` if they do not fit.
    """
    if find_world().size > 1:
        raise UserError("extract-vector is the work of one process; start it without a launcher.")
    models = open_fitting({"base": base, "chat": chat})
    merge_report.warn(pair_warnings(base, chat))
    pair = Pair(models["base"], models["chat"])
    rows = _align(pair)
    if problems := short_table_problems(pair.chat, pair, rows):
        raise RefusedError(problems)
    shared = {name: info for name, info in pair.tensors.items() if name in pair.base.tensors}
    if lost := len(pair.chat.tensors.keys() ^ pair.base.tensors.keys()):
        say(f"merge: {lost} tensors that base or chat lacks are no part of the vector")
    names = sorted((name for name, info in shared.items() if info.dtype in FLOATS), key=natural)
    specs = [TensorSpec(name, TORCH_NAMES[dtype], shared[name].shape) for name in names]
    specs += [
        TensorSpec(name, info.dtype, info.shape)
        for name, info in shared.items()
        if name not in names
    ]
    writer = CheckpointWriter(out.absolute(), CheckpointLayout.by_size(specs, shard_bytes, STEM))
    squares = dict.fromkeys(names, 0.0)
    with (
        writer.alone(),
        ThreadPoolExecutor(MAX_THREADS) as pool,
        Meter("extract", len(specs), "tensors") as meter,
    ):
        for spec, square in zip(
            specs, pool.map(lambda spec: _extract(pair, spec, rows, writer), specs), strict=True
        ):
            squares[spec.name] = square
            meter.advance()
        _describe(pair, squares, dtype, writer.directory)
    say(f"merge: the chat vector is in {out}; add it with --vector {out}")


def _align(pair: Pair) -> RowAlignment:
    """Chat's rows against base's. Raises `UserError` for tokens that only one of them has."""
    base, chat = TokenizerFiles.read(pair.base_directory), TokenizerFiles.read(pair.chat_directory)
    count = vocabulary_rows(pair.chat)
    if base is None and chat is None and vocabulary_rows(pair.base) == count:
        say(
            f"merge: neither directory has a tokenizer; the {count} rows of the two models are "
            "treated as the same tokens"
        )
        return align_by_position(count)
    if base is None or chat is None:
        missing = pair.base.directory if base is None else pair.chat.directory
        raise UserError(
            f"no tokenizer.json or tokenizer.model in {missing}, by which rows could be aligned; "
            "put it there."
        )
    chat.require_listed()
    base = with_rows(base, vocabulary_rows(pair.base))
    chat = with_rows(chat, count)
    for problem in unshared_tokens(base, chat):
        raise UserError(f"{problem}.")
    return align_rows(OutputTokens(chat.ids, count, TokenChanges()), base, chat, None)


def _extract(pair: Pair, spec: TensorSpec, rows: RowAlignment, writer: CheckpointWriter) -> float:
    """Write one tensor. Returns the sum of the base's squares."""
    info, square = pair.tensors[spec.name], 0.0
    if info.dtype not in FLOATS:
        writer.write_flat(spec.name, 0, pair.chat.read_flat(spec.name, 0, info.size))
        return square
    by_token = is_by_token(spec.name)
    step = max(BLOCK // info.row_size, 1) * info.row_size if by_token else BLOCK
    for start in range(0, info.size, step):
        stop = min(start + step, info.size)
        if by_token:
            values, base = _vocabulary_rows(
                pair, spec.name, start // info.row_size, stop // info.row_size, rows
            )
        else:
            difference = pair.elements(spec.name, start, stop)
            assert difference.base is not None
            values, base = difference.values, difference.base
        square += float(np.dot(base.reshape(-1), base.reshape(-1)))
        writer.write_flat(spec.name, start, rounded(values, spec.dtype, spec.name))
    return square


def _vocabulary_rows(
    pair: Pair, name: str, first: int, last: int, rows: RowAlignment
) -> tuple[Float32, Float32]:
    """Chat's rows [first, last), and the base's rows of the tokens that base has.

    Rows of tokens that base has are the difference; rows of the chat format are the chat model's.
    """
    shared, of_format = rows.role[first:last] == Role.SHARED, rows.role[first:last] == Role.CHAT
    difference = pair.rows(
        name, RowPairs(rows.base[first:last][shared], rows.chat[first:last][shared])
    )
    assert difference.base is not None
    values = np.zeros((last - first, difference.values.shape[1]), np.float32)
    values[shared] = difference.values
    values[of_format] = pair.chat_rows(name, rows.chat[first:last][of_format])
    return values.reshape(-1), difference.base


def _describe(pair: Pair, squares: dict[str, float], dtype: Dtype, directory: Path) -> None:
    models = {"base": pair.base, "chat": pair.chat}
    write_json(
        directory / VECTOR_FILE,
        {
            "vector": "chat - base",
            "dtype": dtype,
            "models": {
                label: {
                    "name": shown_name(model.directory),
                    "fingerprint": fingerprint(model.directory),
                }
                for label, model in models.items()
            },
            "versions": installed_versions(),
            "base_types": {name: info.copied_dtype for name, info in pair.base.tensors.items()},
            "base_squares": squares,
            "base_sample": sample_digest(pair.base),
        },
    )
    _copy_model_files(pair.chat, directory)
    (directory / BASE_FOLDER).mkdir()
    _copy_model_files(pair.base, directory / BASE_FOLDER)
    write_text(directory / "README.md", _card(pair, dtype))


def _copy_model_files(model: Checkpoint, directory: Path) -> None:
    write_json(directory / CONFIG_FILE, model.config)
    names = (GENERATION_FILE, *TOKENIZER_FILES)
    for source in reversed(model.directories):
        copy_files([source / name for name in names], directory)
        write_templates(TokenizerFiles(source, {}, frozenset()).templates, directory)
    copy_companions(model.directories, directory)


def _card(pair: Pair, dtype: Dtype) -> str:
    licences = [front_matter(model.directory) for model in (pair.base, pair.chat)]
    front = {name: fields[name] for name in LICENCE_FIELDS for fields in licences if name in fields}
    names = f"`{shown_name(pair.chat.directory)} - {shown_name(pair.base.directory)}`"
    lines = [
        "---",
        yaml.safe_dump({"tags": ["chat-vector"], **front}, sort_keys=False).strip(),
        "---",
        "",
    ]
    lines += [
        "# Chat vector",
        "",
        f"{names}, in {dtype}, made with cpt-merge. This is not a model, and loaders refuse it. "
        "Add it to a model",
        "",
    ]
    return "\n".join(
        [*lines, "    cpt-merge merge-models --cpt CPT --vector THIS --ratio 1.0 --out OUT", ""]
    )
