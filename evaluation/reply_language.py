"""Would a reader say that a reply is in a language?

What belongs to no language is left out first: code, addresses, formulas. The rest is weighed by
script, so that a Latin word counts about as much as the Chinese characters that would translate it,
and a name less; quotations and what is in parentheses hardly count. Languages in Chinese characters
are then told apart; others that share a script (English and French) are not.
"""

from __future__ import annotations

import unicodedata

import regex

from cpt_merge.core.languages import Language, find_language, script_pattern
from cpt_merge.evaluation.chinese import SCRIPT_OF, is_chinese, is_japanese, signs_of_chinese

OWN_SHARE = 0.5  # of a reply's weight

# what a reply's text weighs: a letter of a script, or of others, and a Latin word
LETTERS = {"Han": 1.0, "Bopomofo": 1.0, "Hangul": 0.7, "Hiragana": 0.5, "Katakana": 0.5}
OTHER_LETTER = 0.25
SENTENCE_WORD, TERM, NAME = 1.75, 0.5, 0.15
HANJA = 0.25  # a Chinese character in Korean text
OWN_ASIDE, OTHER_ASIDE = 0.5, 0.05  # times the weight of asides in the wanted language, in others

FENCE = regex.compile(
    r"^[ \t]*(?P<mark>```+|~~~+)[ \t]*(?P<tag>[\w+#.-]*)[^\n]*\n"
    r"(?P<code>.*?)(?:^[ \t]*(?P=mark)[ \t]*$|\Z)",
    regex.M | regex.S,
)
TAGS_OF_TEXT = {"", "text", "txt", "plain", "plaintext", "markdown", "md"}
CODE = regex.compile(r"[{}()=;<>$]")
CJK = r"\p{Han}\p{Hangul}\p{Hiragana}\p{Katakana}"
NO_LANGUAGE = regex.compile(
    r"(?P<ticks>(?<!`)`++)[^`\n]+(?P=ticks)"
    # addresses; one in ASCII ends where other text begins
    r"|(?:https?|ftp)://(?:[!-~]+|[^\s，。、；！？）」』】]+)|\bwww\.[!-~]+"
    r"|(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]++@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"
    r"|(?<![!-~])(?:[A-Za-z0-9-]+\.)+(?:com|org|net|gov|edu|io|ai|dev|tw|cn|kr|hk|jp|uk)"
    r"(?![A-Za-z])(?:/[!-~]*)?"
    r"|(?<![!-~])(?:[A-Za-z]:|~|\.{1,2})?(?:[\\/][A-Za-z0-9_.-]+){2,}/?"
    # formulas
    rf"|\$\$.+?\$\$|\$[^$\n{CJK}]+\$|\\\(.+?\\\)|\\\[.+?\\\]"
    r"|\\begin\{(?P<name>\w+\*?)\}.+?\\end\{(?P=name)\}|\\[A-Za-z]+"
    r"|(?<!\p{L})\p{Greek}(?!\p{L})"
    # marks of HTML, targets of links, and units of measure
    r"|</?[A-Za-z][^<>\n]{0,200}>|&[a-z]+;|(?<=\])\([^()\s]+\)"
    r"|(?<=\d[ ]?)(?:[kcmµn]?m|[kmµ]?g|[mk]?l|L|[kMGT]?B|[kMG]?Hz|k?W|kWh|[AV]|s|h|min|°[CF])\b",
    regex.S,
)
ASIDE = regex.compile(
    r"「[^「」\n]*」|『[^『』\n]*』|《[^《》\n]*》|〈[^〈〉\n]*〉|【[^【】\n]*】|“[^“”\n]*”|‘[^‘’\n]*’"
    r"|\"[^\"\n]*\"|(?<![\p{L}\p{N}])'[^'\n]*'(?!\p{Latin})|（[^（）\n]*）|\([^()\n]*\)"
)
WORD = r"[\p{Latin}\p{M}\p{N}'’&+.-]*"
RUN = regex.compile(rf"{WORD}\p{{Latin}}{WORD}(?:[ \t]+{WORD}[\p{{Latin}}\p{{N}}&]{WORD})*")
OTHER_SCRIPTS = regex.compile(rf"[\p{{L}}--[\p{{Latin}}\p{{Bopomofo}}{CJK}]]", regex.V1)
# Words that make Latin words a sentence; those of a title (Lord of the Rings) alone do not
TITLE_WORDS = frozenset(
    "a an and at by da de del der di du el for from in la le of on or the to van von with y".split()
)
SENTENCE_WORDS = TITLE_WORDS | frozenset(
    "about am are as be been but can could did do does don't had has have he her here his how i "
    "i'm if is isn't it it's its me my no not our she should so some than that that's their them "
    "then there these they this those up us was we were what when where which who why will would "
    "yes you your".split()
)


