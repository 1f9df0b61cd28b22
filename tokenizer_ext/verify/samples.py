"""The text on which an extended tokenizer is proven and measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import regex

from cpt_merge.core.languages import find_language, script_pattern
from cpt_merge.data.sources import Corpus
from cpt_merge.tokenizer_ext.learn.word_counts import read_documents

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
    " ", "  ", "\n", "\t", " \n ", "the", " model", "Tokenizer", "2024", "3.14", "x_1",
    "(", ")", "</p>", "{", "}", "=",
    "，", "。", "「", "」", "！", "％", "Ａ", "①", "é", "e\u0301", "n\u0303", "🙂", "👩‍👧",
    "\u200d", "\u200b", "\ufeff", "\u3000", "\x00", "\x07", "\x7f", "\ue000", "\u2581", "Ġ",
    "Привет", "שלום", "สวัส", "ひらがな", "カタカナ", "ー", "\u1112\u1161\u11ab",
    "ㅋㅋㅋ", "哈哈哈哈",
    "々", "〇", "𠮷", "\U0002f800",
]  # fmt: skip

# A few plain sentences, for languages of which the user has no text. They show how an extension
# changes the languages that share its scripts, and they give `cpt-merge check-tokenizer` something
# to read.
SENTENCES: dict[str, list[str]] = {
    "en": [
        "The library opens at nine, and it closes at six on weekdays.",
        "She didn't say why; perhaps she'd forgotten her keys (again).",
        "Prices rose by 3.5% in 2023, to about $1,200 per tonne.",
        "Please send the report to j.smith@example.org before Friday.",
        "If it rains tomorrow, we'll stay at home and read.",
        'He asked, "Is this seat taken?" and sat down anyway.',
        "Water boils at 100 °C at sea level.",
        "Two of the three bridges were closed for repairs last winter.",
    ],
    "zh_tw": [
        "圖書館早上九點開門，平日晚上六點關門。",
        "她沒有說明原因，也許又忘了帶鑰匙。",
        "二〇二三年的價格上漲了百分之三點五。",
        "請在星期五以前把報告寄給我們。",
        "如果明天下雨，我們就留在家裡看書。",
        "他問：「這個位子有人坐嗎？」然後就坐下來了。",
        "水在海平面上加熱到一百度會沸騰。",
        "去年冬天，三座橋之中有兩座因為整修而關閉。",
    ],
    "zh_cn": [
        "图书馆早上九点开门，平日晚上六点关门。",
        "她没有说明原因，也许又忘了带钥匙。",
        "二〇二三年的价格上涨了百分之三点五。",
        "请在星期五以前把报告寄给我们。",
        "如果明天下雨，我们就留在家里看书。",
        "他问：“这个座位有人坐吗？”然后就坐下来了。",
        "水在海平面上加热到一百度会沸腾。",
        "去年冬天，三座桥之中有两座因为维修而关闭。",
    ],
    "ja": [
        "図書館は朝九時に開き、平日は夕方六時に閉まります。",
        "彼女は理由を言いませんでした。また鍵を忘れたのかもしれません。",
        "二〇二三年には価格が三・五パーセント上がりました。",
        "金曜日までに報告書を送ってください。",
        "明日雨が降ったら、家で本を読みましょう。",
        "「この席は空いていますか」と聞いて、彼は座りました。",
        "海面の高さでは水は百度で沸騰します。",
        "コーヒーとケーキを二つずつお願いします。",
    ],
    "ko": [
        "도서관은 아침 아홉 시에 열고 평일에는 저녁 여섯 시에 닫습니다.",
        "그녀는 이유를 말하지 않았다. 아마 또 열쇠를 잊었을 것이다.",
        "2023년에 가격이 3.5퍼센트 올랐습니다.",
        "금요일까지 보고서를 보내 주시기 바랍니다.",
        "내일 비가 오면 집에서 책을 읽읍시다.",
        '그는 "이 자리 비었나요?" 하고 묻고는 앉았다.',
        "바닷가에서는 물이 백 도에서 끓습니다.",
        "지난겨울에는 다리 셋 가운데 둘이 수리 때문에 닫혀 있었다.",
    ],
}


@dataclass(frozen=True)
class Samples:
    """Texts of several kinds."""

    texts: dict[str, list[str]]  # held-out documents by language, or files by name
    sentences: dict[str, list[str]]  # by language, for languages without `texts`
    plain: list[str]  # the part of all this without a letter of the learnt scripts
    mixed: list[str]  # random mixtures of new pieces and everything else
    scripts: tuple[str, ...]  # the learnt ones

    @property
    def everything(self) -> list[str]:
        """All texts, the documents first."""
        named = [*self.texts.values(), *self.sentences.values()]
        return [*(text for texts in named for text in texts), *self.plain, *self.mixed]


def take_samples(
    texts: dict[str, list[str]], scripts: tuple[str, ...], pieces: Sequence[str]
) -> Samples:
    """Samples for a tokenizer with new `pieces` (as text) of `scripts`."""
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
        tag: list(read_documents(corpus, tag, "heldout", HELDOUT_CHARACTERS))
        for tag in corpus.languages()
    }


def scripts_of(languages: Iterable[str]) -> tuple[str, ...]:
    """The scripts that the languages are written in."""
    return tuple(
        dict.fromkeys(script for tag in languages for script in find_language(tag).scripts)
    )


def _plain_parts(text: str, scripts: tuple[str, ...]) -> list[str]:
    """The text if it has no character of the scripts, else its lines that have none."""
    letters: regex.Pattern[str] = script_pattern(scripts)
    if not letters.search(text):
        return [text]
    return [line for line in text.splitlines() if line.strip() and not letters.search(line)]


def mixed_texts(pieces: Sequence[str], number: int) -> list[str]:
    """Random strings of pieces, other scripts, emoji, marks, spaces and control characters; always
    the same ones.
    """
    random = Random(0)
    fragments = [*FRAGMENTS, *CODE]
    return [
        "".join(
            random.choice(pieces if pieces and random.random() < 0.5 else fragments)
            for _ in range(random.randint(1, 10))
        )
        for _ in range(number)
    ]
