"""The text that an extended tokenizer is proven and measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import regex

from core.languages import find_language, script_pattern
from core.sources import Corpus
from tokenizer_ext.grow import documents

HELDOUT_CHARACTERS = 300_000  # per language
MIXED_TEXTS = 5_000

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
    """Held-out documents by language, text without the scripts that were learnt, and random mixtures of everything."""

    heldout: dict[str, list[str]]
    plain: list[str]
    mixed: list[str]

    @property
    def everything(self) -> list[str]:
        """All of them, the documents first."""
        return [*(text for texts in self.heldout.values() for text in texts), *self.plain, *self.mixed]


def take_samples(corpus: Corpus, learned: Sequence[str], pieces: Sequence[str]) -> Samples:
    """Samples for a tokenizer that has learnt the languages `learned`; `pieces` are new ones, as text."""
    heldout = {tag: list(documents(corpus, tag, "heldout", HELDOUT_CHARACTERS)) for tag in corpus.languages()}
    scripts = tuple(dict.fromkeys(script for tag in learned for script in find_language(tag).scripts))
    texts = [text for documents_ in heldout.values() for text in documents_] + CODE
    plain = [part for text in texts for part in _plain_parts(text, scripts)]
    return Samples(heldout, plain, mixed_texts(pieces, MIXED_TEXTS))


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
