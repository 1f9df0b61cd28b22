"""How a text is cut into sentences, paragraphs, items and characters, on real sentences of each language."""

import pytest

from cpt_merge.evaluation.checks.segments import (
    bullets,
    characters,
    numbers,
    paragraphs,
    sentences,
    words,
)

SENTENCES = [
    # Chinese: full-width marks, quotations, ellipsis, numbers
    ("台北是台灣的首都。夜市很熱鬧！你去過嗎？", 3),
    ("他說：「好。」然後就走了。", 1),
    ("他說：「好。」", 1),
    ("「你好。」她笑著說：「今天真熱！」", 1),
    ("“走吧！”他喊道。大家都站了起来。", 2),
    ("真的嗎？！我不信。", 2),
    ("我想……還是算了吧。", 1),
    ("圓周率約是 3.14，不是 3。", 1),
    ("《颱風夜》\n風很大。", 2),  # a title is one
    ("西安是古都，有很多名胜古迹；游客很多", 1),
    # Korean: endings with and without a mark, a full stop without a space behind it
    ("부산은 바다가 아름답습니다. 여름에 사람이 많아요! 가 보셨어요?", 3),
    ("안녕하세요.반갑습니다.", 2),
    ('그는 "좋아요."라고 말했어요.', 1),
    ("온도는 36.5도예요. 정상이에요.", 2),
    ("글쎄요... 잘 모르겠어요.", 1),
    ("안녕하세요", 1),
    # English: abbreviations, initials, decimals, quotations
    ("Dr. Smith paid 3.50 dollars. He left.", 2),
    ("We met J. R. Ewing, e.g. in Dallas.", 1),
    ('"Stop!" she cried. "Now."', 2),
    ("Visit example.com today. It works.", 2),
    ("The U.S. economy grew. So did ours.", 2),
    ("Mt. Fuji is No. 5. I said no. Apple Inc. grew.", 3),
    ("He said no. 7 people left.", 2),
    ("（他笑了。）下一句。", 2),
    # lists and rules
    ("1. 燒水。\n2. 放茶葉。\n3. 等三分鐘。", 3),
    ("- one\n- two", 2),
    ("A\n---\nB", 2),
    ("", 0),
    ("。。！", 0),
    ("👍", 0),
]


@pytest.mark.parametrize(("text", "expected"), SENTENCES)
def test_sentences(text, expected):
    assert len(sentences(text)) == expected, sentences(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一\n\n二\n\n三", 3),
        ("一\n二\n三", 3),  # without a blank line each line is one
        ("一\n二\n\n三", 2),
        ("一\n　\n二", 2),  # a line with an ideographic space is blank
        ("one\n\n***\n\ntwo", 2),
        ("하나", 1),
        ("\n\n", 0),
    ],
)
def test_paragraphs(text, expected):
    assert len(paragraphs(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("• 蚵仔煎\n•臭豆腐\n· 滷肉飯", 3),
        ("- 사과\n* 배\n+ 감", 3),
        ("  ● 西瓜", 1),
        ("**粗體** 開頭的一行", 0),
        ("*強調* 開頭的一行", 0),
        ("-5 度", 0),
        ("---", 0),
        ("- - -", 0),
        ("他說 - 好", 0),
        ("1. one", 0),
    ],
)
def test_bullets(text, expected):
    assert len(bullets(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. 燒水\n2. 放茶葉", [1, 2]),
        ("１．燒水\n２．放茶葉", [1, 2]),  # full width
        ("1、洗菜\n2、切菜", [1, 2]),
        ("(1) one\n2) two\n③ 셋", [1, 2, 3]),
        ("1번. 물\n2번. 면", [1, 2]),
        ("**1. 燒水**\n水要滾。\n**2.** 放茶葉", [1, 2]),
        ("### 1. One\n### 2. Two", [1, 2]),
        ("1. one\n   1. inner\n   2. inner\n2. two", [1, 2]),
        ("一、燒水\n二、放茶葉\n（三）喝", [1, 2, 3]),
        ("九、a\n十、b\n十一、c\n二十、d\n二十一、e", [9, 10, 11, 20, 21]),
        ("1. a\n 2. b\n 3. c", [1, 2, 3]),  # a stripped reply has lost the first one's indent
        ("一樓很冷", []),
        ("七、八個人站在門口。", []),
        ("3.14 是圓周率", []),
        ("2024. 올해", []),
        ("10:30 出發", []),
    ],
)
def test_numbered_items(text, expected):
    assert numbers(text) == expected


def test_characters_are_what_people_see_without_white_space():
    assert len(characters("今天，很好。\n")) == 6
    assert len(characters("안녕 하세요")) == 5
    assert len(characters("한")) == 1  # one syllable of three code points
    assert len(characters("👨‍👩‍👧 e\u0301")) == 2


def test_words_are_between_spaces_and_have_a_letter():
    assert words("오늘은 날씨가 참 좋다 .") == ["오늘은", "날씨가", "참", "좋다"]
    assert words("It's 3 o'clock - now") == ["It's", "3", "o'clock", "now"]
