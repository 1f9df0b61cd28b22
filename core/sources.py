"""Text sources: files or hub datasets of documents, read through `datasets`, with a held-out part by document hash.

The held-out part is a pure function of a document's text, so the tokenizer, the training data and the evaluation
agree on it without a file that lists it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from core.config import Section, key
from core.errors import UserError
from core.languages import find_language
from core.progress import say

Split = Literal["train", "heldout"]
HASH_RANGE = 1_000_000

_FORMATS = {
    ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text", ".csv": "csv",
}  # fmt: skip
_COMPRESSIONS = {".gz", ".zst", ".bz2", ".xz"}


class Source(Section):
    """One source of text in one language."""

    path: str = key(..., "a file, a directory, a glob, or a dataset's hub id")
    language: str = key(
        ..., "language tag: zh_tw, zh_cn, zh_hk, ko, ja, en, or any code with its script's, such as th_Thai"
    )
    field: str = key("text", "the column that holds a document's text")
    subset: str | None = key(None, "configuration name of a hub dataset")
    split: str = key("train", "split of a hub dataset")
    limit: int | None = key(None, "use only this many documents, from the start", unit="documents", gt=0)
    weight: float = key(1.0, "share of the training tokens, relative to the other sources", gt=0)

    @field_validator("language")
    @classmethod
    def _known(cls, tag: str) -> str:
        try:
            return find_language(tag).tag
        except UserError as error:
            raise ValueError(str(error)) from None

    @property
    def name(self) -> str:
        """What logs and tables call this source: the language and the last part of its path."""
        return f"{self.language}:{Path(self.path).name.split('.')[0]}"


class Corpus(Section):
    """The text of a run: every source, and how much of each is held out for measuring."""

    sources: list[Source] = key(..., "the text, new languages and English replay alike", min_length=1)
    heldout: float = key(0.01, "share of the documents, by hash, that is never trained on", gt=0, lt=0.5)
    normalization: Literal["NFC", "none"] = key("NFC", "Unicode normalization of every document")

    def languages(self) -> list[str]:
        """The languages of the sources, in order of first mention."""
        return list(dict.fromkeys(source.language for source in self.sources))

    def of_language(self, language: str) -> list[Source]:
        """The sources in one language. Raises `UserError` where there are none."""
        found = [source for source in self.sources if source.language == language]
        if not found:
            raise UserError(f"corpus.sources holds no text in {language!r}; add a source with language: {language}.")
        return found

    def documents(self, source: Source, split: Split) -> Iterator[str]:
        """The documents of one split of a source, in file order. Empty documents are left out.

        Raises `UserError` for a missing file, a missing column, or text that is not UTF-8.
        """
        for text in itertools.islice(read_source(source), source.limit):
            if self.normalization != "none":
                text = unicodedata.normalize(self.normalization, text)
            if text.strip() and self.is_heldout(text) == (split == "heldout"):
                yield text

    def is_heldout(self, text: str) -> bool:
        """True for the documents whose hash falls in the held-out share."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") % HASH_RANGE < self.heldout * HASH_RANGE


def source_files(source: Source) -> list[Path]:
    """The local files of a source, sorted; empty for a hub dataset.

    A path is local if it exists, holds a wildcard, starts with `.`, `/` or `~`, or ends like a file of text;
    anything else is a hub id.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _format_of(file))
        if not files:
            raise UserError(f"{path} holds no {', '.join(_FORMATS)} file; point the source at the text.")
        return files
    if any(character in source.path for character in "*?["):
        root = Path(path.anchor) if path.is_absolute() else Path()
        files = sorted(root.glob(str(path.relative_to(path.anchor) if path.is_absolute() else path)))
        if not files:
            raise UserError(f"no file matches the source path {source.path!r}.")
        return files
    if path.is_file():
        return [path]
    if source.path.startswith((".", "/", "~")) or _format_of(path) or source.path.count("/") > 1:
        raise UserError(f"text source {source.path} does not exist; correct corpus.sources.")
    return []


def read_source(source: Source) -> Iterator[str]:
    """Every document of a source, streamed. Raises `UserError` that names the file."""
    import datasets

    files = source_files(source)
    if not files:
        yield from _column(
            datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True), source
        )
        return
    for file in files:
        if file.stat().st_size == 0:
            say(f"text file {file} is empty")
            continue
        kind = _format_of(file)
        if kind is None:
            raise UserError(f"{file}: the ending is none of {', '.join(_FORMATS)} (also compressed); convert it.")
        options: dict[str, Any] = {"data_files": {"train": str(file)}, "split": "train", "streaming": True}
        try:
            yield from _column(datasets.load_dataset(kind, **options), source)
        except UserError:
            raise
        except Exception as error:  # datasets wraps what the file readers raise in several classes of its own
            cause = _root_cause(error)
            if isinstance(cause, UnicodeDecodeError):
                raise UserError(f"{file} is not UTF-8 (byte {cause.start}: {cause.reason}); convert it.") from None
            line = _line_with_lone_surrogate(file) if kind == "json" and file.suffix not in _COMPRESSIONS else None
            if line:
                raise UserError(
                    f"{file}: line {line} holds a lone surrogate, so it is no Unicode text; repair it."
                ) from None
            raise UserError(f"{file} cannot be read as {kind}: {str(cause) or type(cause).__name__}.") from error


def _column(rows: Any, source: Source) -> Iterator[str]:
    for number, row in enumerate(rows):
        if source.field not in row:
            raise UserError(
                f"{source.path}: row {number + 1} has no column {source.field!r} but {', '.join(row)}; "
                "set the source's `field`."
            )
        text = row[source.field]
        if isinstance(text, str):
            yield text
        elif text is not None:
            raise UserError(f"{source.path}: column {source.field!r} of row {number + 1} is no text; set `field`.")


def _line_with_lone_surrogate(file: Path) -> int | None:
    """The first line of a JSON-lines file that is good JSON of bad Unicode, for which readers have odd messages."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                json.dumps(json.loads(line), ensure_ascii=False).encode()
            except UnicodeEncodeError:
                return number
            except ValueError:
                return None
    return None


def _format_of(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix not in _COMPRESSIONS]
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error
