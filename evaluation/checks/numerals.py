"""Numbers in digits, Chinese, Korean and English words.

`mark_numbers` replaces every number of a text by its value between marks, so that 7, ７, 七, 柒,
일곱 and seven are equal, and 17, 十七, 7.5, -7, 7:30 and 7萬 are other numbers.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from decimal import Decimal

import regex

from cpt_merge.evaluation.checks.senses import within_other_sense

OPEN, CLOSE = "\ue000", "\ue001"  # private characters, which texts do not use
MARKED = rf"{OPEN}([^{CLOSE}]*){CLOSE}"

HAN_DIGITS: Mapping[str, int] = {
    **dict(zip("〇零一二三四五六七八九", [0, *range(10)], strict=True)),
    **dict(zip("壹貳贰叁肆伍陸陆柒捌玖", [1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9], strict=True)),
    **dict.fromkeys("兩两", 2),
    **dict.fromkeys("參参", 3),
}
HAN_UNITS: Mapping[str, int] = {
    **dict.fromkeys("十拾", 10),
    **dict.fromkeys("百佰", 100),
    **dict.fromkeys("千仟", 1000),
    **dict.fromkeys("萬万", 10**4),
    **dict.fromkeys("億亿", 10**8),
    "兆": 10**12,
}
SINO_DIGITS: Mapping[str, int] = {
    **dict(zip("영일이삼사오육칠팔구", range(10), strict=True)),
    "공": 0,
    "륙": 6,
}
SINO_UNITS: Mapping[str, int] = {
    **{"십": 10, "백": 100, "천": 1000},
    **{"만": 10**4, "억": 10**8, "조": 10**12},
}
NATIVE_TENS: Mapping[str, int] = {
    **{"열": 10, "스물": 20, "스무": 20, "서른": 30, "마흔": 40, "쉰": 50},
    **{"예순": 60, "일흔": 70, "여든": 80, "아흔": 90},
}
NATIVE_ONES: Mapping[str, int] = {
    **{"하나": 1, "한": 1, "둘": 2, "두": 2, "셋": 3, "세": 3, "넷": 4, "네": 4},
    **{"다섯": 5, "여섯": 6, "일곱": 7, "여덟": 8, "아홉": 9},
}
ENGLISH: Mapping[str, int] = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen".split()
    )
} | {
    word: 10 * value
    for value, word in enumerate(
        "twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2
    )
}
ENGLISH_UNITS: Mapping[str, int] = {
    **{"hundred": 100, "thousand": 10**3, "million": 10**6},
    **{"billion": 10**9, "trillion": 10**12},
}

# what may follow digits directly: 7km, but not 7B
LATIN_UNITS = (
    "st|nd|rd|th|am|pm|a\\.m|p\\.m|km|cm|mm|m|kg|g|mg|l|ml|h|hr|hrs|min|mins|s|sec|ms|gb|mb|tb|kb|"
    "c|f|ft|in|lb|lbs|oz|mph|kmh|krw|twd|usd|ntd|hz|w|kw|v|percent|years?|days?|hours?"
)
COUNTERS = (
    "개월|개국|개|명|분|사람|마리|살|세기|세|권|장|대|병|잔|컵|송이|그루|켤레|벌|채|척|통|봉지|줄|점|"
    "번째|번|시간|시|년|월|일|주일|주|달|초|층|도|원|등|위|회|차례|차|가지|종류|곳|군데|팀|배|편|곡|쪽|"
    "페이지|학년|반|호선|호|미터|킬로미터|킬로그램|킬로|센티미터|센티|그램|리터|퍼센트|프로|인분|인|그릇|"
    "접시|조각|알|모|단계|단어|글자|문장|쌍|박|끼|달러|자리|나라|계절|형제|남매|과목|다리|색깔|색|요일|"
    "대륙|손가락|대양|곱하기|더하기|빼기|나누기|째"
)
PARTICLES = (
    "은|는|이|가|을|를|의|에|에서|에게|도|만|와|과|로|으로|랑|이랑|하고|까지|부터|보다|처럼|밖에|마다|"
    "씩|쯤|정도|이나|나|여"
)
COPULA = (
    r"(?:입|이에|예|이었|였|이라|라|이죠|죠|이네|네|이군|군|이고|고|이며|며|인|이야|야|"
    r"이다|다|이요|요|임)\p{Hangul}*"
)
AFTER_KOREAN = (
    rf"(?=\s?(?:{COUNTERS})(?:{PARTICLES}|{COPULA}|간|짜리|대)?(?!\p{{Hangul}})"
    rf"|(?:{PARTICLES})(?!\p{{Hangul}})|{COPULA}(?!\p{{Hangul}})|(?!\p{{Hangul}}))"
)
# a single syllable such as 이 or 일 is a word too, so it needs a counter, a copula or the end
SURE_COUNTERS = "년|월|개월|학년|퍼센트|프로|킬로|미터|더하기|빼기|곱하기|나누기"
AFTER_SYLLABLE = (
    rf"(?=\s?(?:{SURE_COUNTERS})(?:{PARTICLES}|{COPULA})?(?!\p{{Hangul}})"
    r"|(?:이에요|예요|입니다|이다|이야|요)(?!\p{Hangul})|\s*(?:[^\p{Hangul}\s]|$))"
)

AFTER_CLEAR_SYLLABLE = (  # 칠 도, but not 칠판
    rf"(?=도{COPULA}(?!\p{{Hangul}})|\s?(?:{SURE_COUNTERS}|일)(?:{PARTICLES}|{COPULA})?(?!\p{{Hangul}})"
    rf"|\s(?:{COUNTERS})(?:{PARTICLES}|{COPULA})?(?!\p{{Hangul}})"
    rf"|(?:{PARTICLES})(?!\p{{Hangul}})|{COPULA}(?!\p{{Hangul}})|(?!\p{{Hangul}}))"
)

FRACTIONS = {"½": ".5", "¼": ".25", "¾": ".75"}
SUPERSCRIPTS = regex.compile(r"(?<=[\p{N}\p{L}])[²³¹⁰⁴-⁹]+")
MINUS = r"(?<![\p{L}\p{N}\p{Pe}%°.,])[-−–](?=\d)"
BELOW = (
    r"(?:零下|負|负|영하|마이너스|(?<!\p{L})(?:minus|negative)(?!\p{L}))"
    r"\s*(?:攝氏|摄氏|섭씨|華氏|华氏)?\s*(?:約|约|약)?\s*"
)
SIGN = rf"(?P<sign>{MINUS}|{BELOW})?"
DIGITS = (
    r"(?<![\p{Latin}\p{N}_])(?<!\p{N}[.:/])(?<!\^)"
    r"\d+(?:(?<!\d{4}),\d{3}(?:,\d{3})*(?!\d))?(?:\.\d+)?(?!\^)"
)
HAN_DIGIT = "[〇零一二三四五六七八九兩两壹貳贰叁肆柒捌玖]"
HAN = (
    rf"(?:{DIGITS}|{HAN_DIGIT}|(?<![數数幾几])[十拾])(?:(?<=\d)\s?(?=[萬万億亿千百]))?"
    rf"(?:\d+|[{''.join(HAN_DIGITS)}{''.join(HAN_UNITS)}])*"
)
MORE = r"(?P<more>\s?[多幾几餘余](?!\p{Nd})|여(?=\s|명|개|년)|\s?몇)?"


def plain(text: str) -> str:
    """The text for comparison: in one width (Ａ and A), one case, with single spaces."""
    for character, decimals in FRACTIONS.items():
        text = regex.sub(rf"(?<=\d){character}", decimals, text)
    text = SUPERSCRIPTS.sub(lambda match: "^" + match[0], text)
    normal: str = unicodedata.normalize("NFKC", text)
    return " ".join(normal.split()).casefold()


def mark_numbers(text: str) -> str:
    """A plain text with the value of every number between marks, without a space after it."""
    for pattern, read in READERS:
        text = pattern.sub(_unless_in_a_word(read), text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return str(regex.sub(rf"{CLOSE}\s+", CLOSE, text))


Read = Callable[[regex.Match[str]], str | None]


def _unless_in_a_word(read: Read) -> Callable[[regex.Match[str]], str]:
    """The number's mark, or the text as it is: where `read` finds none, in 一起 and in a mark."""

    def replace(match: regex.Match[str]) -> str:
        inside = match.string.rfind(OPEN, 0, match.start()) > match.string.rfind(
            CLOSE, 0, match.start()
        )
        if inside or within_other_sense(match.string, match.start(), match.end()):
            return str(match[0])
        value = read(match)
        return str(match[0]) if value is None else f"{OPEN}{value}{CLOSE}"

    return replace


