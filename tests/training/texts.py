"""Texts in which words, spaces and marks meet in every way."""

TEXTS = [
    "We go home, and we'll eat rice.  Then we sleep! It's 1234 o'clock.\n  indented code\n\n\tx = [1, 2]\r\n \r\n y",
    "나는 집에 가서 밥을 먹고 잠을 잔다. 그리고 다시 간다", "天地玄黃 宇宙洪荒，日月盈昃 abc 宇 宙",
    " leading", "trailing   ", "a\u3000 b\u00a0 c\x1c d\u0301 e\n f", "é e\u0301 \u0301 x", "▁ under ▁score a▁b", "😀 🏳️‍🌈 x",
]  # fmt: skip
