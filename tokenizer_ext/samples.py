"""The text that an extended tokenizer is proven and measured on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import regex

from cpt_merge.core.languages import find_language, script_pattern
from cpt_merge.data.sources import Corpus
from cpt_merge.tokenizer_ext.documents import documents
from cpt_merge.tokenizer_ext.sentences import SENTENCES

HELDOUT_CHARACTERS = 300_000  # per language
MIXED_TEXTS = 20_000

CODE = [
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "\tfor (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n\t}\n",
    'SELECT name, "e-mail" FROM users WHERE id IN (1, 2, 3);',
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 42); return 0; }',
    "https://example.org/a?b=c&d=%20e#f  user@example.org",
    "$ git log --oneline -n 10 | awk '{print $1}'",
    "\n".join(" " * width + "x" for width in range(40)),
    "  two spaces,   three,\ta tab,\n\n\ntwo empty lines   ",
    "Größe, café, naïve, Übermut, smörgåsbord, ½ × 3.14 ≈ 1.57",
    "Привет, мир! Γειά σου Κόσμε! שלום עולם مرحبا بالعالم नमस्ते สวัสดี",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji, e\u0301 combining, \u200b zero width, \ufeff mark",
]
FRAGMENTS = [
    " ", "  ", "\n", "\t", " \n ", "the", " model", "Tokenizer", "2024", "3.14", "x_1", "(", ")", "</p>", "{", "}", "=",
    "，", "。", "「", "」", "！", "％", "Ａ", "①", "é", "e\u0301", "n\u0303", "🙂", "👩‍👧",
    "\u200d", "\u200b", "\ufeff", "\u3000", "\x00", "\x07", "\x7f", "\ue000", "\u2581", "Ġ",
    "Привет", "שלום", "สวัส", "ひらがな", "カタカナ", "ー", "\u1112\u1161\u11ab", "ㅋㅋㅋ", "哈哈哈哈",
    "々", "〇", "𠮷", "\U0002f800",
]  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """What is proven and measured on."""

    texts: dict[
        str, list[str]
    ]  # by language, or by whatever name they came under: held-out documents
    sentences: dict[str, list[str]]  # of languages that `texts` has not
    plain: list[str]  # what of all this holds no letter of the scripts that were learnt
    mixed: list[str]  # random mixtures of new pieces and everything else
    scripts: tuple[str, ...]  # that were learnt

    @property
    def everything(self) -> list[str]:
        """All of them, the documents first."""
        named = [*self.texts.values(), *self.sentences.values()]
        return [*(text for texts in named for text in texts), *self.plain, *self.mixed]


def take_samples(
    texts: dict[str, list[str]], scripts: tuple[str, ...], pieces: Sequence[str]
) -> Samples:
    """Samples for a tokenizer that has learnt pieces of `scripts`; `pieces` are new ones, as text."""
    sentences = {
        language: lines for language, lines in SENTENCES.items() if not texts.get(language)
    }
    named = [*texts.values(), *sentences.values()]
    plain = [
        part
        for text in [*(text for one in named for text in one), *CODE]
        for part in _plain_parts(text, scripts)
    ]
    return Samples(texts, sentences, plain, mixed_texts(pieces, MIXED_TEXTS), scripts)


def heldout_texts(corpus: Corpus) -> dict[str, list[str]]:
    """Held-out documents of every language of the corpus."""
    return {
        tag: list(documents(corpus, tag, "heldout", HELDOUT_CHARACTERS))
        for tag in corpus.languages()
    }


def scripts_of(languages: Iterable[str]) -> tuple[str, ...]:
    """The scripts that the languages are written in."""
    return tuple(
        dict.fromkeys(script for tag in languages for script in find_language(tag).scripts)
    )


def _plain_parts(text: str, scripts: tuple[str, ...]) -> list[str]:
    """The whole text if it holds no character of the scripts, else those of its lines that hold none."""
    letters: regex.Pattern[str] = script_pattern(scripts)
    if not letters.search(text):
        return [text]
    return [line for line in text.splitlines() if line.strip() and not letters.search(line)]


def mixed_texts(pieces: Sequence[str], number: int) -> list[str]:
    """Random strings of pieces, other scripts, emoji, combining marks, spaces, control characters; always the same."""
    random = Random(0)
    fragments = [*FRAGMENTS, *CODE]
    return [
        "".join(
            random.choice(pieces if pieces and random.random() < 0.5 else fragments)
            for _ in range(random.randint(1, 10))
        )
        for _ in range(number)
    ]
