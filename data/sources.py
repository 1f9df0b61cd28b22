"""Text sources: files or hub datasets of documents, read through `datasets`.

A document is held out by the hash of its text, so the tokenizer, the training data and the
evaluation agree on the held-out part without a file that lists it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from cpt_merge.core.config import Section, key
from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.core.progress import say

Split = Literal["train", "heldout"]
HASH_RANGE = 1_000_000
READ_ROWS = 1000  # rows taken from `datasets` at a time
HEAD_LINES = 20  # lines of each file that `check_text` reads

_FORMATS = {
    ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text",
    ".csv": "csv",
}  # fmt: skip
_COMPRESSIONS = {".gz", ".zst", ".bz2", ".xz"}
_JSON_FAILURE = re.compile(r"Failed to load JSON from file '(.+)' with error ")  # of `datasets`
_AMOUNTS = ("weight", "epochs", "tokens")  # keys of a source that set how much training reads of it


class Source(Section):
    """One source of text in one language."""

    path: str = key(..., "a file, a directory, a glob, or a dataset's hub id")
    language: str = key(
        ...,
        "language tag: zh_tw, zh_cn, zh_hk, ko, ja, en, or a code with its script, such as th_Thai",
    )
    field: str = key("text", "the column with the text of a document")
    subset: str | None = key(None, "configuration name of a hub dataset")
    split: str = key("train", "split of a hub dataset")
    limit: int | None = key(
        None, "use only this many documents, from the start", unit="documents", gt=0
    )
    weight: float | None = key(
        None,
        "share of what sources with `epochs` or `tokens` leave, relative to the other weights; "
        "1 if not set",
        gt=0,
    )
    epochs: float | None = key(
        None, "train on the source this many times, instead of a weight", gt=0
    )
    tokens: int | None = key(
        None, "train on this many tokens of it, instead of a weight", unit="tokens", gt=0
    )

    @field_validator("language")
    @classmethod
    def _known(cls, tag: str) -> str:
        try:
            return find_language(tag).tag
        except UserError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _one_amount(self) -> Source:
        given = [amount for amount in _AMOUNTS if getattr(self, amount) is not None]
        if len(given) > 1:
            raise ValueError(f"source {self.path} has {' and '.join(given)}; set one of them")
        return self

    @property
    def name(self) -> str:
        """The name in logs and tables: the language and the last part of the path."""
        return f"{self.language}:{Path(self.path).name.split('.')[0]}"


class Corpus(Section):
    """The text of a run: every source, and how much of each is held out for measuring."""

    sources: list[Source] = key(
        ..., "the text, new languages and English replay alike", min_length=1
    )
    heldout: float = key(
        0.01, "share of the documents, by hash, that training never reads", gt=0, lt=0.5
    )
    normalization: Literal["NFC", "none"] = key("NFC", "Unicode normalization of every document")
    shares: dict[str, float] = key(
        {}, "each language's share of the training tokens, such as {ko: 0.85, en: 0.15}, divided "
        "among the sources of the language; if not set, all sources divide all tokens",
    )  # fmt: skip

    @model_validator(mode="after")
    def _shares_fit(self) -> Corpus:
        if not self.shares:
            return self
        if set(self.shares) != set(self.languages()):
            raise ValueError(
                f"`corpus.shares` names {', '.join(self.shares)} but the sources are in "
                f"{', '.join(self.languages())}; give each language a share"
            )
        total = sum(self.shares.values())
        if min(self.shares.values()) <= 0 or not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(
                f"`corpus.shares` sum to {total:g}; they must be positive and sum to 1"
            )
        return self

    def text(self) -> dict[str, Any]:
        """The settings that decide which documents exist, for the key of a stage."""
        return self.model_dump(exclude={"shares": True, "sources": {"__all__": set(_AMOUNTS)}})

    def amounts(self) -> dict[str, Any]:
        """The settings that decide how much of each source is read, for the key of a stage."""
        return self.model_dump(include={"shares": True, "sources": {"__all__": set(_AMOUNTS)}})

    def languages(self) -> list[str]:
        """The languages of the sources, in order of first mention."""
        return list(dict.fromkeys(source.language for source in self.sources))

    def of_language(self, language: str) -> list[Source]:
        """The sources in one language. Raises `UserError` if there are none."""
        found = [source for source in self.sources if source.language == language]
        if not found:
            raise UserError(
                f"corpus.sources has no text in {language!r}; add a source with language: "
                f"{language}."
            )
        return found

    def documents(self, source: Source, split: Split) -> Iterator[str]:
        """The documents of one split of a source, in file order. Empty documents are left out.

        Raises `UserError` for a missing file, a missing column, or text that is not UTF-8.
        """
        for raw in read_source(source):
            text = self.prepare(raw)
            if text and self.is_heldout(text) == (split == "heldout"):
                yield text

    def prepare(self, text: str) -> str:
        """The normalised text; empty if it is all white space."""
        if self.normalization != "none":
            text = unicodedata.normalize(self.normalization, text)
        return text if text.strip() else ""

    def is_heldout(self, text: str) -> bool:
        """Whether the hash of a document falls in the held-out share."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") % HASH_RANGE < self.heldout * HASH_RANGE


