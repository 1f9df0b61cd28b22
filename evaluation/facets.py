"""What can be said of a reply without a judge.

`chat`, the headline, is the share of replies that are all of: ended by the model itself, in the prompt's language, in
chat format. No baseline enters: each facet is a property of the one reply. They say whether a model behaves like a
chat model in the language, not whether what it says is true or helpful.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.languages import find_language, script_share
from evaluation.generate import Reply

SCRIPT_SHARE = 0.5  # of a reply's letters; names, code and quotations may be in another script
GRAM = 4  # characters

# A character that only the one of these encodings has is written in the one script only: 國 is in Big5, 国 in GB 2312,
# 里 in both. {language: (its own, the other's)}
SCRIPT_ENCODINGS = {
    "zh_tw": ("big5", "gb2312"),
    "zh_hk": ("big5hkscs", "gb2312"),
    "zh_cn": ("gb2312", "big5"),
}


@dataclass(frozen=True)
class Facets:
    """One reply's facets."""

    stopped: bool
    in_language: bool
    keeps_format: bool
    repetition: float  # share of its 4-grams of characters that occurred before

    @property
    def chat(self) -> bool:
        """All of stopped, language and format."""
        return self.stopped and self.in_language and self.keeps_format

    def values(self) -> dict[str, float]:
        """Every facet by its name, as a number."""
        return {
            "chat": float(self.chat),
            "stopped": float(self.stopped),
            "in_language": float(self.in_language),
            "keeps_format": float(self.keeps_format),
            "repetition": self.repetition,
        }


def judge(reply: Reply, language: str, marks: Sequence[str]) -> Facets:
    """The facets of a reply to a prompt in `language`; `marks` are the chat template's."""
    return Facets(
        stopped=reply.stopped,
        in_language=is_in_language(reply.text, language),
        keeps_format=bool(reply.text.strip()) and not any(mark in reply.text for mark in marks),
        repetition=repetition(reply.text),
    )


def is_in_language(text: str, language: str) -> bool:
    """True if at least half of the letters are in the language's script; False for a text without letters.

    Chinese must also be in the right one of its two scripts: of the characters that only one of them has, at least half
    are the language's. Languages that share a script (English and French) are not told apart.
    """
    if script_share(text, find_language(language).scripts) < SCRIPT_SHARE:
        return False
    if language not in SCRIPT_ENCODINGS:
        return True
    own, other = SCRIPT_ENCODINGS[language]
    return characters_only_in(text, own, other) >= characters_only_in(text, other, own)


def characters_only_in(text: str, encoding: str, other: str) -> int:
    """How many characters of a text `encoding` has and `other` has not."""
    return sum(_encodes(character, encoding) and not _encodes(character, other) for character in text)


def _encodes(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def repetition(text: str) -> float:
    """1 - distinct / all 4-grams of characters; 0 for a text shorter than one."""
    grams = [text[start : start + GRAM] for start in range(len(text) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
