"""The documents of one language, in order."""

from __future__ import annotations

from collections.abc import Iterator

from cpt_merge.core.errors import UserError
from cpt_merge.data.sources import Corpus, Split


def documents(corpus: Corpus, language: str, split: Split, max_characters: int) -> Iterator[str]:
    """Documents in one language, from the start of each source in turn, until `max_characters` have been given.

    Raises `UserError` for a document that is no Unicode text.
    """
    left = max_characters
    for source in corpus.of_language(language):
        for number, text in enumerate(corpus.documents(source, split), start=1):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{source.path}: {split} document {number} holds a lone surrogate, so it is no Unicode text; "
                    "repair or remove it."
                ) from None
            yield text
            left -= len(text)
            if left <= 0:
                return
