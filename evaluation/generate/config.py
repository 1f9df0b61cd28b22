"""Who generates replies: keys of the recipe's `evaluation` section."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from cpt_merge.core.config import JsonFields, Section, key
from cpt_merge.core.errors import UserError
from cpt_merge.core.spelling import nearest

TRANSFORMERS, VLLM = "transformers", "vllm"


def _known_engine(name: str) -> str:
    if name in (TRANSFORMERS, VLLM):
        return name
    if name.startswith(("http://", "https://")):
        return _checked_url(name)
    suggestion = nearest(name, (TRANSFORMERS, VLLM))
    raise ValueError(f"{name} is no engine{suggestion}; it is {TRANSFORMERS}, {VLLM}, or a URL")


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        known = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known:
        raise ValueError("this is no URL; give one such as http://localhost:8000/v1")
    return url


EngineName = Annotated[str, AfterValidator(_known_engine)]


@dataclass(frozen=True)
class ApiKey:
    """The key of an endpoint, which an environment variable holds."""

    variable: str
    setting: str  # the recipe's key that names the variable

    @property
    def value(self) -> str:
        """The key; empty if there is none."""
        return os.environ.get(self.variable, "").strip()

    def check(self) -> None:
        """Raise `UserError` if the header of a request cannot hold the key."""
        for place, character in enumerate(self.value, start=1):
            if not " " <= character <= "~":
                raise UserError(
                    f"the environment variable {self.variable} ({self.setting}) holds a key that "
                    f"cannot be sent, since its character {place} is not printable ASCII; copy "
                    "the key again."
                )


class ServerConfig(Section):
    """How servers with OpenAI's protocol are asked (POST URL/completions)."""

    names: dict[str, str] = key(
        {},
        "model -> its name at the server; if not set: the one of its list that is the model's name "
        "in the recipe, its directory or its hub id",
    )
    key_variable: str = key(
        "OPENAI_API_KEY", "environment variable with the API key; if it is not set, none is sent"
    )
    timeout: float = key(600.0, "longest time for one reply", unit="seconds", gt=0)
    attempts: int = key(
        5, "attempts at one reply, with growing pauses; then the evaluation stops", ge=1
    )
    at_once: int = key(
        64, "requests that one process sends at the same time", unit="requests", ge=1
    )
    request: JsonFields = key(
        {},
        "other fields of every request; null leaves out a field that the server does not know, "
        "such as {return_token_ids: null}",
    )


class VllmConfig(Section):
    """How `vllm serve` is started for each model, once for each copy of it."""

    command: list[str] = key(
        ["vllm", "serve"],
        "the program; vLLM is best installed in an environment of its own: "
        "[/envs/vllm/bin/vllm, serve]",
        min_length=1,
    )
    arguments: list[str] = key([], "more arguments, such as [--max-model-len, '8192']")
    start_timeout: float = key(
        1800.0, "longest time until it is ready, loading included", unit="seconds", gt=0
    )