def _shown(value: Decimal | int, match: regex.Match[str]) -> str:
    if match.groupdict().get("sign"):
        value = -value
    if isinstance(value, Decimal):
        value = value.normalize()
        text = f"{value:f}"
    else:
        text = str(value)
    return text + ("+" if match.groupdict().get("more") else "")


def _read_digits(match: regex.Match[str]) -> str | None:
    """A number in digits, with a multiplier (3,000, 7 million) or without one."""
    digits = match["digits"].replace(",", "")
    if regex.fullmatch(r"0\d{2,}", digits):  # a code such as 007
        return None
    value = Decimal(digits) * ENGLISH_UNITS.get(match["unit"] or "", 1)
    return _shown(value, match)


def _read_time(match: regex.Match[str]) -> str:
    hour, minute = int(match["hour"]), match["minute"]
    return str(hour) if minute == "00" else f"{hour}:{minute}"


def _read_fraction(match: regex.Match[str]) -> str:
    return f"{int(match['top'])}/{int(match['bottom'])}"


def _read_parts(match: regex.Match[str]) -> str | None:
    top, bottom = _value(match["top"]), _value(match["bottom"])
    return f"{top:f}/{bottom:f}" if top is not None and bottom is not None else None


def _read_mixed(match: regex.Match[str]) -> str | None:
    """A number in Chinese characters, Korean syllables, or digits with their units."""
    value = _value(match["number"])
    return None if value is None else _shown(value, match)


