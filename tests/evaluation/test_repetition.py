"""Repetition: high for a model that runs in circles, low for lists, tables, rules and refrains."""

import pytest

from cpt_merge.evaluation.repetition import repetition

CIRCLES = [
    "하하" * 20,
    "我很好。" * 12,
    "I like it. " * 8,
    "이 문장은 반복됩니다. " * 6,
    "哈" * 60,
    "!" * 80,
    "😀" * 40,
    "-" * 400,
    "yes " * 30,
    "1. 사과\n" * 12,
    "答案是七。\n\n" * 10,
]
HARMLESS = [
    "",
    "abc",
    "哈哈哈",
    "\n".join(f"{n}月：{n + 10}度" for n in range(1, 13)),
    "\n".join(f"第{n}題：{n * 7}分" for n in range(1, 20)),
    "\n".join(f"- {n}일차: {n}km 걷기" for n in range(1, 15)),
    "\n".join(f"{n} x 7 = {n * 7}" for n in range(1, 13)),
    "一\n" + "-" * 60 + "\n二\n" + "-" * 60 + "\n三\n" + "* * *\n四\n" + "═" * 5,
    "| 月 | 溫度 |\n|---|---|\n" + "\n".join(f"| {n} | {n + 9} |" for n in range(1, 13)),
    "산에는 꽃 피네 꽃이 피네\n갈 봄 여름 없이 꽃이 피네\n산에 산에 피는 꽃은 저만치 혼자서 피어 있네",
    "浪花輕輕拍打岸邊，月光灑在海上。\n風吹過沙灘，帶來遠方的歌。\n浪花輕輕拍打岸邊，\n我聽見夜在呼吸。",
    "The sun is warm. The sea is calm. The day is long, and so we walk along the shore.",
]


@pytest.mark.parametrize("text", CIRCLES)
def test_circles(text):
    assert repetition(text) > 0.5


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless(text):
    assert repetition(text) < 0.15


def test_the_value_is_the_share_of_runs_that_occurred_before():
    assert repetition("a b c d e f a b c d e f") == pytest.approx(1 - 6 / 7)
    assert repetition("하하하하하하하하") == pytest.approx(1 - 1 / 3)
