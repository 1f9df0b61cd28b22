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

from cpt_merge.checkpoint.loaded_tokenizer import (
    UncheckedError,
    load_tokenizer,
    start_module,
)
from cpt_merge.checkpoint.token_ids import (
    ADDED_FILE,
    FAST_FILE,
    SETTINGS_FILE,
    SPECIALS_FILE,
    TOKEN_ROLES,
    unlisted,
)
from cpt_merge.checkpoint.tokenizer_files import read_if_there, token_text
from cpt_merge.core.errors import UserError

_TAKES_THE_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")  # two names of one class
_NAMES_TOKENS = {*TOKEN_ROLES, "additional_special_tokens", "extra_special_tokens"}
_CHANGES_NOTHING = {  # settings of what happens before or after texts become tokens
    "chat_template", "clean_up_tokenization_spaces", "errors", "is_local", "local_files_only",
    "max_length", "model_input_names", "model_max_length", "padding_side", "processor_class",
    "spaces_between_special_tokens", "split_special_tokens", "stride", "tokenizer_class",
    "truncation_side", "truncation_strategy",
}  # fmt: skip
_OTHER_FILES = (ADDED_FILE, "config.json")  # the second can make transformers choose another class


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
        process = start_module(__name__, str(directory))
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

    So it is if the settings name the class that does so, and nothing else that could change a
    token, and if all special tokens that they name are special tokens of the file. This is how the
    tokenizer stage writes its tokenizers; it saves the second that importing transformers takes.
    Raises `UserError` for a damaged file.
    """
    path, settings = directory / FAST_FILE, read_if_there(directory / SETTINGS_FILE)
    named = read_if_there(directory / SPECIALS_FILE)  # transformers prefers it to the settings
    eos = token_text(settings.get("eos_token"))
    if (
        settings.get("tokenizer_class") not in _TAKES_THE_FILE
        or any((directory / name).exists() for name in _OTHER_FILES)
        or not settings.keys() <= _NAMES_TOKENS | _CHANGES_NOTHING
        or not named.keys() <= _NAMES_TOKENS
        or eos is None
        or token_text(named.get("eos_token", eos)) != eos
        or not path.is_file()
    ):
        return None
    try:
        definition = path.read_text(encoding="utf-8")
        tokenizer = _plain(definition)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path} cannot be read ({error}); copy or download it again.") from None
    special = {
        token.content: number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    if eos not in special or unlisted(directory, special):
        return None
    front = tokenizer.encode("", add_special_tokens=True).ids
    return TokenizerBackend(tokenizer, definition, front[0] if front else None, special[eos])


def _loaded(directory: Path) -> TokenizerBackend:
    """The tokenizer of whichever class transformers chooses."""
    try:
        tokenizer = load_tokenizer(directory)
    except UncheckedError as error:
        raise UserError(
            f"transformers cannot load the tokenizer in {directory} without the model's own code "
            f"or a package that is not here ({error}); install the package, or save the tokenizer "
            "with its own code as a tokenizer.json."
        ) from None
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
