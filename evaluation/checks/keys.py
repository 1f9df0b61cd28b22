"""Whether a reply holds a key: a word or a number, as a whole, and whether the reply denies it."""

from __future__ import annotations

from functools import lru_cache

import regex

from cpt_merge.evaluation.checks.numerals import CLOSE, mark_numbers, plain
from cpt_merge.evaluation.checks.senses import within_other_sense

VARIANTS = str.maketrans("臺裏羣峯啓爲綫衆牀麪竪滙汙癡", "台裡群峰啟為線眾床麵豎匯污痴")

# what may follow a key of one Korean syllable: 개는, 개입니다, but neither 개미 nor 개나리
PARTICLES = (
    "은|는|이|가|을|를|의|에|에서|에게|에게서|한테|도|만|와|과|로|으로|랑|이랑|하고|처럼|같이|보다|까지|부터|마다|"
    "조차|밖에|뿐|들|들은|들이|들을|씩|쯤|번|개|살|명|마저|이나|든지|이든|께서|께|라도|에는|에도|에서는|와는|과는|로는|만이|만을|만은"
)
COPULA = (
    r"(?:입니|입니까|이에요|예요|에요|이었|였|이라|라고|라서|라면|이죠|이지|죠|지요|네요|이네|이군|군요|"
    r"이고|이며|인데|인가|인지|일까|이야|야|이다|다|요|임|였던|이던)\p{Hangul}*"
)
SYLLABLE_ENDS = rf"(?=(?:{PARTICLES}|{COPULA})?(?!\p{{Hangul}}))"

FILLER = (
    r"(?:[\s「『“‘\"'《*_]|(?<!\p{L})(?:an?|the|in|at|on|from|to|called|named|live in|lives i"
    r"n|be|being|"
    r"really|actually|exactly|have|has|my|your|his|her|their|its|going to be|equal to|equals?"
    r")(?!\p{L}))*"
)
DENIED_BEFORE = regex.compile(
    r"(?:(?<![是對对會会能好要可])(?:並|并|也|絕|绝|而|都|才|卻|却)?(?:不|沒有?|没有?|未|非|無|无)"
    r"(?:再|太|會|会|能|可能|應該|应该|完全|真的)?"
    r"(?:是|叫做|叫|等於|等于|住在|位於|位于|在|到|為|为|屬於|属于|姓|足|只|止)?"
    r"[一這这那]?[隻只個个種种座位]?[\s「『“‘\"'《*_]*"
    rf"|(?<!\p{{L}})(?:not|never|isn[’']t|aren[’']t|wasn[’']t|weren[’']t|doesn[’']t|don[’']t|didn[’']t|"
    rf"cannot|can[’']t|won[’']t|no longer|neither|nor|no|without|rather than|instead of){FILLER})$"
)
DENIED_AFTER = regex.compile(
    rf"(?:(?<={CLOSE})(?:\p{{Hangul}}{{1,2}}?|\p{{Han}}))?"
    r"[」』”’\"'》*_]*\s*(?:"
    r"(?:이|가|은|는|도|인 것은|인 것이|인 건)?\s*(?:절대\s|결코\s)?(?:아니|아닌|아닙|아녜|없)"
    r"|\s(?:말고|대신)|(?:이|가|은|는|을|를|에|에서|도|라고|이라고)\s\p{Hangul}+지(?:는|도|를)?\s?(?:않|못|마|말)"
    r"|(?:並|并)?(?:不對|不对|不正確|不正确|是錯的|是错的|是錯誤的|是错误的)"
    r"|\s(?:is|was|would be) (?:wrong|incorrect|false|not right|not correct))"
)


@lru_cache(maxsize=256)
def canonical(text: str) -> str:
    """The text for comparison: one width, one case, one form of a character, numbers by value."""
    return mark_numbers(plain(text.replace("，", "、")).translate(VARIANTS))


def occurrences(reply: str, key: str) -> list[tuple[int, int]]:
    """Where a key occurs in `canonical(reply)`, each place as a whole word or number."""
    text, wanted = canonical(reply), canonical(key)
    return [
        match.span()
        for match in _pattern(wanted).finditer(text)
        if not within_other_sense(text, match.start(), match.end(), wanted)
    ]


def holds(reply: str, key: str) -> bool:
    """Whether the reply holds the key, denied or not."""
    return bool(occurrences(reply, key))


def affirms(reply: str, key: str) -> bool:
    """Whether the reply holds the key without denying it, as in 不是 X, X가 아니다, not X."""
    text = canonical(reply)
    return any(
        not DENIED_BEFORE.search(text[max(0, start - 40) : start])
        and not DENIED_AFTER.match(text, end)
        for start, end in occurrences(reply, key)
    )


@lru_cache(maxsize=1024)
def _pattern(wanted: str) -> regex.Pattern[str]:
    """The key with the boundaries that its script has.

    Latin words are whole words. A Korean syllable may have a particle. Spaces within Chinese and
    Korean do not matter.
    """
    inner = r"\s+".join(regex.escape(part) for part in wanted.split())
    if regex.search(r"[\p{Han}\p{Hangul}]", wanted):
        inner = inner.replace(r"\s+", r"\s*")
    before = after = ""
    if regex.match(r"[\p{Latin}\p{N}]", wanted):
        before = r"(?<![\p{Latin}\p{M}\p{N}])"
    if regex.search(r"[\p{Latin}\p{N}]$", wanted):
        after = r"(?![\p{Latin}\p{M}\p{N}])"
    if regex.fullmatch(r"\p{Hangul}", wanted):
        before, after = r"(?<!\p{Hangul})", SYLLABLE_ENDS
    return regex.compile(before + inner + after)
