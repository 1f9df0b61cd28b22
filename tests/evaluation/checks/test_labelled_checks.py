"""The project's labelled replies: the right verdict of one check each."""

import json
from pathlib import Path

import pytest

from cpt_merge.evaluation.checks import parse_check

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / "labelled_checks.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
# Chinese has no marks between words: a key like 牛 is in 牛蒡
NOT_KNOWABLE = {"牛蒡炒肉絲", "牛奶燉飯"}


def passes(row):
    return parse_check({"name": row["check"], **row["arguments"]}, "").passes(row["reply"])


def test_labelled_replies():
    wrong = [row for row in ROWS if passes(row) != row["passes"]]
    assert {row["reply"] for row in wrong} == NOT_KNOWABLE


@pytest.mark.parametrize(
    ("check", "arguments", "reply", "right"),
    [
        ("contains", {"words": ["개"]}, "번개가 쳤어요.", False),
        ("contains", {"words": ["개"]}, "저는 개를 좋아해요.", True),
        ("contains", {"words": ["개"]}, "사과 3개", True),
        ("contains_any", {"words": ["영"]}, "답은 영입니다.", True),
        ("contains", {"words": ["十"]}, "二十個", False),
        ("contains", {"words": ["七"]}, "有七個。", True),
        ("ends_with", {"text": "喵"}, "你好喵~ 🎵♪", True),
        ("ends_with", {"text": "🐱"}, "你好🐱", True),
        ("ends_with", {"text": "喵"}, "喵喵你好", False),
        ("json_only", {}, '{"a": NaN}', False),
        ("json_only", {}, '```Json\n{"a": 1}\n```', True),
        ("bullets", {"exactly": 2}, "✅ 一\n✅ 二", True),
        ("sections", {"heading": "結論", "exactly": 1}, "1. 「結論」\n文字", True),
        ("sections", {"heading": "1.", "exactly": 2}, "1. 一\n文\n1. 二", True),
        ("sentences", {"exactly": 2}, "She has a Ph.D. He has none.", True),
        ("sentences", {"exactly": 2}, "2024. 5. 1. 출시되었다. 좋다.", True),
    ],
)
def test_siblings(check, arguments, reply, right):
    assert passes({"check": check, "arguments": arguments, "reply": reply}) is right
