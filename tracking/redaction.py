"""What must never be in a log: keys, tokens, passwords."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# a word of a name, and what it may be written together with: PGPASSWORD, DB_PASS, OPENAI_APIKEY, GITHUB_PAT
SECRET_NAME = (
    r"(?:[a-z0-9]*(?:key|token|secret|passw(?:or)?d|passphrase|credentials?|(?<!by)(?<!com)(?<!ask)pass)"
    r"|(?<=_)pwd|pat|jwt|auth)"  # PWD by itself is the working directory
)
# names of environment variables that hold secrets; a value shorter than this is a word, and hidden nowhere
_VARIABLE, _SHORTEST = re.compile(rf"(?:^|_){SECRET_NAME}s?(?:_|$)", re.IGNORECASE), 8
_PATTERNS = [
    (re.compile(r"(://)[^/@\s]+@"), rf"\1{HIDDEN}@"),  # user:password@host
    (
        re.compile(rf"((?:^|[?&;\s_.-]){SECRET_NAME}=)[^&\s'\"]+", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),  # ...token=value
    (
        re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|wandb_v1_|AKIA)[\w-]{12,}"),
        HIDDEN,
    ),  # known forms
]


def without_secrets(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """`value` (text, or JSON values) with what is or looks like a secret hidden.

    Hidden are the values of environment variables that are named like secrets, wherever they occur, passwords within
    addresses, `token=...` and its like, and the forms of well-known keys.
    """
    values = [
        text
        for name, text in environment.items()
        if _VARIABLE.search(name) and len(text) >= _SHORTEST
    ]  # the longest first: one may begin with another
    return _hide(value, sorted(values, key=len, reverse=True))


def _hide(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        for pattern, instead in _PATTERNS:
            value = pattern.sub(instead, value)
        return value
    if isinstance(value, Mapping):
        return {_hide(name, secrets): _hide(one, secrets) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(one, secrets) for one in value]
    return value
