"""Thoughts in conversations: how they are marked, and where a chat template takes them from."""

from __future__ import annotations

from typing import Any

import regex

PAIRS = (
    ("<think>", "</think>"),  # DeepSeek, Qwen, GLM, MiniMax, Nemotron, EXAONE 4, and most others
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("Here is my thought process:", "Here is my response:"),  # Granite 3.2
)
REASONING = ("reasoning_content", "thinking", "reasoning")  # fields of messages with thoughts
SWITCHES = ("enable_thinking", "thinking")  # variables of templates that ask for a thought or none

_MARK = "|".join(regex.escape(mark) for pair in PAIRS for mark in pair)
_LAST_MARKS = regex.compile(rf"(?:{_MARK})(?:\s|{_MARK})*\Z")


def reasoning_field(template: Any) -> str | None:
    """The field of earlier messages from which a chat template takes their thoughts, if it does."""
    for name in REASONING:
        if regex.search(rf"""(?:\.|\[\s*['"]|get\(\s*['"]){name}\b""", str(template)):
            return name
    return None


def thinking_switch(variables: frozenset[str]) -> str | None:
    """Which of the variables of a chat template asks for a reply with or without a thought."""
    return next((name for name in SWITCHES if name in variables), None)


def split_thought(content: str) -> tuple[str, str]:
    """(the thought, the rest) of a reply that may have a thought in front."""
    for opening, closing in PAIRS:
        before, mark, rest = content.partition(closing)
        if mark and (before.lstrip().startswith(opening) or opening not in before):
            return before.lstrip().removeprefix(opening).strip(), rest.lstrip()
    return "", content


def without_last_marks(prompt: str) -> tuple[str, str]:
    """A prompt without the marks of thoughts at its end, and these marks."""
    found = _LAST_MARKS.search(prompt)
    return (prompt[: found.start()], found[0]) if found else (prompt, "")


def closing_of(marks: str) -> str | None:
    """What closes the thought that the last of some marks opens; None if it opens none."""
    last = regex.findall(_MARK, marks)[-1:]
    return next((closing for opening, closing in PAIRS if [opening] == last), None)
