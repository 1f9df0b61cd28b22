"""The token store: every document tokenised once, in flat memory-mapped files.

    store/
      store.json                      digest, tokenizers, sources in order with counts; written last
      00-<source>/train/tokens.bin    uint16 or uint32, all documents one after the other
      00-<source>/train/starts.npy    int64 [documents + 1], where each document begins in
                                      tokens.bin, and the end
      00-<source>/train/bytes.npy     int64 [documents], UTF-8 bytes of each document's text
      00-<source>/heldout/...         the held-out documents of the same source
      00-<source>/reference/...       the held-out documents in the tokens of the original base

Splits of conversations (`data/conversations_store.py`) have one more file:

      00-<source>/train/trained.bin   uint8, a bit for each token: whether the loss counts it

A document of text is stored as `[prefix] tokens [eos]`. The prefix is the tokenizer's bos if it
adds one, otherwise eos, so that every token of the text is predicted from something.
`data/tokenise.py` writes stores.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from cpt_merge.core.artifact import fingerprint
from cpt_merge.core.errors import UserError

STORE_FILE = "store.json"
TRAINED_FILE = "trained.bin"
MAKE_AGAIN = (
    "remove the folder of the stage (runs/NAME/data) and run `cpt-merge data RECIPE` again."
)

StoreSplit = Literal["train", "heldout", "reference"]
SPLITS: tuple[StoreSplit, ...] = ("train", "heldout", "reference")
Tokens = npt.NDArray[Any]  # uint16 or uint32
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer of a split. `rows` is its largest id + 1, even if the text lacks that id."""

    fingerprint: str
    rows: int
    dtype: str


@dataclass(frozen=True)
class SplitCounts:
    """The contents of one split of a source. `largest` is its largest token id, or -1."""

    documents: int
    tokens: int
    bytes: int
    largest: int


@dataclass(frozen=True)
class MaskedCounts(SplitCounts):
    """The same of a split of conversations, whose documents fill sequences of `length` tokens.

    `trained` counts the tokens that the loss counts.
    """

    trained: int
    length: int


@dataclass(frozen=True)
class SourceInfo:
    """A source in `store.json`. `folder` is relative to the store.

    `left_out` counts the documents that are not in the store, by reason: bad_rows, empty,
    duplicates, and what the steps of preparation left out.
    """

    name: str
    language: str
    folder: str
    left_out: dict[str, int]
    train: SplitCounts
    heldout: SplitCounts
    reference: SplitCounts | None

    def counts(self, split: StoreSplit) -> SplitCounts:
        """The counts of a split. Raises `UserError` for a missing reference split."""
        found: SplitCounts | None = getattr(self, split)
        if found is None:
            raise UserError(f"the token store has no {split} text of {self.name}; {MAKE_AGAIN}")
        return found


def source_folder(number: int, name: str) -> str:
    """The folder of a source in a store."""
    return f"{number:02d}-" + re.sub(r"[^\w.-]+", "-", name)


def readable(reason: str) -> str:
    """A reason why documents are left out, in words."""
    return reason.replace("_", " ")


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Such as "3 empty, 12 duplicates"."""
    counts = [f"{count:,} {readable(reason)}" for reason, count in left_out.items() if count]
    return ", ".join(counts) or "none"


@dataclass(frozen=True)
class StoreInfo:
    """The content of `store.json`."""

    digest: str  # of the text, the tokenizers and the settings
    tokenizer: TokenizerInfo
    reference: TokenizerInfo | None  # of the original base
    sources: list[SourceInfo]

    def of(self, split: StoreSplit) -> TokenizerInfo:
        """The tokenizer of a split. Raises `UserError` for a missing reference split."""
        if split != "reference":
            return self.tokenizer
        if self.reference is None:
            raise UserError(f"the token store has no text in the base's tokens; {MAKE_AGAIN}")
        return self.reference


class SplitWriter:
    """Appends tokenised documents to one split's files."""

    def __init__(self, folder: Path, dtype: npt.DTypeLike) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dtype, self.largest = folder, np.dtype(dtype), -1
        self._file: IO[bytes] = open(folder / "tokens.bin", "wb")  # noqa: SIM115 - closed in `close`
        self._lengths, self._bytes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]

    def add(self, tokens: Tokens, lengths: Integers, sizes: Integers) -> None:
        """Append documents with prefix and eos; `lengths` in tokens, `sizes` in UTF-8 bytes."""
        if not len(tokens):
            return
        self.largest = max(self.largest, int(tokens.max()))
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.append(np.asarray(lengths, np.int64))
        self._bytes.append(np.asarray(sizes, np.int64))

    def close(self) -> SplitCounts:
        """Write the index files and make everything durable."""
        _close_synced(self._file)
        lengths, sizes = np.concatenate(self._lengths), np.concatenate(self._bytes)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        for name, values in (("starts", starts), ("bytes", sizes)):
            file: IO[bytes] = open(self.folder / f"{name}.npy", "wb")  # noqa: SIM115 - as above
            np.save(file, values)
            _close_synced(file)
        return SplitCounts(len(sizes), int(starts[-1]), int(sizes.sum()), self.largest)


