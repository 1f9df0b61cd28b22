"""What transformers makes of a tokenizer's files, compared with what the files say.

Loaders number tokens that a file does not list, add tokens that only the settings name, and prefer
some files to others. So a tokenizer that was written is loaded as its users will load it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.token_ids import SETTINGS_FILE, read_tokens
from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles, read_if_there
from cpt_merge.core.errors import UserError
from cpt_merge.core.package import PACKAGE
from cpt_merge.core.progress import say

CONVERSATION = [
    {"role": "user", "content": "Hello! What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Thank you."},
]
_SHOWN = 5  # differences in a message


class UncheckedError(UserError):
    """The tokenizer needs code or a package that is not here; its files may well be right."""


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer that `AutoTokenizer` loads. Raises `UserError` with its reason if it fails."""
    from transformers import AutoTokenizer

    try:  # no warning about long texts
        return AutoTokenizer.from_pretrained(
            directory, model_max_length=sys.maxsize, trust_remote_code=False
        )
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        own_code = "auto_map" in read_if_there(directory / SETTINGS_FILE)
        if own_code or isinstance(error, ImportError):
            raise UncheckedError(reason) from None
        raise UserError(
            f"transformers cannot load the tokenizer in {directory} ({reason}); save it again with "
            "transformers."
        ) from None


def end_tokens(directory: Path, tokenizer: Any) -> list[str]:
    """The tokens that end a reply: the tokenizer's eos and those of `generation_config.json`."""
    from transformers import GenerationConfig

    ids: list[int | None] = [tokenizer.eos_token_id]
    if (directory / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(directory).eos_token_id
        ids += eos if isinstance(eos, list) else [eos]
    return list(
        dict.fromkeys(tokenizer.convert_ids_to_tokens(id_) for id_ in ids if id_ is not None)
    )


def check_loads(directory: Path) -> None:
    """Raise `UserError` if transformers cannot load a model's tokenizer or render its template.

    One that needs code or a package that is not here is not checked, with a message.
    """
    files = TokenizerFiles.read(directory)
    if files is None:
        return
    try:
        loaded = load_tokenizer(directory)
    except UncheckedError as error:
        say(f"the tokenizer in {directory} is not checked: transformers cannot load it ({error})")
        return
    if files.chat_template:
        try:
            render(loaded, files.chat_template)
        except UserError as error:
            raise UserError(f"{directory}: {error}; correct its chat template.") from None


def loading_differences(directory: Path, chat: Path | None = None) -> list[str]:
    """How the tokenizer that transformers loads from `directory` differs from its files.

    Compared are the id of every token, the roles, and, if `chat` is given, a conversation in the
    chat template, which has to read as in the chat model. Some classes add tokens of their own
    behind all others (Qwen's `<|endoftext|>`, if it is missing); nothing refers to those.
    """
    loaded, files = load_tokenizer(directory), TokenizerFiles.read(directory)
    assert files is not None
    found, ids = loaded.get_vocab(), read_tokens(directory).ids
    differences = [
        f"{token!r} at {found.get(token, 'no id')} instead of {number}"
        for token, number in ids.items()
        if found.get(token) != number
    ]
    for role, token in files.roles.items():
        if getattr(loaded, role, None) != token:
            differences.append(f"{getattr(loaded, role, None)!r} as the {role}, not {token!r}")
    if chat is not None and files.chat_template:
        differences += _rendering_differences(loaded, chat)
    return differences


def _rendering_differences(loaded: Any, chat: Path) -> list[str]:
    """Whether a conversation reads as the chat model's tokenizer renders it."""
    try:
        expected = render(load_tokenizer(chat))
    except UserError:
        return []  # the chat model's own template or tokenizer needs more than transformers
    try:
        found = render(loaded)
    except UserError as error:
        return [str(error)]
    return [] if found == expected else [f"a conversation as {found!r}, not {expected!r}"]


def render(loaded: Any, template: str | None = None) -> str:
    """A conversation in a chat template. Raises `UserError` if it cannot be rendered."""
    try:
        return str(
            loaded.apply_chat_template(
                CONVERSATION, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        )
    except Exception as error:  # templates raise whatever they like
        raise UserError(f"the chat template cannot be rendered: {error}") from None


def start_module(module: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """`python -m MODULE ARGUMENTS`, a module of this package, wherever it was installed."""
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


class Loading:
    """`loading_differences` of a directory, in a process of its own unless transformers is here.

    Importing transformers takes more memory than a merge, and a second that the merge can use.
    """

    def __init__(self, directory: Path, chat: Path | None) -> None:
        self._directory, self._chat = directory, chat
        self._process: subprocess.Popen[str] | None = None
        if "transformers" not in sys.modules:
            self._process = start_module(__name__, directory, *([chat] if chat else []))

    def differences(self) -> list[str]:
        """Wait for the result. Raises `UserError` if transformers cannot load the tokenizer."""
        if self._process is None:
            return loading_differences(self._directory, self._chat)
        output, errors = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"loading a tokenizer failed: {errors.strip()[-2000:]}")
        answer = json.loads(output.splitlines()[-1])
        if "unchecked" in answer:
            raise UncheckedError(answer["unchecked"])
        if "error" in answer:
            raise UserError(answer["error"])
        found: list[str] = answer["differences"]
        return found

    def require_none(self, origin: str) -> None:
        """Raise `UserError` that names tokens and files if there is a difference.

        `origin`: where the tokenizer's files come from. A tokenizer that needs the model's own
        code, which is never run, or a missing package is not checked, with a message.
        """
        try:
            found = self.differences()
        except UncheckedError as error:
            say(
                f"merge: transformers cannot load the tokenizer of {origin} here ({error}), so the "
                "output's is not checked with it"
            )
            return
        if found:
            more = f" and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
            files = ", ".join(sorted(path.name for path in self._directory.glob("*token*")))
            raise UserError(
                f"transformers would read the tokenizer from {origin} ({files}) with "
                f"{'; '.join(found[:_SHOWN])}{more}; load and save that tokenizer with "
                "transformers, which writes a tokenizer.json, and check its ids."
            )

    def close(self) -> None:
        """End the process if it is still running."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@contextmanager
def loading(directory: Path, chat: Path | None = None) -> Iterator[Loading]:
    """A check that runs while the block does."""
    check = Loading(directory, chat)
    try:
        yield check
    finally:
        check.close()


def _answer(arguments: list[str]) -> dict[str, Any]:
    try:
        return {"differences": loading_differences(*map(Path, arguments))}
    except UncheckedError as error:
        return {"unchecked": str(error)}
    except UserError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment]  # takes 2 seconds and is not needed
    answer = json.dumps(_answer(sys.argv[1:]))
    print("\n" + answer)
