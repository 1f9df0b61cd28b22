"""Remove keys, tokens and passwords from what is printed, stored or logged."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 8  # characters; a shorter value of a variable is a word, and is not hidden
# a secret's name, possibly within a longer word: PGPASSWORD, DB_PASS, OPENAI_APIKEY, GITHUB_PAT
SECRET_NAME = (
    r"(?:[a-z0-9]*"
    r"(?:key|token|secret|passw(?:or)?d|passphrase|credentials?|(?<!by)(?<!com)(?<!ask)pass)"
    r"|(?<=_)pwd|pat|jwt|auth)"  # PWD by itself is the working directory
)
_VARIABLE = re.compile(rf"(?:^|_){SECRET_NAME}s?(?:_|$)", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(://)[^/?#\s'\"<>]+@")  # user:password@host
_ASSIGNED = re.compile(
    rf"((?:^|[?&;\s_.-]){SECRET_NAME}=)(?!value\b)[^&\s'\"]+", re.IGNORECASE
)  # token=value
_IN_QUERY = re.compile(
    r"([?&](?:sig|signature|sas|code)=)[^&\s'\"]+", re.IGNORECASE
)  # of addresses
_NAMES_SECRET = re.compile(r"(?:api[-_]?key|authorization|password|secret)$", re.IGNORECASE)
_WELL_KNOWN = re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|wandb_v1_|AKIA)[\w-]{12,}")


def without_secrets(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """`value` (text, or JSON values) with everything hidden that is or looks like a secret.

    Hidden are the values of environment variables with names of secrets, wherever they occur,
    passwords in addresses, `token=...` and the like, values under names such as `api_key`, and
    well-known forms of keys.
    """
    secrets = [
        text
        for name, text in environment.items()
        if _VARIABLE.search(name) and len(text) >= SHORTEST
    ]
    return _hide(value, sorted(secrets, key=len, reverse=True))  # one may begin with another


def _hide(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        value = _ASSIGNED.sub(rf"\1{HIDDEN}", _IN_ADDRESS.sub(rf"\1{HIDDEN}@", value))
        value = _IN_QUERY.sub(rf"\1{HIDDEN}", value)
        return _WELL_KNOWN.sub(HIDDEN, value)
    if isinstance(value, Mapping):
        return {
            _hide(name, secrets): HIDDEN if _NAMES_SECRET.search(str(name)) else _hide(one, secrets)
            for name, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [_hide(one, secrets) for one in value]
    return value