def _value(text: str) -> Decimal | None:
    """The value of 三千五百, 3천5백, 二〇二四 or 7萬; None for 七八 (seven or eight)."""
    tokens = regex.findall(r"\d+(?:,\d{3})*(?:\.\d+)?|\S", text)
    digits = [_digit(token) for token in tokens]
    if None in digits:
        return _with_units(tokens, digits)
    if len(tokens) == 1:
        return digits[0]
    spelled = len(tokens) > 2 or {"〇", "零"} & set(tokens)
    if not spelled or any(token[0].isdecimal() for token in tokens):
        return None
    return Decimal("".join(map(str, digits)))


def _with_units(tokens: list[str], digits: list[Decimal | None]) -> Decimal | None:
    """The value of digits and units; `digits` has None where a token is a unit."""
    total = section = Decimal(0)  # above and below 萬
    current: Decimal | None = None
    last = 1
    for token, digit in zip(tokens, digits, strict=True):
        if digit is not None:
            if current:
                return None
            current = digit
            continue
        unit = HAN_UNITS.get(token) or SINO_UNITS.get(token)
        if unit is None:
            return None
        if unit < 10**4:
            section += (current or 1) * unit
        else:
            below = section + (current or 0)
            if not total and not below:
                below = Decimal(1)  # 만 이천
            total = total + below * unit if below else total * unit  # 萬億
            section = Decimal(0)
        current, last = None, unit
    if current is not None:
        short = last >= 100 and digits[-2] is None and tokens[-1] in HAN_DIGITS
        section += current * last / 10 if short else current  # 三百五 is 350
    return total + section


def _digit(token: str) -> Decimal | None:
    if token[0].isdecimal():
        return Decimal(token.replace(",", ""))
    value = HAN_DIGITS.get(token, SINO_DIGITS.get(token))
    return None if value is None else Decimal(value)


def _read_decimal(match: regex.Match[str]) -> str | None:
    """一點五, 일 점 오."""
    whole = _value(match["number"])
    digits = [_digit(token) for token in regex.findall(r"\S", match["decimals"])]
    if whole is None or not all(digit is not None and digit < 10 for digit in digits):
        return None
    return _shown(whole + Decimal("0." + "".join(map(str, digits))), match)


