"""The text that bits per byte are measured on: a corpus's held-out part, or files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, zip_longest

from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.data.sources import Corpus, Source, read_source
from cpt_merge.evaluation.config import EvaluationConfig

Text = (
    Corpus | Mapping[str, str]
)  # the corpus whose held-out part is read, or by language a file that is read whole


def languages_of(text: Text) -> list[str]:
    """The languages that there is text in."""
    return text.languages() if isinstance(text, Corpus) else list(text)


def read_documents(config: EvaluationConfig, text: Text) -> dict[str, list[str]]:
    """Documents by language, until `documents` or `max_bytes` are reached.

    The document that would pass `max_bytes` is cut there, at a whole character. Raises `UserError`
    for a language without any.
    """
    found = {}
    for language in languages_of(text):
        documents = (
            _heldout(text, language)
            if isinstance(text, Corpus)
            else _file(text[language], language)
        )
        found[language] = _cut(documents, config)
        if not found[language]:
            raise UserError(
                f"corpus: no document in {language!r} is held out; raise corpus.heldout or add text."
                if isinstance(text, Corpus)
                else f"--text {language}={text[language]} holds no text."
            )
    return found


def _heldout(corpus: Corpus, language: str) -> Iterator[str]:
    """The held-out documents of a language's sources, in turns."""
    streams = [corpus.documents(source, "heldout") for source in corpus.of_language(language)]
    return (text for text in chain.from_iterable(zip_longest(*streams)) if text is not None)


def _file(path: str, language: str) -> Iterator[str]:
    source = Source(path=path, language=find_language(language).tag)
    return (document for document in read_source(source) if document.strip())


def _cut(documents: Iterable[str], config: EvaluationConfig) -> list[str]:
    texts: list[str] = []
    left = config.max_bytes
    for text in documents:
        cut = text.encode()[:left].decode(errors="ignore")
        if cut:
            texts.append(cut)
        left -= len(text.encode())
        if left <= 0 or len(texts) == config.documents:
            break
    return texts
