"""Labelled replies: the right verdict of one check each, on the project's set and on our own."""

import json
from pathlib import Path

import pytest

from cpt_merge.evaluation.checks import parse_check


def rows(name):
    lines = (Path(__file__).parent / name).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def passes(row):
    return parse_check({"name": row["check"], **row["arguments"]}, "").passes(row["reply"])


@pytest.mark.parametrize("name", ["labelled_checks.jsonl", "labelled_further.jsonl"])
def test_labelled_replies(name):
    assert [row for row in rows(name) if passes(row) != row["passes"]] == []


@pytest.mark.parametrize(
    ("check", "arguments", "reply", "right"),
    [
        ("contains", {"words": ["십"]}, "이십 개예요.", False),
        ("contains", {"words": ["十"]}, "二十個", False),
        ("ends_with", {"text": "🐱"}, "你好🐱", True),
        ("sections", {"heading": "1.", "exactly": 2}, "1. 一\n文\n1. 二", True),
        ("sentences", {"exactly": 2}, "She has a Ph.D. He has none.", True),
        ("sentences", {"exactly": 2}, "2024. 5. 1. 출시되었다. 좋다.", True),
    ],
)
def test_siblings(check, arguments, reply, right):
    assert passes({"check": check, "arguments": arguments, "reply": reply}) is right
