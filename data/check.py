"""Looks at the beginning of all text, for what would stop or spoil a later stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

from tokenizers import Tokenizer

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.data.documents import SKIPPED, read_documents, read_records
from cpt_merge.data.hub_datasets import at_hand, is_at_hand, size_of
from cpt_merge.data.mixture import MANY_EPOCHS, SourceShare, check_repeats
from cpt_merge.data.records import TemplateText, absent_fields
from cpt_merge.data.sources import Corpus, Source, read_source, source_files, text_bytes_at_most

HEAD_ROWS = 20  # of each file
MORE_ROWS = 10_000  # of the first file, if none of these has text
SAMPLE_BYTES = 200_000  # of text of each source, which are tokenised


def check_text(corpus: Corpus, download: bool = True) -> None:
    """Look at the first rows of every file that is here. Raises `UserError` for what is no text.

    Of a hub's dataset, the first file is downloaded, or else only those in the cache are looked at.
    """
    for source in corpus.sources:
        files = [file for file in source_files(source) if size_of(file)]
        here = [file for file in files if is_at_hand(file) or (download and file == files[0])]
        read = filled = 0
        for file in map(at_hand, here):
            head = list(islice(read_documents(file, source.layout), HEAD_ROWS))
            read += sum(text is not SKIPPED for text in head)
            filled += any(map(_has_text, head))
        if here and not filled:  # because no row has the field?
            more = list(read_documents(at_hand(here[0]), source.layout, MORE_ROWS))
            read += sum(text is not SKIPPED for text in more)
            is_all = len(files) == 1 and len(more) < MORE_ROWS
            if read and is_all and not any(map(_has_text, more)):
                raise UserError(f"text source {source.path} has no text; correct corpus.sources.")
        _warn_of_absent_fields(source, map(at_hand, here))
        if not read and (here or not files):
            raise UserError(f"text source {source.path} is empty; correct corpus.sources.")


def _has_text(text: str | None) -> bool:
    return bool(text and text.strip())


def _warn_of_absent_fields(source: Source, files: Iterable[Path]) -> None:
    """A misspelt field of a template would be empty in every document."""
    how = source.layout.text_of
    if isinstance(how, TemplateText):
        heads = (islice(read_records(file, source.layout), HEAD_ROWS) for file in files)
        if absent := absent_fields(how.fields, chain.from_iterable(heads)):
            say(
                f"warning: the first rows of text source {source.path} have no field "
                f"{' and no field '.join(map(repr, absent))}; it is empty in their documents."
            )


def check_budget(
    corpus: Corpus,
    shares_of: Callable[[Sequence[int | None]], Sequence[SourceShare]],
    tokenizer: Tokenizer,
) -> None:
    """Compare the tokens of a run with those that the text can have.

    `shares_of` says what the run reads of sources of these sizes. `tokenizer` is the base's: the
    extended one makes fewer tokens, so there are more epochs than are estimated here. Raises
    `UserError` for too many epochs, unless the recipe allows them, and for a source without
    documents.
    """
    sizes = [tokens_at_most(source, tokenizer) for source in corpus.sources]
    if any(source.epochs is not None for source in corpus.sources):
        return  # how many tokens that is, is known when the text is tokenised
    shares = shares_of(sizes)
    check_repeats(corpus, shares, "at least ")
    for share in shares:
        if share.epochs > MANY_EPOCHS:
            say(
                f"warning: {share.name} will be read {share.epochs:,.1f} times or more "
                f"(about {share.tokens / share.epochs:,.0f} tokens at most); repeated text teaches "
                "less each time."
            )


def tokens_at_most(source: Source, tokenizer: Tokenizer) -> int | None:
    """About how many tokens a source has at most, from a sample of its text and the files' sizes.

    None for a dataset on the hub whose files are not all downloaded. Raises `UserError` if there
    are no documents, since a slice of a split is empty.
    """
    files = source_files(source)
    if not all(map(is_at_hand, files)):
        return None
    documents, size, tokens = 0, 0, 0
    for text in read_source(source):
        documents += 1
        size += len(text.encode())
        tokens += len(tokenizer.encode(text, add_special_tokens=False)) + 2  # prefix and eos
        if size >= SAMPLE_BYTES:
            break
    else:
        if not documents:
            raise UserError(
                f"text source {source.path} has no documents in its split {source.split!r}; "
                "correct corpus.sources."
            )
        return tokens
    whole = sum(text_bytes_at_most(file, source) for file in files)
    if source.limit is not None:
        whole = min(whole, source.limit * size / documents)
    return int(whole * tokens / size)
