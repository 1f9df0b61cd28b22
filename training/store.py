"""The token store: every document tokenised once, in flat memory-mapped files with document boundaries and byte counts.

    store/
      store.json                      tokenizer fingerprint, vocabulary size, the sources in order with their counts
      00-<source>/train/tokens.bin    uint16 or uint32, all documents one after the other
      00-<source>/train/starts.npy    int64 [documents + 1], where each document begins in tokens.bin; last: the end
      00-<source>/train/bytes.npy     int64 [documents], UTF-8 bytes of each document's text
      00-<source>/heldout/...         the held-out documents of the same source

A document is stored as `[prefix] tokens [eos]`, where the prefix is the tokenizer's bos if it adds one, otherwise eos;
so every token of the text has something to be predicted from.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from core.artifact import fingerprint, write_json
from core.errors import UserError
from core.progress import Meter
from core.sources import Corpus, Source, Split

STORE_FILE = "store.json"
MAKE_AGAIN = "remove the stage's folder (runs/NAME/data) and run `cpt-merge data RECIPE` again."
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclass(frozen=True)
class SplitCounts:
    """What one split of a source holds."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class SourceInfo:
    """One source in `store.json`. `folder` is relative to the store."""

    name: str
    language: str
    weight: float
    folder: str
    train: SplitCounts
    heldout: SplitCounts


@dataclass(frozen=True)
class StoreInfo:
    """The content of `store.json`."""

    tokenizer: str  # fingerprint of tokenizer.json
    vocabulary: int  # rows of the embedding matrix, at least the largest id + 1
    dtype: str
    sources: list[SourceInfo]


class DocumentWriter:
    """Appends tokenised documents to one split's files."""

    def __init__(self, folder: Path, dtype: npt.DTypeLike) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dtype = folder, np.dtype(dtype)
        self._file = open(folder / "tokens.bin", "wb")  # noqa: SIM115 - closed in `close`
        self._starts, self._bytes = [0], list[int]()

    def add(self, ids: list[int], text_bytes: int) -> None:
        """One document: its ids with prefix and eos, and the UTF-8 length of its text."""
        np.asarray(ids, dtype=self.dtype).tofile(self._file)
        self._starts.append(self._starts[-1] + len(ids))
        self._bytes.append(text_bytes)

    def close(self) -> SplitCounts:
        """Write the index files."""
        self._file.close()
        np.save(self.folder / "starts.npy", np.asarray(self._starts, dtype=np.int64))
        np.save(self.folder / "bytes.npy", np.asarray(self._bytes, dtype=np.int64))
        return SplitCounts(len(self._bytes), self._starts[-1], sum(self._bytes))


class Documents:
    """One split of one source, memory-mapped."""

    def __init__(self, folder: Path, dtype: str) -> None:
        path = folder / "tokens.bin"
        try:
            self.starts = cast("npt.NDArray[np.int64]", np.load(folder / "starts.npy", mmap_mode="r"))
            self.bytes = cast("npt.NDArray[np.int64]", np.load(folder / "bytes.npy", mmap_mode="r"))
            size = path.stat().st_size
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"the token store in {folder} is damaged ({error}); {MAKE_AGAIN}") from None
        expected = int(self.starts[-1]) * np.dtype(dtype).itemsize
        if size != expected:
            raise UserError(f"{path} has {size} bytes, not {expected}; {MAKE_AGAIN}")
        empty = expected == 0
        self.tokens: npt.NDArray[Any] = np.zeros(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return len(self.bytes)


@dataclass(frozen=True)
class Store:
    """An opened store."""

    directory: Path
    info: StoreInfo

    @staticmethod
    def open(directory: Path) -> Store:
        """Read `store.json`. Raises `UserError` where there is none."""
        path = directory / STORE_FILE
        if not path.is_file():
            raise UserError(f"{path} does not exist; run `cpt-merge data RECIPE` first.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            sources = [_source_info(source) for source in values.pop("sources")]
            return Store(directory, StoreInfo(**values, sources=sources))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}); {MAKE_AGAIN}") from None

    def documents(self, source: SourceInfo, split: Split) -> Documents:
        """The documents of one split of a source."""
        return Documents(self.directory / source.folder / split, self.info.dtype)

    def check_tokenizer(self, tokenizer: Path) -> None:
        """Raises `UserError` if the store was made with another tokenizer."""
        if fingerprint(tokenizer / "tokenizer.json") != self.info.tokenizer:
            raise UserError(
                f"the token store {self.directory} was made with another tokenizer than {tokenizer}; "
                "run `cpt-merge data RECIPE` again."
            )


def _source_info(values: dict[str, Any]) -> SourceInfo:
    splits: dict[str, Any] = {split: SplitCounts(**values[split]) for split in SPLITS}
    return SourceInfo(**(values | splits))


def write_store(corpus: Corpus, tokenizer_directory: Path, out: Path, batch_documents: int) -> StoreInfo:
    """Tokenise the whole corpus into a store at `out`. Raises `UserError` for a source without text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    rows = len(tokenizer)
    dtype = "uint16" if rows <= 2**16 else "uint32"
    sources = []
    for number, source in enumerate(corpus.sources):
        folder = f"{number:02d}-{source.name.replace(':', '-')}"
        with Meter(f"tokenise {source.name}", None, "documents") as meter:
            counts = {
                split: _write_split(
                    corpus, source, split, tokenizer, out / folder / split, dtype, batch_documents, meter
                )
                for split in SPLITS
            }
        if not counts["train"].documents:
            raise UserError(f"text source {source.path} yields no training text; give it text or take it out.")
        sources.append(SourceInfo(source.name, source.language, source.weight, folder, **counts))
    info = StoreInfo(fingerprint(tokenizer_directory / "tokenizer.json"), rows, dtype, sources)
    write_json(out / STORE_FILE, asdict(info))
    return info


def _write_split(
    corpus: Corpus, source: Source, split: Split, tokenizer: Any, folder: Path, dtype: str, batch: int, meter: Meter
) -> SplitCounts:
    writer = DocumentWriter(folder, dtype)
    prefix = document_prefix(tokenizer)
    for texts in batched(corpus.documents(source, split), batch):
        for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
            writer.add([prefix, *ids, tokenizer.eos_token_id], len(text.encode()))
        meter.advance(len(texts))
    return writer.close()


def document_prefix(tokenizer: Any) -> int:
    """The id that a document starts with: the tokenizer's bos if it adds one, otherwise its eos."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no eos token; set `eos_token` in its config.")
    added = tokenizer("", add_special_tokens=True)["input_ids"]
    return int(added[0]) if added else int(tokenizer.eos_token_id)


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