def source_files(source: Source) -> list[Path]:
    """The local files of a source, sorted; empty for a hub dataset.

    A path is local if it exists, contains a wildcard, starts with `.`, `/` or `~`, has a known
    ending, or is in a folder that exists; anything else is a hub id.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _format_of(file))
        if not files:
            raise UserError(
                f"{path} contains no {', '.join(_FORMATS)} file; point the source at the text."
            )
        return files
    if any(character in source.path for character in "*?["):
        pattern = str(path.relative_to(path.anchor))
        files = sorted(Path(path.anchor).glob(pattern))
        if not files:
            raise UserError(f"no file matches the source path {source.path!r}.")
        return files
    if path.is_file():
        return [path]
    looks_local = source.path.startswith((".", "/", "~")) or source.path.count("/") > 1
    in_a_folder = "/" in source.path and path.parent.is_dir()
    if looks_local or in_a_folder or _format_of(path):
        raise UserError(f"text source {source.path} does not exist; correct corpus.sources.")
    return []


def check_text(corpus: Corpus) -> None:
    """Look at the first lines of every local source. Raises `UserError` for what is no text."""
    for source in corpus.sources:
        files = source_files(source)
        filled = [file for file in files if file.stat().st_size]
        lines = [file for file in filled if ".jsonl" in file.suffixes]
        found = [_check_lines(file, source.field, HEAD_LINES) for file in lines]
        if others := [file for file in filled if ".jsonl" not in file.suffixes]:
            # only one, since opening a file of another format takes longer
            found.append(next(_read_file(others[0], source), None) is not None)
        if files and not any(found):
            raise UserError(f"text source {source.path} is empty; correct corpus.sources.")


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read separately; the pieces in order are the source."""

    source: Source
    files: tuple[Path, ...]  # empty for a hub dataset
    size: int  # bytes on disk; 0 for a hub dataset
    shard: tuple[int, int] = (0, 1)  # (which, of how many) of a hub dataset


def source_pieces(source: Source) -> list[Piece]:
    """The files of a source, or its shards on the hub; a source with a `limit` is one piece."""
    found = source_files(source)
    for file in found:
        if file.stat().st_size == 0:
            say(f"text file {file} is empty")
    files = [file for file in found if file.stat().st_size]
    if not found:
        shards = 1 if source.limit else int(_open_hub(source).num_shards)
        return [Piece(source, (), 0, (shard, shards)) for shard in range(shards)]
    parts = [tuple(files)] if source.limit else [(file,) for file in files]
    return [Piece(source, part, sum(file.stat().st_size for file in part)) for part in parts]


def read_source(source: Source) -> Iterator[str]:
    """Every document of a source, streamed; "" for a document without text.

    Raises `UserError` that names an unreadable file.
    """
    for piece in source_pieces(source):
        yield from read_piece(piece)


def read_piece(piece: Piece) -> Iterator[str]:
    """Every document of a piece, as `read_source` gives them."""
    source = piece.source
    texts: Iterator[str]
    if piece.files:
        texts = itertools.chain.from_iterable(_read_file(file, source) for file in piece.files)
    else:
        which, shards = piece.shard
        dataset = _open_hub(source)
        texts = _column(
            dataset if shards == 1 else dataset.shard(shards, which), source, source.path
        )
    yield from itertools.islice(texts, source.limit)


def _open_hub(source: Source) -> Any:
    import datasets

    return datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True)


