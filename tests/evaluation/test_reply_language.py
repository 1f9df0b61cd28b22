"""Verdicts on 524 labelled replies, and how long they take.

`replies_by_language.jsonl` holds replies that are tricky on purpose, by language and kind. Those of
kind `shared case` are the project's labelled cases, the others were written for this test.
"""

import json
import time
from pathlib import Path

import pytest

from cpt_merge.evaluation.chinese import other_script_characters
from cpt_merge.evaluation.reply_language import is_in_language, without_code

LABELLED = [
    json.loads(line)
    for line in (Path(__file__).parent / "replies_by_language.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


def test_labelled_replies():
    wrong = [
        row
        for row in LABELLED
        if is_in_language(row["reply"], row["language"]) != row["in_language"]
    ]
    assert not wrong


def test_labels_of_each_language_are_balanced():
    for language in ("zh_tw", "zh_cn", "zh_hk", "ko", "en", "ja"):
        labels = [row["in_language"] for row in LABELLED if row["language"] == language]
        assert len(labels) >= 35
        assert 0.4 <= sum(labels) / len(labels) <= 0.7


@pytest.mark.parametrize("text", ["昇", "囧", "瞭", "著名", "乾坤", "喆", "后里"])
def test_characters_of_both_chinese_scripts(text):
    assert not other_script_characters(text, "zh_cn") + other_script_characters(text, "zh_tw")


def test_taiwans_standard_forms_are_no_simplified_ones():
    """OpenCC's dictionary replaces them by forms that hardly anybody writes: 羣, 牀."""
    assert not other_script_characters("群眾在床上，山峰的秘密，佳肴發霉", "zh_tw")
    assert other_script_characters("户口、温度、什么", "zh_tw") == 3
    assert other_script_characters("户口、温度", "zh_hk") == 0


@pytest.mark.parametrize(
    ("text", "language", "verdict"),
    [
        ("สวัสดีครับ นี่คือคำตอบ", "th_Thai", True),
        ("This is the answer.", "th_Thai", False),
        ("Это ответ на ваш вопрос.", "ru_Cyrl", True),
        ("Это ответ на ваш вопрос.", "en", False),
        ("你好", "yue_Hant", True),
    ],
)
def test_other_languages_are_told_apart_by_their_script(text, language, verdict):
    assert is_in_language(text, language) is verdict


def test_code_addresses_and_formulas_are_left_out():
    text = "看 `git log` 和 https://a.b/c?d=e，寄到 me@example.com，$a^2$。\n```py\nx = 1\n```\n"
    assert without_code(text).split() == ["看", "和", "，寄到", "，", "。"]


@pytest.mark.parametrize("unit", ["a-", "a.", "(", "`", "「", "$a", "/a", "<a ", "a@", "~~~\n"])
def test_a_reply_that_repeats_itself_takes_no_longer_than_its_generation(unit):
    started = time.perf_counter()
    is_in_language(unit * 4000, "zh_tw")
    assert time.perf_counter() - started < 2  # 0.05 s here; a quadratic pattern took 10 s and more
