"""The text for bits per byte: a corpus's held-out part, or files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, zip_longest

from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.data.sources import Corpus, Source, read_source
from cpt_merge.evaluation.config import EvaluationConfig

Text = Corpus | Mapping[str, str]  # a corpus with a held-out part, or language -> file


def languages_of(text: Text) -> list[str]:
    """The languages of the text."""
    return text.languages() if isinstance(text, Corpus) else list(text)


def read_documents(config: EvaluationConfig, text: Text) -> dict[str, list[str]]:
    """Documents by language, until `documents` or `max_bytes` is reached.

    A document that exceeds `max_bytes` is cut there, at a whole character. Raises `UserError` for a
    language without documents.
    """
    found = {}
    for language in languages_of(text):
        found[language], left = list[str](), config.max_bytes
        for document in _documents(text, language):
            if cut := document.encode()[:left].decode(errors="ignore"):
                found[language].append(cut)
            left -= len(document.encode())
            if left <= 0 or len(found[language]) == config.documents:
                break
        if not found[language]:
            raise UserError(
                f"corpus: no document in {language!r} is held out; raise corpus.heldout."
                if isinstance(text, Corpus)
                else f"--text {language}={text[language]} holds no text."
            )
    return found


def _documents(text: Text, language: str) -> Iterator[str]:
    """Held-out documents, from the language's sources in turn; or all documents of its file."""
    if isinstance(text, Corpus):
        streams = [text.documents(source, "heldout") for source in text.of_language(language)]
        return (one for one in chain.from_iterable(zip_longest(*streams)) if one is not None)
    source = Source(path=text[language], language=find_language(language).tag)
    return (document for document in read_source(source) if document.strip())
