"""The `tokenizers.Tokenizer` that transformers makes of a directory, without importing torch here.

A fast tokenizer of transformers is a `tokenizers.Tokenizer` with settings around it. Which one a
directory gives depends on the class: some take tokenizer.json as it is, others build it anew.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cpt_merge.checkpoint.loaded_tokenizer import load_tokenizer, start_without_torch
from cpt_merge.checkpoint.token_ids import DECODER, FAST_FILE, SETTINGS_FILE, unlisted
from cpt_merge.checkpoint.tokenizer_files import read_if_there, token_text
from cpt_merge.core.errors import UserError

_TAKES_THE_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")  # two names of one class
_CHANGES_IT = ("add_bos_token", "add_eos_token", "auto_map", "fix_mistral_regex", DECODER)


@dataclass(frozen=True)
class TokenizerBackend:
    """What encodes a text: `[prefix] tokens`, and `eos` for its end."""

    tokenizer: Tokenizer
    definition: str  # the same as the content of a tokenizer.json
    prefix: int | None  # the token that the tokenizer puts in front of a text
    eos: int

    def __reduce__(self) -> tuple[Any, ...]:  # faster than a pickled `Tokenizer`
        return _of, (self.definition, self.prefix, self.eos)

    @staticmethod
    def read(directory: Path) -> TokenizerBackend:
        """Raises `UserError` for a tokenizer without eos or without a fast implementation."""
        as_it_is = _as_it_is(directory)
        if as_it_is:
            return as_it_is
        if "transformers" in sys.modules:
            return _loaded(directory)
        process = start_without_torch(__name__, str(directory))
        output, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"loading a tokenizer failed: {errors.strip()[-2000:]}")
        answer = json.loads(output.splitlines()[-1])
        if "error" in answer:
            raise UserError(answer["error"])
        return _of(**answer)


def _of(definition: str, prefix: int | None, eos: int) -> TokenizerBackend:
    return TokenizerBackend(_plain(definition), definition, prefix, eos)


def _plain(definition: str) -> Tokenizer:
    """A tokenizer that neither cuts nor fills up a text."""
    tokenizer = Tokenizer.from_str(definition)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _as_it_is(directory: Path) -> TokenizerBackend | None:
    """The tokenizer of tokenizer.json, if transformers takes that as it is; else None.

    So it is if the settings name the class that does so, change nothing, and name only tokens that
    the file lists as added ones. A config.json could make transformers choose another class. This
    is how the tokenizer stage writes its tokenizers; it saves the second that importing
    transformers takes.
    """
    path, settings = directory / FAST_FILE, read_if_there(directory / SETTINGS_FILE)
    eos = token_text(settings.get("eos_token"))
    if (
        settings.get("tokenizer_class") not in _TAKES_THE_FILE
        or (directory / "config.json").exists()
        or any(settings.get(name) is not None for name in _CHANGES_IT)
        or eos is None
        or not path.is_file()
    ):
        return None
    definition = path.read_text(encoding="utf-8")
    tokenizer = _plain(definition)
    added = {
        token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    if eos not in added or unlisted(directory, added):
        return None
    front = tokenizer.encode("", add_special_tokens=True).ids
    return TokenizerBackend(tokenizer, definition, front[0] if front else None, added[eos])


def _loaded(directory: Path) -> TokenizerBackend:
    """The tokenizer of whichever class transformers chooses."""
    tokenizer = load_tokenizer(directory)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer in {directory} has no fast implementation; add a tokenizer.json."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {directory} has no eos token; set `eos_token` in its config."
        )
    front = tokenizer("", add_special_tokens=True)["input_ids"]
    prefix = int(front[0]) if front else None
    return _of(tokenizer.backend_tokenizer.to_str(), prefix, int(tokenizer.eos_token_id))


def _answer(directory: Path) -> dict[str, Any]:
    try:
        loaded = _loaded(directory)
        return {name: getattr(loaded, name) for name in ("definition", "prefix", "eos")}
    except UserError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment]  # takes 2 seconds and is not needed
    answer = json.dumps(_answer(Path(sys.argv[1])))
    print("\n" + answer)
