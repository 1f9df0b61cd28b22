"""Text sources: files or hub datasets of documents, and what a corpus makes of them.

A document is held out by the hash of its text, so the tokenizer, the training data and the
evaluation agree on the held-out part without a file that lists it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from cpt_merge.core.config import ByLanguage, LanguageTag, Section, key
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub_repository import Repository
from cpt_merge.core.progress import say_once
from cpt_merge.data.documents import SKIPPED, Layout, count_rows, read_documents
from cpt_merge.data.files import find_files, plain_path
from cpt_merge.data.hub_datasets import TextFile, at_hand, hub_dataset_files, size_of
from cpt_merge.data.preparation import chinese
from cpt_merge.data.preparation.filters import Filtering, QualityFilter
from cpt_merge.data.preparation.notes import Notes
from cpt_merge.data.preparation.personal_data import PersonalData, Replacement
from cpt_merge.data.preparation.steps import Conversion, Preparation, Step
from cpt_merge.data.readers.arrow_tables import column_bytes
from cpt_merge.data.readers.streams import expansion
from cpt_merge.data.records import text_of
from cpt_merge.data.splits import parse_split

Split = Literal["train", "heldout"]
HASH_RANGE = 1_000_000
_PREPARATION = {"convert", "filters", "personal_data"}  # keys of steps that are off by default
_AMOUNTS = ("weight", "epochs", "tokens")  # keys of a source that set how much training reads of it


class Source(Section):
    """One source of text in one language."""

    path: str = key(
        ..., "a file, a directory, a glob, or a dataset on the hub: org/data or org/data@revision"
    )
    language: LanguageTag = key(
        ...,
        "language tag: zh_tw, zh_cn, zh_hk, ko, ja, en, or a code with its script, such as th_Thai",
    )
    field: str = key(
        "text",
        "where a record has its text: a field, a field in a field (`doc.text`), or a template of "
        "several (`{title}\\n\\n{text}`)",
    )
    conversations: bool = key(
        False,
        "records are conversations (`messages`, ShareGPT's `conversations`, or Alpaca's "
        "`instruction`, `input` and `output`), whose turns become the paragraphs of a document",
    )
    whole_files: bool = key(
        False, "each .txt or .md file is one document, instead of one document per line"
    )
    convert: chinese.Conversion | None = key(
        None,
        "OpenCC's conversion of Chinese text, such as s2twp (Simplified to Traditional with the "
        "words of Taiwan) or t2s; of the source's language, which is that of the result",
    )
    bad_rows: Literal["error", "skip"] = key(
        "error", "what happens at a row that cannot be read or whose text is not a string; `skip` "
        "leaves it out and counts it",
    )  # fmt: skip
    subset: str | None = key(None, "configuration of a dataset on the hub, or a folder of it")
    split: str = key(
        "train",
        "split of a dataset on the hub or of one that `save_to_disk` wrote, or rows of it, as in "
        "`train[:10%]` or `train[1000:2000]`",
    )
    limit: int | None = key(
        None,
        "use only this many documents, from the start, empty ones and bad rows included",
        unit="documents",
        gt=0,
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

    @model_validator(mode="after")
    def _readable(self) -> Source:
        if self.conversations and self.field != "text":
            raise ValueError(f"source {self.path} has conversations and a field; leave one out")
        try:
            text_of(self.field, self.conversations)
        except ValueError as error:
            raise ValueError(f"field {self.field!r} of source {self.path}: {error}") from None
        try:
            parts = parse_split(self.split)
        except ValueError as error:
            raise ValueError(f"split {self.split!r} of source {self.path} {error}") from None
        if self.limit is not None and not all(part.is_whole for part in parts):
            raise ValueError(
                f"source {self.path} has a limit and rows in its split {self.split!r}; leave one "
                "out, as in `train[1000:2000]`"
            )
        return self

    @model_validator(mode="after")
    def _one_amount(self) -> Source:
        given = [amount for amount in _AMOUNTS if getattr(self, amount) is not None]
        if len(given) > 1:
            raise ValueError(f"source {self.path} has {' and '.join(given)}; set one of them")
        return self

    @model_validator(mode="after")
    def _converts_to_its_language(self) -> Source:
        if self.convert:
            chinese.check_conversion(self.convert, self.language)
        return self

    @property
    def layout(self) -> Layout:
        """How the documents are in the files."""
        how = text_of(self.field, self.conversations)
        return Layout(how, self.whole_files, self.bad_rows == "skip")

    @property
    def name(self) -> str:
        """The name in logs and tables: the language and the last part of the path."""
        return f"{self.language}:{Path(plain_path(self.path)).name.split('.')[0]}"


class Corpus(Section):
    """The text of a run: every source, and how much of each is held out for measuring."""

    sources: list[Source] = key(
        ..., "the text, new languages and English replay alike", min_length=1
    )
    heldout: float = key(
        0.01, "share of the documents, by hash, that training never reads", gt=0, lt=0.5
    )
    normalization: Literal["NFC", "none"] = key("NFC", "Unicode normalization of every document")
    shares: ByLanguage[float] = key(
        {}, "each language's share of the training tokens, such as {ko: 0.85, en: 0.15}, divided "
        "among the sources of the language; if not set, all sources divide all tokens",
    )  # fmt: skip
    filters: list[QualityFilter] = key(
        [], "quality filters, each for the sources in one language; without one, none is applied"
    )
    personal_data: list[PersonalData] = key(
        [],
        "personal data that is replaced by placeholders such as `<EMAIL>`: email, ip_address "
        "(public ones), phone (Korea, Taiwan, China, Japan, and +82, +886, +86, +81, +852), "
        "kr_resident_number, tw_id_number, cn_id_number",
    )
    allow_repeats: bool = key(
        False, "let a run read a source more than 8 times because of `training.tokens`"
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> Corpus:
        if not self.shares:
            return self
        if set(self.shares) != set(self.languages()):
            raise ValueError(
                f"`corpus.shares` names {', '.join(self.shares)} but the sources are in "
                f"{', '.join(self.languages())}; give each language a share"
            )
        if not is_whole(self.shares):
            raise ValueError(
                f"`corpus.shares` sum to {sum(self.shares.values()):g}; they must be positive and "
                "sum to 1"
            )
        return self

    @model_validator(mode="after")
    def _filters_fit(self) -> Corpus:
        filtered = [one.language for one in self.filters]
        for language in filtered:
            if language not in self.languages():
                raise ValueError(
                    f"`corpus.filters` names {language}, but the sources are in "
                    f"{', '.join(self.languages())}"
                )
            if filtered.count(language) > 1:
                raise ValueError(f"`corpus.filters` has {language} twice; join the two")
        return self

    def text(self) -> dict[str, Any]:
        """The settings that decide which documents exist, for the key of a stage."""
        values = self.model_dump(
            exclude={"shares": True, "allow_repeats": True, "sources": {"__all__": set(_AMOUNTS)}}
        )
        # what is off decides nothing, and stages from before it existed keep their keys
        values["filters"] = [asdict(one.thresholds()) for one in self.filters]
        for section in (values, *values["sources"]):
            for name in _PREPARATION & section.keys():
                if not section[name]:
                    del section[name]
        return values

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
        """The documents of one split of a source, in file order, as preparation leaves them.

        Raises `UserError` for a missing file, a missing field, or a row that cannot be read.
        """
        prepare, notes = self.preparation(source), Notes()
        for raw in read_source(source):
            text = prepare(raw, notes)
            if text and self.is_heldout(text) == (split == "heldout"):
                yield text

    def preparation(self, source: Source) -> Preparation:
        """What becomes of the texts of a source."""
        return Preparation(self.normalization, self.steps(source))

    def steps(self, source: Source) -> list[Step]:
        """The steps that the recipe asks for, in order."""
        steps = list[Step]()
        if self.personal_data:  # first, since examples of later steps show the text
            steps.append(Replacement(tuple(self.personal_data)))
        if source.convert:
            steps.append(Conversion(source.convert))
        steps += [
            Filtering(one.thresholds()) for one in self.filters if one.language == source.language
        ]
        return steps

    def is_heldout(self, text: str) -> bool:
        """Whether the hash of a document falls in the held-out share."""
        return is_in_share(text, self.heldout)


def is_whole(shares: Mapping[str, float]) -> bool:
    """Whether shares are positive and sum to 1."""
    return min(shares.values()) > 0 and math.isclose(sum(shares.values()), 1, abs_tol=1e-6)


def is_in_share(text: str, share: float) -> bool:
    """Whether the hash of a text falls in a share of all texts."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HASH_RANGE < share * HASH_RANGE


