"""Sentences, paragraphs, list items and words of text in Chinese, Korean and English."""

from __future__ import annotations

import regex

QUOTED = "[」』”’\"'＂]"
CLOSING = "」』”’\"'＂）)】》〉］]"
PAIRS = dict(zip("「『“（(《〈【［[", "」』”）)》〉】］]", strict=True))
ENDS = "。！？!?．｡‼⁇⁈⁉"
DOTS = r"\.+|…+"
# after one of these a full stop never ends a sentence
TITLES = frozenset(
    "mr mrs ms mx dr prof mt gen capt col lt maj sgt sen rep gov rev hon pres vs e.g i.e cf "
    "approx ca viz".split()
)
# after these it does so only before a word that begins a sentence
SHORT_FORMS = frozenset(
    "jr sr inc ltd co corp bros dept univ etc al ave blvd rd est esq tel ext misc incl excl a"
    "vg min "
    "max km cm kg mi hr hrs ft lb lbs oz sq jan feb mar apr jun jul aug sep sept oct nov dec "
    "mon tue wed thu fri "
    "a.m p.m ph.d m.d b.a m.a d.c u.s u.k u.s.a e.u u.n st".split()
)
BEFORE_NUMBERS = frozenset("no nos fig figs vol pp p ch sec art eq pop approx ca c est".split())
STARTERS = frozenset(
    "the a an it he she we they i you this that these those there here his her its our their "
    "my your "
    "in on at if when while after before then so but and or however for as what who why how where "
    "is are was were do does did can will let please no yes visit come enjoy one some many mo"
    "st all "
    "both each every today now also people everyone nobody".split()
)
SPEAKER = regex.compile(  # “가자!” 그가 말했다. "Stop!" Tom said.
    r"\s+(?:[^.!?…]*?(?:말했|말하|물었|외쳤|대답했|속삭였|소리쳤)"
    r"|(?:[\p{L}’']+\s){0,3}(?:said|says|asked|cried|replied|shouted|whispered|answered)\b)"
)
# a number between sentences: It is big. 2. It rains.
ITEM_IN_LINE = regex.compile(
    rf"(?:^|[{ENDS}]\s+|(?:[\p{{Han}}\p{{Hangul}}]|\p{{L}}{{3}})\.\s+)\d{{1,2}}$"
)
LIST_IN_LINE = regex.compile(r"(?<![\p{N}.])1\.\s.*(?<![\p{N}.])2\.\s")
BEGINNING = regex.compile(r"\s+[\"“'‘(*]*(\p{Lu}[\p{L}'’]*)")
NAMES = (  # with a final mark
    "Yahoo!", "Love Live!", "LoveLive!", "K-ON!", "Jeopardy!", "Wham!", "Oklahoma!", "Mamma Mia!",
    "BanG Dream!", "Moulin Rouge!", "Airplane!", "Joomla!", "Kahoot!", "Chips Ahoy!", "Toys R Us!",
)  # fmt: skip
DATE = regex.compile(  # 1446. 10. 9. and 10. 9.
    r"(?<!\d)\d{2,4}\.\s?\d{1,2}\.(?:\s?\d{1,2}\.)?|(?<![\d.])\d{1,2}\.\s?\d{1,2}\.(?=\s?\p{Hangul})"
)
EMOJI = r"[~～♪♫♡♥\p{So}\p{Sk}\uFE0F\u200D^]"
# a Korean sentence without a mark, before an emoji or laughter: 반가워요~ 저는 지훈이에요ㅎㅎ
SOFT_END = (
    rf"(?<=[요다죠까네니])\s?(?:{EMOJI}|[ㅋㅎㅠㅜ]{{2,}})+(?=\s)|(?<=[喔唷啦呢吧哦耶呀"
    rf"囉喵嘛])[~～]+(?=\s*\p{{Han}})|(?<=\p{{Han}})[~～]+(?=\s+\p{{Han}})"
)
MARK = regex.compile(rf"[{ENDS}]+|{DOTS}|{SOFT_END}")
SYMBOLS = "•＊·・‧∙⋅●○◉▪▫◦‣⁃※■□▣▶►▷▸▹◆◇◈❖★☆✦✧◎☐☑☒✅✔✓✗✘❌➤➜➔➡→⇒»›◾◼◽◻🔸🔹🔷🔶🔴🔵🟢🟡👉☞✿❀♣♠♦ㆍ"
BULLET = regex.compile(
    r"^[ \t　]*(?:[-*+–—＊－][ \t　]+|[ㅇo][ \t]+|-(?=[\p{Han}\p{Hangul}])"
    rf"|[{SYMBOLS}]\uFE0F?[ \t　]*)(?=\S)",
    regex.M,
)
PICTOGRAM = regex.compile(
    r"^[ \t　]*[\p{So}\p{Emoji_Presentation}]\p{Sk}?\uFE0F?[ \t　]*(?=[\p{L}\p{N}*])", regex.M
)
RULE = regex.compile(r"^[ \t　]*(?:([-*_=~—–─━＿＊·•◇☆★#])[ \t　]*)(?:\1[ \t　]*){2,}$", regex.M)
HAN_NUMBERS = "一二三四五六七八九十"
CIRCLED = {
    character: number
    for start in "①⑴⒈❶⓵㈠㊀"
    for number, character in enumerate(
        map(chr, range(ord(start), ord(start) + (20 if start in "①⑴⒈" else 10))), start=1
    )
}
NUMBER = regex.compile(
    r"^[ \t　]*(?:>[ \t]*)?(?:#{1,6}[ \t]+)?(?:\*\*|__)?"  # a heading, or bold
    r"(?:[（(\[【]?(\d{1,3})(?:[.．。)）\]】、:：](?!\d)|(?:번|단계)[.:)：]?(?=[ \t*])"
    r"|\uFE0F?\u20E3|번째[.:：])"
    rf"|([{''.join(CIRCLED)}])[.)]?"
    rf"|[（(]?([{HAN_NUMBERS}]{{1,3}})(?:[、.．：:](?![{HAN_NUMBERS}])|[)）])"
    rf"|(?:step|步驟|步骤|단계)[ \t]*(\d{{1,2}}|[{HAN_NUMBERS}]{{1,3}})[ \t]*[:：.、)—-]"
    rf"|第[ \t]?(\d{{1,2}}|[{HAN_NUMBERS}]{{1,3}})[ \t]?[步項项點点個个]驟?骤?[:：])"
    r"(?:\*\*|__)?[ \t　]*(?=\S)",
    regex.M | regex.I,
)
MARKERS = regex.compile(rf"(?:{NUMBER.pattern}|{BULLET.pattern})", regex.M | regex.I)