def _read_file(file: Path, source: Source) -> Iterator[str]:
    import datasets

    kind = _format_of(file)
    if kind is None:
        raise UserError(
            f"{file}: its ending is none of {', '.join(_FORMATS)} (also compressed); convert it."
        )
    files: Any = {"train": str(file)}
    try:
        with json_errors():
            dataset = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
            yield from _column(dataset, source, str(file))
    except Exception as error:  # datasets wraps the errors of file readers in several classes
        if kind == "json":
            _check_lines(file, source.field)  # names the line
        if isinstance(error, UserError):
            raise
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        if isinstance(cause, UnicodeDecodeError):
            raise UserError(
                f"{file} is not UTF-8 (byte {cause.start}: {cause.reason}); convert it."
            ) from None
        raise UserError(
            f"{file} cannot be read as {kind}: {str(cause) or type(cause).__name__}."
        ) from error


def _column(dataset: Any, source: Source, where: str) -> Iterator[str]:
    """The texts of a column, read as Arrow tables: one dictionary per row would be slower."""
    first = 1
    for table in dataset.with_format("arrow").iter(READ_ROWS):
        if source.field not in table.column_names:
            raise UserError(
                f"{where}: there is no column {source.field!r} but "
                f"{', '.join(table.column_names)}; set the source's `field`."
            )
        column = table.column(source.field)
        # of values of several types, datasets makes JSON, in which text is in quotation marks
        as_json = str(column.type) == "extension<arrow.json>"
        for number, text in enumerate(column.to_pylist(), start=first):
            if not as_json and (text is None or isinstance(text, str)):
                yield text or ""
            else:
                raise UserError(
                    f"{where}: column {source.field!r} of row {number} is not text; set `field`."
                )
        first += len(table)


@contextmanager
def json_errors() -> Iterator[None]:
    """Name file and line of what `datasets` cannot read as JSON lines.

    It logs the name of the file and raises an error that counts bytes. Raises `UserError`.
    """
    logger, files = logging.getLogger("datasets.packaged_modules.json.json"), list[str]()

    def hold_back(record: logging.LogRecord) -> bool:
        found = _JSON_FAILURE.match(record.getMessage())
        files.extend(found.groups() if found else ())
        return not found

    logger.addFilter(hold_back)
    try:
        yield
    except Exception:
        for file in map(Path, files):
            if file.is_file():
                _check_lines(file)
        raise
    finally:
        logger.removeFilter(hold_back)


def _check_lines(file: Path, field: str | None = None, most: int | None = None) -> bool:
    """Whether a JSON-lines file has documents in its first `most` lines that are not blank.

    Raises `UserError` with the number of the first bad line. A line without the field is bad if no
    line has it; otherwise it is an empty document.
    """
    import fsspec  # type: ignore[import-untyped]

    lacking: str | None = None
    with fsspec.open(str(file), "rb", compression="infer") as lines:
        filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        for count, (number, line) in enumerate(itertools.islice(filled, most)):
            try:
                document = parse_json_line(line.decode("utf-8-sig"))
                wrong = "" if isinstance(document, dict) else "is not a JSON object"
            except UnicodeDecodeError:
                wrong = "is not UTF-8"
            except ValueError as error:
                wrong = str(error)
            whole = line.startswith(b"[") or line.strip() == b"{" or ".jsonl" not in file.suffixes
            if wrong and not count and whole:
                return True  # one JSON value for the whole file, which datasets reads too
            if wrong:
                raise UserError(f"{file}: line {number} {wrong}; fix it.") from None
            if field is None:
                continue
            if not isinstance(document.get(field, ""), str | None):
                raise UserError(
                    f"{file}: field {field!r} of line {number} is not text; fix it, or set the "
                    "source's `field`."
                )
            if field in document:
                lacking = ""
            elif lacking is None:
                names = ", ".join(document) or "none"
                lacking = f"line {number} has no field {field!r} but {names}"
    if lacking:
        raise UserError(f"{file}: {lacking}; set the source's `field`.")
    return lacking is not None


def parse_json_line(line: str) -> Any:
    """The value of a line. Raises `ValueError` that says what is wrong with the line."""
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("contains a lone surrogate, which is not Unicode text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}: character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("is not JSON that can be read (too deeply nested)") from None
    return value


def _format_of(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix not in _COMPRESSIONS]
    return _FORMATS.get(suffixes[-1]) if suffixes else None