def _read_native(match: regex.Match[str]) -> str | None:
    hundred = {"백": 100, "천": 1000, None: 0}[match["hundred"]]
    tens, ones = NATIVE_TENS.get(match["tens"] or "", 0), NATIVE_ONES.get(match["ones"] or "", 0)
    return _shown(hundred + tens + ones, match) if tens or ones else None


def _read_english(match: regex.Match[str]) -> str | None:
    words = regex.findall(r"\p{L}+", match["number"])
    if words == ["one"]:  # which is a pronoun too
        return None
    total = current = 0
    for word in words:
        if word == "hundred":
            current = (current or 1) * 100
        elif word in ENGLISH_UNITS:
            total, current = total + (current or 1) * ENGLISH_UNITS[word], 0
        else:
            current += ENGLISH.get(word, 1 if word == "a" else 0)
    value = Decimal(total + current)
    if match["decimals"]:
        digits = "".join(str(ENGLISH[word]) for word in match["decimals"].split())
        value += Decimal(f"0.{digits}")
    return _shown(value, match)


def _any(words: Mapping[str, int]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


ONES = "|".join(word for word, value in ENGLISH.items() if 0 < value < 10)
TENS = "|".join(word for word, value in ENGLISH.items() if value >= 20)
TEENS = "|".join(word for word, value in ENGLISH.items() if 10 <= value < 20)
SMALL = rf"(?:(?:{TENS})(?:[-\s](?:{ONES}))?|{TEENS}|{ONES}|zero)"
HUNDREDS = rf"(?:(?:{SMALL}|a)[-\s]hundred(?:\s(?:and\s)?{SMALL})?|{SMALL})"
THOUSANDS = (
    rf"(?:{HUNDREDS}|a)[-\s](?:thousand|million|billion|trillion)"
    rf"(?:,?\s(?:and\s)?{HUNDREDS}(?:\s(?:thousand|million))?)*"
)
SINO = "[일이삼사오육륙칠팔구영공십백천만억조]"
NUMBER = rf"(?P<number>{HAN})"

READERS: tuple[tuple[regex.Pattern[str], Read], ...] = (
    (
        regex.compile(
            rf"{SIGN}(?P<number>{DIGITS}(?:\s?[십백천만억조]|(?<=[십백천만억조])\s?\d+)+)"
            rf"(?!\p{{L}}\d){MORE}"
        ),
        _read_mixed,
    ),
    (
        regex.compile(r"(?<![\p{L}\p{N}:.])(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)(?![\d:])"),
        _read_time,
    ),
    (
        regex.compile(r"(?<![\p{Latin}\p{N}./])(?P<top>\d+)[/⁄](?P<bottom>\d+)(?![\p{N}/])"),
        _read_fraction,
    ),
    (regex.compile(rf"(?P<bottom>{HAN})分之(?P<top>{HAN})"), _read_parts),
    (
        regex.compile(
            rf"{SIGN}(?P<number>{HAN})[點点](?P<decimals>{HAN_DIGIT}+)"
            rf"(?![分刻半十]|\p{{N}}){MORE}"
        ),
        _read_decimal,
    ),
    (regex.compile(rf"{SIGN}{NUMBER}(?<![\d.,]){MORE}"), _read_mixed),
    (
        regex.compile(
            rf"{SIGN}(?P<digits>{DIGITS})(?!\.?\d)(?!\p{{Latin}}|_)"
            rf"(?:\s(?P<unit>{_any(ENGLISH_UNITS)})(?!\p{{L}}))?{MORE}"
        ),
        _read_digits,
    ),
    (
        regex.compile(
            rf"{SIGN}(?P<digits>{DIGITS})(?=(?:{LATIN_UNITS})(?!\p{{Latin}}))(?P<unit>(?!))?"
        ),
        _read_digits,
    ),
    (
        regex.compile(
            rf"(?<![\p{{Hangul}}])(?P<sign>{BELOW})?(?P<number>{SINO}+)\s?점\s?(?P<decimals>[일이삼사오육륙칠팔구영공]+){AFTER_KOREAN}"
        ),
        _read_decimal,
    ),
    (
        regex.compile(
            rf"(?<!\p{{Hangul}})(?P<sign>{BELOW})?"
            rf"(?P<number>(?={SINO}*십|(?:{SINO}\s?){{3}}|{SINO}\s?{SINO}\s?(?:{COUNTERS}))"
            rf"(?:{SINO}*[천만억조]\s)*{SINO}{{1,}}(?<={SINO}\s?{SINO})){MORE}{AFTER_KOREAN}"
        ),
        _read_mixed,
    ),
    (
        regex.compile(
            rf"(?<!\p{{Hangul}})(?P<sign>{BELOW})?(?P<number>[칠팔육삼영십]){AFTER_CLEAR_SYLLABLE}"
        ),
        _read_mixed,
    ),
    (regex.compile(rf"(?<=[섭화]씨\s?)(?P<number>{SINO}+)(?=\s?도)"), _read_mixed),
    (
        regex.compile(
            rf"(?<!\p{{Hangul}})(?P<number>[백천])(?=\s(?:{COUNTERS})"
            rf"(?:{PARTICLES}|{COPULA})?(?!\p{{Hangul}}))"
        ),
        _read_mixed,
    ),
    (
        regex.compile(
            rf"(?<!\p{{Hangul}}|\p{{Hangul}}\s)(?P<sign>{BELOW})?(?P<number>[일이사오"
            rf"구공]){AFTER_SYLLABLE}"
        ),
        _read_mixed,
    ),
    (
        regex.compile(
            rf"(?<!\p{{Hangul}})(?P<hundred>백|천)?\s?(?P<tens>{_any(NATIVE_TENS)})?\s?"
            rf"(?P<ones>하나|둘|셋|넷|다섯|여섯|일곱|여덟|아홉)?(?<=\p{{Hangul}}){MORE}{AFTER_KOREAN}(?<!백|천)"
        ),
        _read_native,
    ),
    (
        regex.compile(
            rf"(?<!\p{{Hangul}})(?P<hundred>백|천)?\s?(?P<tens>{_any(NATIVE_TENS)})?(?P<ones>한|두|세|네)"
            rf"(?=\s?(?:{COUNTERS})(?:{PARTICLES}|{COPULA}|짜리)?(?!\p{{Hangul}}))"
        ),
        _read_native,
    ),
    (
        regex.compile(
            rf"(?<![\p{{L}}\p{{N}}-])(?P<sign>{BELOW})?(?P<number>{THOUSANDS}|{HUNDREDS})(?:\spoint\s(?P<decimals>(?:{ONES}|zero)(?:\s(?:{ONES}|zero))*))?(?![\p{{L}}\p{{N}}]|-(?:{ONES}))"
        ),
        _read_english,
    ),
)

REWRITES: tuple[tuple[regex.Pattern[str], str], ...] = (
    (regex.compile(rf"百分之\s*{MARKED}"), rf"{OPEN}\1{CLOSE}%"),
    (regex.compile(rf"{MARKED}\s*(?:퍼센트|퍼 센트|percent\b|per cent\b)"), rf"{OPEN}\1{CLOSE}%"),
    (
        regex.compile(rf"{MARKED}\s*[點点时時]\s*(?:鐘|钟)?半|{MARKED}\s*시\s*반"),
        rf"{OPEN}\1\2:30{CLOSE}",
    ),
    (
        regex.compile(rf"{MARKED}\s*(?:[點点时時]|시)\s*{OPEN}(\d){CLOSE}\s*[分분]"),
        rf"{OPEN}\1:0\2{CLOSE}",
    ),
    (
        regex.compile(rf"{MARKED}\s*(?:[點点时時]|시)\s*{OPEN}(\d\d){CLOSE}\s*[分분]?"),
        rf"{OPEN}\1:\2{CLOSE}",
    ),
    (regex.compile(rf"half past {MARKED}"), rf"{OPEN}\1:30{CLOSE}"),
    (regex.compile(rf"quarter (past|to) {MARKED}"), rf"{OPEN}\1 \2{CLOSE}"),
    (
        regex.compile(
            rf"{OPEN}(?!-)([^{CLOSE}]*){CLOSE}(\s*(?:°c|°f|°|degrees?(?: celsius| fahrenheit)?)?"
            rf"\s*below (?:zero|freezing|{OPEN}0{CLOSE}))"
        ),
        rf"{OPEN}-\1{CLOSE}",
    ),
)