def sentences(text: str) -> list[str]:
    """The sentences of a text.

    The end of a line ends a sentence, so a title or a list item counts as one; the mark of an item
    is no sentence. A mark within a quotation or parenthesis that stands within a sentence ends
    nothing (「好。」他說。), nor does an ellipsis. Korean sentences in 요 or 다 may end with an
    emoji or a tilde instead of a mark.
    """
    found: list[str] = []
    for line in RULE.sub("", text).splitlines():
        rest = MARKERS.sub("", line)
        start = 0
        for match in MARK.finditer(rest):
            if match.start() < start:
                continue
            end = _end(rest, start, match.start(), match.end())
            if end is not None:
                found.append(rest[start:end])
                start = end
        found.append(rest[start:])
    return [sentence.strip() for sentence in found if regex.search(r"[\p{L}\p{N}]", sentence)]


def _end(line: str, begin: int, start: int, stop: int) -> int | None:
    """The end of the sentence line[begin:...] with the marks line[start:stop]; None if it
    continues."""
    if line[:stop].endswith(NAMES) and line[stop:].strip():
        return None
    after = regex.compile(f"[{regex.escape(CLOSING, special_only=False)}*_]*").match(line, stop)
    assert after is not None
    rest = line[after.end() :]
    if _within_brackets(line, begin, start, after.end()):
        return None
    closed = after[0].strip("*_")
    if regex.search(QUOTED, closed) and SPEAKER.match(rest):
        return None
    if closed and regex.match(r"[\p{L}\p{N}]|\s+\p{Ll}", rest):
        if regex.search(QUOTED, closed):
            return None
        if closed[0] in PAIRS.values() and not _opens_with_bracket(line[begin:start]):
            return None
    if line[start] in ".…" and not _full_stop(line, start, stop, rest):
        return None
    return int(after.end())