def _close_synced(file: IO[bytes]) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())


class Documents:
    """One split of one source, memory-mapped: opening reads only the ends of the index.

    Raises `UserError` for files that are missing, incomplete, or do not fit `counts`.
    """

    def __init__(self, folder: Path, dtype: str, counts: SplitCounts) -> None:
        path = folder / "tokens.bin"
        try:
            self.starts = cast(Integers, np.load(folder / "starts.npy", mmap_mode="r"))
            self.bytes = cast(Integers, np.load(folder / "bytes.npy", mmap_mode="r"))
            size = path.stat().st_size
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"the token store in {folder} is damaged ({error}); {MAKE_AGAIN}"
            ) from None
        expected = counts.tokens * np.dtype(dtype).itemsize
        if size != expected:
            raise UserError(f"{path} has {size} bytes, not {expected}; {MAKE_AGAIN}")
        if len(self.bytes) != counts.documents or len(self.starts) != counts.documents + 1:
            raise UserError(
                f"the index in {folder} does not have {counts.documents} documents; {MAKE_AGAIN}"
            )
        if self.starts[0] != 0 or self.starts[-1] != counts.tokens:
            raise UserError(
                f"the index in {folder} does not end at {counts.tokens} tokens; {MAKE_AGAIN}"
            )
        self.folder, self.counts, self.largest = folder, counts, counts.largest
        self.tokens: Tokens = np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype)
        self.trained = _trained(folder, counts) if isinstance(counts, MaskedCounts) else None

    def __len__(self) -> int:
        return len(self.bytes)


class TrainedTokens:
    """Which tokens of a split the loss counts, memory-mapped."""

    def __init__(self, bits: npt.NDArray[np.uint8]) -> None:
        self._bits = bits

    def read(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Of the tokens from `first` to before `last`."""
        bits = np.unpackbits(self._bits[first // 8 : -(-last // 8)], bitorder="little")
        return bits[first % 8 :][: last - first].astype(np.bool_)


def _trained(folder: Path, counts: MaskedCounts) -> TrainedTokens:
    path, expected = folder / TRAINED_FILE, -(-counts.tokens // 8)
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise UserError(f"{path} has {size} bytes, not {expected}; {MAKE_AGAIN}")
    return TrainedTokens(
        np.memmap(path, dtype=np.uint8, mode="r") if size else np.zeros(0, np.uint8)
    )


@dataclass(frozen=True)
class Store:
    """An opened store."""

    directory: Path
    info: StoreInfo

    @staticmethod
    def open(directory: Path) -> Store:
        """Read `store.json`. Raises `UserError` if it is missing or damaged."""
        path = directory / STORE_FILE
        if not path.is_file():
            raise UserError(f"{path} does not exist; run `cpt-merge data RECIPE` first.")
        try:
            return Store(directory, _store_info(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}); {MAKE_AGAIN}") from None

    @property
    def has_conversations(self) -> bool:
        """Whether it holds conversations, of which the loss counts the replies, and no text."""
        return any(isinstance(source.train, MaskedCounts) for source in self.info.sources)

    def documents(self, source: SourceInfo, split: StoreSplit) -> Documents:
        """The documents of one split of a source."""
        return Documents(
            self.directory / source.folder / split, self.info.of(split).dtype, source.counts(split)
        )

    def check_tokenizer(self, tokenizer: Path) -> None:
        """Raise `UserError` if the store was made with another tokenizer."""
        if tokenizer_fingerprint(tokenizer) != self.info.tokenizer.fingerprint:
            raise UserError(
                f"the token store {self.directory} was made with another tokenizer than "
                f"{tokenizer}; run `cpt-merge data RECIPE` again."
            )

    def check_vocabulary(self, rows: int, split: StoreSplit = "train") -> None:
        """Raise `UserError` if the tokens of a split do not fit a model of `rows` rows.

        `train` includes `heldout`.
        """
        for source in self.info.sources:
            largest = source.counts(split).largest
            if split == "train":
                largest = max(largest, source.heldout.largest)
            if largest >= rows:
                raise UserError(
                    f"the token store {self.directory} contains token {largest} in {source.name} "
                    f"but the model has {rows} rows; use a model and a store of the same tokenizer."
                )


def tokenizer_fingerprint(directory: Path) -> str:
    """A digest of the tokenizer in a directory. Raises `UserError` if there is none."""
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return fingerprint(directory / name)
    raise UserError(
        f"{directory} contains neither tokenizer.json nor tokenizer.model; give the directory of a "
        "model."
    )


def _split_counts(values: dict[str, int]) -> SplitCounts:
    return MaskedCounts(**values) if "trained" in values else SplitCounts(**values)


def _store_info(values: dict[str, Any]) -> StoreInfo:
    sources = []
    for source in values["sources"]:
        splits = {
            split: _split_counts(source[split]) if source[split] else None for split in SPLITS
        }
        sources.append(SourceInfo(**(source | splits)))
    reference = TokenizerInfo(**values["reference"]) if values["reference"] else None
    return StoreInfo(values["digest"], TokenizerInfo(**values["tokenizer"]), reference, sources)