def source_files(source: Source) -> list[TextFile]:
    """The files of a source, in order. Nothing is downloaded but the list of a hub's dataset."""
    names = dict.fromkeys(part.name for part in parse_split(source.split))
    return [file for name in names for file in _files_of_split(source, name)]


def _files_of_split(source: Source, split: str) -> Sequence[TextFile]:
    files = find_files(source.path, source.whole_files, split)
    if files:
        return files
    repository = Repository.parse("dataset", source.path)
    return hub_dataset_files(repository, source.subset, split, source.whole_files)


def is_on_hub(source: Source) -> bool:
    """Whether the path can only be a dataset's hub id."""
    splits = parse_split(source.split)
    return not find_files(source.path, source.whole_files, splits[0].name)


def reads_all_files(source: Source) -> bool:
    """Whether every file is read; a source with a limit, or a slice, may end before the last."""
    parts = parse_split(source.split)
    return source.limit is None and all(part.is_whole or part.needs_total for part in parts)


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read separately; the pieces in order are the source."""

    source: Source
    files: tuple[TextFile, ...]
    size: int  # bytes of the files
    rows: tuple[int, int | None] = (0, None)  # from which row to before which one; None: the end

    def text_bytes_at_most(self) -> float:
        """About how many bytes of text it has at most, judged by its first file."""
        first = self.files[0]
        return text_bytes_at_most(first, self.source) / size_of(first) * self.size


def source_pieces(source: Source) -> list[Piece]:
    """The files of a source. If it has a `limit` it is one piece, and so is a slice of a split."""
    if source.limit is not None:
        return [_piece(source, _filled(source_files(source)), (0, source.limit))]
    pieces = []
    for part in parse_split(source.split):
        files = _filled(_files_of_split(source, part.name))
        if part.is_whole:
            pieces += [_piece(source, [file]) for file in files]
        else:
            total = count_rows(map(at_hand, files), source.layout) if part.needs_total else 0
            pieces.append(_piece(source, files, part.rows(total)))
    return pieces


def _filled(files: Sequence[TextFile]) -> list[TextFile]:
    for file in files:
        if size_of(file) == 0:
            say_once(f"text file {file} is empty")
    return [file for file in files if size_of(file)]


def _piece(
    source: Source, files: list[TextFile], rows: tuple[int, int | None] = (0, None)
) -> Piece:
    return Piece(source, tuple(files), sum(map(size_of, files)), rows)


def text_bytes_at_most(file: TextFile, source: Source) -> float:
    """About how many bytes of text a file contains at most; it is downloaded if need be."""
    path = at_hand(file)
    if path.suffix == ".parquet":
        return column_bytes(path, source.layout.text_of.fields)
    return path.stat().st_size * expansion(path)


def read_source(source: Source) -> Iterator[str]:
    """Every document of a source, streamed; "" for a document without text.

    Raises `UserError` that names an unreadable file.
    """
    for piece in source_pieces(source):
        yield from (text for text in read_piece(piece) if text is not SKIPPED)


def read_piece(piece: Piece) -> Iterator[str | None]:
    """Every document of a piece, also the rows that are skipped, as `read_documents` does.

    Files of a hub's dataset are downloaded when it is their turn.
    """
    layout = piece.source.layout
    texts = (text for file in piece.files for text in read_documents(at_hand(file), layout))
    yield from itertools.islice(texts, *piece.rows)