def _within_brackets(line: str, begin: int, mark: int, end: int) -> bool:
    """Whether the mark is in brackets or quotes that opened after the sentence's first word and
    close later in the line."""
    first = regex.search(r"[\p{L}\p{N}]", line[begin:])
    if first is None:
        return False
    waiting: list[str] = []
    for character in line[begin + first.start() : end]:
        if waiting and character == waiting[-1]:
            waiting.pop()
        elif character in PAIRS:
            waiting.append(PAIRS[character])
        elif character == '"':
            waiting.append('"')
    if line[begin : begin + first.start()].count('"') % 2 and waiting and waiting[0] == '"':
        waiting.pop(0)  # it closes the quotation that opened the sentence
    return any(character in line[end:] for character in waiting)


def _opens_with_bracket(sentence: str) -> bool:
    return sentence.strip()[:1] in PAIRS


def _full_stop(line: str, start: int, stop: int, rest: str) -> bool:
    """Whether the dots line[start:stop] end a sentence, not a number, a short form or a pause.

    `rest` is the line after them and what they close.
    """
    if not rest.strip():
        return True
    if not regex.match(rf"[\s\p{{Han}}\p{{Hangul}}「『“（(]|{EMOJI}", rest):  # 3.14, example.com
        return False
    begins = BEGINNING.match(rest)
    starts = begins is not None and begins[1].lower() in STARTERS
    if stop - start > 1 or line[start] == "…":
        return starts
    for date in DATE.finditer(line):
        if date.start() < start < date.end() and regex.match(r"\s?[\p{N}\p{Hangul}]", rest):
            return False
    if ITEM_IN_LINE.search(line[:start]):
        return False
    if LIST_IN_LINE.search(line) and regex.search(r"(?<![\p{N}.])\d{1,2}$", line[:start]):
        return False
    found = regex.search(r"[\p{Latin}\p{M}.]*$", line[:start])
    assert found is not None
    word = found[0].lower()
    if word in BEFORE_NUMBERS and found[0] != "no" and regex.match(r"\s*\d", rest):  # No. 5
        return False
    if word in TITLES:
        return False
    if regex.match(r"\s+\p{Ll}", rest) and regex.search(r"\p{Lu}", line):  # 40 deg. outside
        return False
    if word == "etc":
        return begins is not None
    if word in SHORT_FORMS or regex.fullmatch(r"(?!I$)\p{Lu}|(\p{L}\.)+\p{L}", found[0]):
        return starts
    return True


def paragraphs(text: str) -> list[str]:
    """The parts between blank lines or rules; every line if there is no blank one."""
    text = RULE.sub("", "\n".join(text.splitlines())).strip()
    divider = r"\n[ \t　]*\n" if regex.search(r"\n[ \t　]*\n", text) else r"\n"
    return [part.strip() for part in regex.split(divider, text) if part.strip()]


def bullets(text: str) -> list[str]:
    """The lines that begin with a bullet such as - * • · ■ ▶ ✅, or with an emoji if several do."""
    lines = [line for line in text.splitlines() if not RULE.match(line)]
    pictures = [line for line in lines if PICTOGRAM.match(line) and not NUMBER.match(line)]
    return [
        line for line in lines if BULLET.match(line) or (len(pictures) > 1 and line in pictures)
    ]


def numbers(text: str) -> list[int]:
    """The numbers at the start of lines, such as `1.`, `(1)`, `1、`, `①`, `1번` or `一、`.

    Numbers of nested lists are left out.
    """
    found = [
        (len(match[0]) - len(match[0].lstrip(" \t")), _number(match))
        for match in NUMBER.finditer(text)
    ]
    # a reply is stripped, so its first line may have lost the indentation of the others
    outermost = min(
        (indent for indent, _ in (found[1:] if NUMBER.match(text) else found)), default=0
    )
    return [
        number for place, (indent, number) in enumerate(found) if place == 0 or indent == outermost
    ]


def _number(match: regex.Match[str]) -> int:
    number = next(group for group in match.groups() if group)
    if number in CIRCLED:
        return CIRCLED[number]
    if number.isdecimal():
        return int(number)
    tens, ten, ones = number.rpartition("十")
    return (HAN_NUMBERS.find(tens) + 1 if tens else 1) * 10 * bool(ten) + (
        HAN_NUMBERS.find(ones) + 1 if ones else 0
    )


def words(text: str) -> list[str]:
    """What is between spaces and has a letter or digit (in Korean: 어절); useless for Chinese."""
    return [word for word in text.split() if regex.search(r"[\p{L}\p{N}]", word)]


def characters(text: str) -> list[str]:
    """Characters as people see them, with punctuation and without white space."""
    return [character for character in regex.findall(r"\X", text) if not character.isspace()]