def is_in_language(text: str, language: str) -> bool:
    """True if a reader would say that a reply is in a language: at least half of its weight is.

    A reply without words (a number, a choice such as B, code alone) is in every language; one
    without a letter or digit is in none.
    """
    text = unicodedata.normalize("NFC", text)
    prose = without_code(text)
    if not has_letters(prose):
        return regex.search(r"[\p{L}\p{N}]", text) is not None
    main = ASIDE.sub(" ", prose)
    if not has_letters(main):  # all is in quotation marks
        main = prose
    wanted = find_language(language)
    own, other = weights(main, wanted)
    if main is not prose:
        own_aside, other_aside = weights("\n".join(ASIDE.findall(prose)), wanted)
        own, other = own + OWN_ASIDE * own_aside, other + OTHER_ASIDE * other_aside
    if own < OWN_SHARE * (own + other):
        return False
    if wanted.tag in SCRIPT_OF:
        return is_chinese(main, wanted.tag)
    return wanted.tag != "ja" or is_japanese(main)


def without_code(text: str) -> str:
    """The text without code, addresses, formulas and marks.

    A fence holds text if nothing is outside of it and it does not look like code.
    """

    def text_in(fence: regex.Match[str]) -> str:
        is_text = fence["tag"].lower() in TAGS_OF_TEXT and not CODE.search(fence["code"])
        return str(fence["code"]) if is_text else " "

    outside = FENCE.sub(" ", text)
    return str(NO_LANGUAGE.sub(" ", outside if has_letters(outside) else FENCE.sub(text_in, text)))


def has_letters(text: str) -> bool:
    """True if there is a letter of any script."""
    return regex.search(r"\p{L}", text) is not None


def weights(text: str, language: Language) -> tuple[float, float]:
    """What of a text is in a language's scripts, and what is in others."""
    found = {script: of_one * _letters(text, script) for script, of_one in LETTERS.items()}
    found["Latin"] = sum(weight_of_run(run.split()) for run in RUN.findall(text))
    scripts = set(language.scripts)
    if language.tag in SCRIPT_OF:
        scripts.add("Bopomofo")
    if scripts == {"Hangul"} and not signs_of_chinese(text):
        found["Han"] *= HANJA / LETTERS["Han"]
    own = sum(found.get(script, 0.0) for script in scripts)
    others = OTHER_LETTER * len(OTHER_SCRIPTS.findall(text))
    for script in scripts - found.keys():
        own += OTHER_LETTER * _letters(text, script)
    return own, max(0.0, sum(found.values()) + others - own)


def weight_of_run(words: list[str]) -> float:
    """The weight of Latin words with nothing but spaces in between: a sentence, terms or a name.

    A single letter weighs nothing: it is a variable, or an answer like B.
    """
    if len(words) == 1 and len(regex.findall(r"\p{L}", words[0])) == 1:
        return 0.0
    plain = {word.strip("'’&+.-").lower().replace("’", "'") for word in words}
    small = [word for word in words if word == word.lower()]
    if plain & SENTENCE_WORDS and not TITLE_WORDS.issuperset(small):
        return SENTENCE_WORD * len(words)
    terms = [word for word in small if word not in TITLE_WORDS]
    return TERM * len(terms) + NAME * (len(words) - len(terms))


def _letters(text: str, script: str) -> int:
    return len(script_pattern((script,)).findall(text))
