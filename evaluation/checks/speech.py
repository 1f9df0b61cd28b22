"""The language and script of a reply."""

from __future__ import annotations

from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.evaluation.checks.registry import check
from cpt_merge.evaluation.script import is_in_language, other_script_characters


def _known(language: str) -> None:
    try:
        find_language(language)
    except UserError as error:
        raise ValueError(str(error).rstrip(".")) from None


@check("language", _known)
def language(reply: str, *, language: str) -> bool:
    """At least half of the letters are in the language's script; Traditional and Simplified are told apart."""
    return is_in_language(reply, language)


@check("script", _known)
def script(reply: str, *, language: str) -> bool:
    """As `language`, and not one character that only the other Chinese script has."""
    return is_in_language(reply, language) and not other_script_characters(reply, language)
