"""What a judge's answer says: marks and choices in the forms in which models write them.

Forms have ranks, and the last one of the highest rank that an answer holds is its verdict:

    marked    a line with a label (`SCORE: 7/10`, `**評分**：8`, `Final verdict: [A]`), `[[7]]`,
              `\\boxed{7}`, `<score>7</score>`, or JSON with such a key
    bare      the first or the last line alone: `7점`, `8 out of 10`, `Unsafe (insult)`
    told      the last sentence: `I rate it 8 out of 10.`, `The reply is unsafe.`

A label may have a remark behind its value, but no second value: `SCORE: 7 or 8` is no verdict.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import regex

SCALE = 10  # of marks
LONGEST = 10_000  # characters that are read
PATIENCE = 5.0  # seconds for a pattern of a recipe

_FLAGS = regex.MULTILINE | regex.IGNORECASE
_THOUGHTS = regex.compile(r"<think>.*?(?:</think>|\Z)|\A.*</think>", regex.DOTALL)
_STYLE_TAGS = regex.compile(r"</?(?:b|strong|i|em|u|p|br|span|code)\b[^<>]*>", regex.IGNORECASE)
_TAGGED = regex.compile(r"<(\w+)>\s*([^<>]*?)\s*</\1>")
_BOXED = regex.compile(r"\\boxed\s*\{([^{}]*)\}")
_LATEX = regex.compile(r"\\(?:text|textbf|mathbf|mathrm)\s*\{([^{}]*)\}|[$]")
_EMPHASIS = regex.compile(r"[*`\p{Cf}\p{So}\ufe0f\u20e3]|(?<![\p{L}\p{N}])_+|_+(?![\p{L}\p{N}])")

_START = r"""^(?:[^\S\n]|[>#|•+"'“‘{,(\[【「『\p{So}–—-])*+(?:\d+[.)]\s+)?"""
# or after a sentence or an item
_LEAD = rf"""(?:{_START}|(?<=[.!?。;,){{]\s{{0,2}}['"“]?)(?=[^:=\n]{{0,40}}[:=]))"""
_MODIFIERS = (
    r"(?:(?:the|my|overall|final|total|最終|最终|最後|最后|綜合|综合|總體|总体|整體|整体|總|总|我的|"
    r"최종|종합|총|전체)[\s_-]*){0,3}"
)
_MARK_LABELS = (
    "score|rating|mark|grade|評分|评分|分數|分数|得分|給分|给分|打分|總分|总分|評價|评价|總評|总评|"
    "점수|평점|평가|총점|スコア|点数|評価"
)
_CHOICE_LABELS = (
    "verdict|winner|judge?ment|decision|preference|choice|conclusion|answer|result|better|"
    "classification|label|safety|assessment|判定|結論|结论|裁決|裁决|判斷|判断|結果|结果|勝者|胜者|答案|選擇|选择|"
    "판정|결론|답변?|판단|결과|평결|선택|승자"
)
_NOTE = r"(?:\s*\([^()\n]{0,40}\))?"
_CLOSE = r"""["'”’」』】\])>}]*"""
_BETWEEN = (
    r"""["'”’]?\s{0,2}(?:[:=|]|[-=]>|→|is\b|was\b|는|은|が|は|為|为|是)?\s{0,2}[:|]?\s{0,2}"""
    r"""["'“‘「『【\[(<]*\s*"""
)
_NUMBER = r"(?<![\d.,])(?P<value>\d+(?:\.\d+)?)(?!\d)"
_UNIT = r"(?:points?|pts|marks?|分|點|点|점)"
_OUT_OF = rf"(?:(?:/|of|out\s+of)\s*{SCALE}(?:\.0+)?(?!\d|\.\d)\s*{_UNIT}?)"
_OUT_OF_FIRST = (
    rf"(?:{SCALE}\s*점\s*(?:만점)?\s*(?:에서?|중에?|으로)?\s*|"
    rf"(?:滿分|满分)\s*[為为是]?\s*{SCALE}\s*分?\s*[,:]?\s*[給给得]?\s*)?"
)
_POLITE = (
    r"(?:\s*(?:입니다|이에요|예요|임|です|[을를]?\s*(?:드립니다|드리겠습니다|주겠습니다|줍니다)))?"
)
_MARK = rf"{_OUT_OF_FIRST}{_NUMBER}\s*(?:{_UNIT}\s*)?{_OUT_OF}?{_POLITE}{_CLOSE}"
_WITH_UNIT = rf"{_OUT_OF_FIRST}{_NUMBER}\s*(?:{_UNIT}\s*{_OUT_OF}?|{_OUT_OF}){_POLITE}{_CLOSE}"
_SECOND = r"\s*[(]?(?:or|to|and|maybe|perhaps|或者?|到|至|~|또는|내지|혹은|/)?\s*"
_SECOND_MARK = rf"{_SECOND}\d+(?:\.\d+)?\s*(?:{_OUT_OF}|{_UNIT})?{_CLOSE}[.!。]*\s*$"
_OR = r"\s*(?:[(,/]|or\b|and\b|或|和|또는)+\s*"
_END = rf"\s*[.!。,|]*{_CLOSE}[,;]?\s*$"
_GIVE = r"(?:i(?:'d|\s+would)?\s+(?:give|rate|score)\s+(?:\w+\s+){0,3}|我?[給给][予出]?\s*)?"
_TOLD = r"^.*\b(?:give|rate|score|grade|deserves?|earns?|merits?|gets?)\b[^\n]*?"
_NEGATED = r"(?!.*(?:\bnot\b|n't\b|\bnever\b))"

_SPELLINGS = {
    "A": r"(?:(?:assistant|model|response|answer|reply|助手|助理|模型|어시스턴트|모델)[\s_-]*)?A"
    r"(?:\s*>+\s*B)?",
    "B": r"(?:(?:assistant|model|response|answer|reply|助手|助理|模型|어시스턴트|모델)[\s_-]*)?B"
    r"(?:\s*>+\s*A)?",
    "tie": r"(?:(?:a|an)\s+)?(?:tie|draw)|tied|equal(?:ly\s+good)?|no\s+winner|A\s*=\s*B|"
    r"both(?:\s+(?:are\s+)?(?:equal(?:ly\s+good)?|good|bad))?|"
    r"平手|平局|不相上下|一樣好|一样好|무승부|동점|동등",
    "safe": r"safe|安全的?|無害|无害|안전(?:함|합니다|하다|한)?|무해",
    "unsafe": r"unsafe|not\s+safe|un-safe|harmful|不安全的?|有害的?|불안전|유해|"
    r"안전하지\s*않(?:음|습니다|다|은)|위험(?:함|합니다|하다|한)?",
}
_BRACKETED_ONLY = {"tie": "|C"}  # MT-bench's [[C]]
_BETTER = (
    r"(?:\s*(?:is\s+(?:the\s+)?(?:better|winner|best)(?:\s+\w+)?|wins|"
    r"更好|較好|较好|勝出|胜出|가\s*더\s*\S+))?"
)


def plain(answer: str) -> str:
    """An answer without thoughts, emphasis and full width; boxes and tags become brackets and
    labels. The middle of a very long one is left out."""
    answer = _THOUGHTS.sub("", answer)
    if len(answer) > LONGEST:
        answer = f"{answer[: LONGEST // 10]}\n{answer[-LONGEST:]}"
    text = unicodedata.normalize("NFKC", answer)
    text = _STYLE_TAGS.sub("", _LATEX.sub(r"\1", _BOXED.sub(r"[[\1]]", text)))
    return str(_EMPHASIS.sub("", _TAGGED.sub(r"\n\1: \2\n", text)))


def mark_in(answer: str) -> float | None:
    """The mark that an answer gives, on whatever scale; None if it gives none."""
    text = plain(answer)
    tail = _tail(_SECOND_MARK)
    label = rf"{_MODIFIERS}(?:{_MARK_LABELS}){_NOTE}{_BETWEEN}"
    line, brackets = rf"{_LEAD}{label}{_MARK}{tail}", rf"\[\[\s*(?:{label})?{_MARK}\s*\]\]"
    found = [*_found(line, text), *_found(brackets, text)]
    for place, value in _json_values(text, _MARK_LABELS):
        said = regex.fullmatch(rf"\s*{_MARK}\s*", str(value), _FLAGS)
        if said and not isinstance(value, bool):
            found.append((place, said["value"]))
    if not found:
        alone = rf"{_START}{_GIVE}{_WITH_UNIT}(?:{_END}|\s*\()"
        only = regex.fullmatch(rf"[\s\[【(]*{_NUMBER}{_END}", text.strip(), _FLAGS)
        found = [(0, only["value"])] if only else _found_at_ends(alone, text)
    if not found:
        found = _found_at_ends(rf"{_NEGATED}{_TOLD}{_NUMBER}\s*{_OUT_OF}{_END}", text, last=True)
    return float(_last(found)) if found else None


def choice_in(answer: str, choices: Sequence[str]) -> str | None:
    """The one of `choices` that an answer names; None if it names none."""
    text = plain(answer)
    spelled = {choice: _SPELLINGS.get(choice, regex.escape(choice)) for choice in choices}
    any_of = "|".join(spelled.values())
    value = rf"(?P<value>{any_of})(?![A-Za-z0-9_]){_BETTER}{_POLITE}{_CLOSE}"
    tail = _tail(rf"{_OR}(?:{any_of})(?![A-Za-z0-9_])")
    label = rf"{_MODIFIERS}(?:{_CHOICE_LABELS}){_NOTE}{_BETWEEN}"
    in_brackets = "".join(_BRACKETED_ONLY.get(choice, "") for choice in choices)
    found = [
        *_found(rf"{_LEAD}{label}{value}{tail}", text),
        *_found(rf"\[\[\s*(?:{label})?(?P<value>{any_of}{in_brackets})\s*\]\]", text),
        *(
            (place, _truth(key, said, choices))
            for place, key, said in _json_items(text)
            if regex.fullmatch(
                rf"{_MODIFIERS}(?:{_CHOICE_LABELS}|(?:is_?)?(?:un)?safe)", key, _FLAGS
            )
        ),
    ]
    if not found:
        letters = len(choices[0]) == 1  # which may head a paragraph as well
        alone = rf"{_START}{value}{_END if letters else tail}"
        found = _found_at_ends(alone, text, last=letters)
    if not found and set(choices) == {"safe", "unsafe"}:
        told = rf"^.*(?:\bis\s+|\bas\s+|是){value}{_END}"
        found = _found_at_ends(told, text, last=True)
    if not found:
        return None
    said = _last(found)
    return next((one for one in choices if _is_spelled(said, one, spelled[one])), None)


def by_pattern(answer: str, pattern: str) -> str | None:
    """What the group `verdict`, or the first one, of a recipe's pattern holds at its last match.

    Raises `TimeoutError` for a pattern that takes too long.
    """
    said = _THOUGHTS.sub("", answer)
    found = list(regex.finditer(pattern, said, regex.MULTILINE, timeout=PATIENCE))
    if not found:
        return None
    last = found[-1]
    value = last["verdict"] if "verdict" in last.groupdict() else last[1]
    return None if value is None else unicodedata.normalize("NFKC", value).strip()


def named_choice(said: str, choices: Sequence[str]) -> str | None:
    """The choice that a text is, in any of its spellings."""
    spelled = ((one, _SPELLINGS.get(one, regex.escape(one))) for one in choices)
    return next((one for one, spelling in spelled if _is_spelled(said, one, spelling)), None)


def _is_spelled(said: str, choice: str, spelling: str) -> bool:
    forms = spelling + _BRACKETED_ONLY.get(choice, "")
    return regex.fullmatch(rf"\s*(?:{forms})\s*", said, _FLAGS) is not None


def _tail(second: str) -> str:
    """The end of a line, or a remark that does not begin with a second value."""
    return (
        rf"(?!{second})\s*(?:$|[|]|[.!,;:。、–—-]+(?![\d])(?!{second})[^\n]*$|\([^\n]*$|"
        r"(?:because|since|for|as)\b[^\n]*$)"
    )


def _found(pattern: str, text: str) -> list[tuple[int, str]]:
    """(place, value) of every match."""
    return [(one.end("value"), one["value"]) for one in regex.finditer(pattern, text, _FLAGS)]


def _found_at_ends(pattern: str, text: str, last: bool = False) -> list[tuple[int, str]]:
    """The same, in the first and the last line (`last`: only there)."""
    lines = [line for line in text.splitlines() if line.strip()]
    ends = lines[-1:] if last else [*lines[:1], *lines[-1:]]
    return [
        (place, one["value"])
        for place, line in enumerate(ends)
        if (one := regex.search(pattern, line, _FLAGS))
    ]


def _last(found: Sequence[tuple[int, str]]) -> str:
    """The value at the last place; of several there, the one that was found last."""
    return sorted(found, key=itemgetter(0))[-1][1]


def _json_values(text: str, labels: str) -> Iterator[tuple[int, Any]]:
    for place, key, value in _json_items(text):
        if regex.fullmatch(rf"{_MODIFIERS}(?:{labels})", key, _FLAGS):
            yield place, value


def _json_items(text: str) -> Iterator[tuple[int, str, Any]]:
    """(place, key, value) of every JSON object in a text; the outermost object counts last."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            for key, inner in _items(value):
                yield end, key, inner
        start = text.find("{", end)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _items(inner)
        yield from ((str(name), one) for name, one in value.items())


def _truth(key: str, said: Any, choices: Sequence[str]) -> str:
    """A JSON value as text; `{"safe": false}` is unsafe."""
    if isinstance(said, bool) and key.casefold().endswith("safe"):
        return choices[int(said == ("unsafe" in key.casefold()))]
    return str(said)
