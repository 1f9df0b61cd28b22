"""`cpt-merge push`: a model's directory to the Hugging Face hub, in one commit.

Large files are uploaded one after the other and count only when the commit names them. So nobody
sees half a model, and what an interrupted upload has finished is not sent again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from cpt_merge.checkpoint.loaded import open_model
from cpt_merge.checkpoint.whole_models import check_whole
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.merge.card import front_matter

CARD = "README.md"
OF_THE_HUB = {".gitattributes"}


def push(
    directory: Path, name: str, public: bool = False, licence: str | None = None,
    replace: bool = False,
) -> str:  # fmt: skip
    """Upload a model and return its address.

    `licence` completes a card that states none. A repository that holds a model already is changed
    with `replace` only, which also removes its files that this model does not have. Raises
    `UserError` for a directory that is no whole model, a missing licence or login, and an upload
    that broke off.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name} is no name of a repository; write it as org/name.")
    files = _files(directory)
    card = _card(directory, licence, public)
    api, total = HfApi(), sum(path.stat().st_size for path in files.values())
    with _upload_errors(name):
        url = api.create_repo(name, private=not public, exist_ok=True)
        there = set(api.list_repo_files(name)) - OF_THE_HUB
        if there and not replace:
            raise UserError(
                f"{name} holds {len(there)} files already; push to another name, or give "
                "--replace, which keeps the old ones in its history only."
            )
        additions: list[Any] = []
        for number, (path_in_repo, path) in enumerate(sorted(files.items()), start=1):
            content = card.encode() if path_in_repo == CARD else path
            addition = CommitOperationAdd(path_in_repo, content)
            size = path.stat().st_size / 1e9
            say(f"push: {path_in_repo} ({number} of {len(files)}, {size:,.2f} GB)")
            api.preupload_lfs_files(name, [addition])
            additions.append(addition)
        removed = [CommitOperationDelete(path) for path in sorted(there - files.keys())]
        api.create_commit(name, [*additions, *removed], commit_message="Model made with cpt-merge")
        private = api.model_info(name).private
    seen = "private; make it public in its settings" if private else "public"
    say(f"push: {len(files)} files, {total / 1e9:,.2f} GB, at {url} ({seen})")
    return f"{constants.ENDPOINT}/{name}"


def _files(directory: Path) -> dict[str, Path]:
    """What is uploaded, by its place in the repository. Raises `UserError` for no whole model."""
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist; give the directory of a model.")
    check_whole(open_model(directory))
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    names = {path.relative_to(directory): path for path in paths}
    return {
        name.as_posix(): path
        for name, path in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def _card(directory: Path, licence: str | None, public: bool) -> str:
    """The model card, with its licence. Raises `UserError` if it would have none in public."""
    path = directory / CARD
    if not path.is_file():
        raise UserError(
            f"{directory} has no {CARD}, the model card that the merge writes; push the directory "
            "that a merge wrote, or write a card."
        )
    text, stated = path.read_text(encoding="utf-8"), front_matter(directory).get("license")
    if licence and stated and licence != stated:
        raise UserError(
            f"{path} states the licence {stated}, from the models that it was made of; leave "
            "--license out, or change the card if you know better."
        )
    if stated:
        say(f"push: licence {stated}, as the card says of the models that it was made of")
        return text
    if licence is None:
        sentence = (
            f"{path} states no licence, because none of the models that it was made of does where "
            "they are; give --license (a tag of the hub, such as llama2 or apache-2.0)"
        )
        if public:
            raise UserError(f"{sentence}; without it nothing is made public.")
        say(f"push: {sentence}, before you make it public")
        return text
    return _with_licence(text, licence)


def _with_licence(text: str, licence: str) -> str:
    """A card with a licence in its front matter."""
    front: dict[str, Any] = {}
    body = text
    if text.startswith("---\n") and "\n---" in text[4:]:
        head, _, body = text[4:].partition("\n---")
        front = yaml.safe_load(head) or {}
    written = yaml.safe_dump({**front, "license": licence}, sort_keys=False, allow_unicode=True)
    return f"---\n{written.strip()}\n---{body if front else chr(10) + body}"


@contextmanager
def _upload_errors(name: str) -> Iterator[None]:
    """Turn the errors of the hub's client into a `UserError`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403):
            raise UserError(
                f"the hub does not let you write to {name} (HTTP {code}); run `hf auth login` with "
                "a token that may write, and check the name."
            ) from None
        raise UserError(
            f"the hub refuses the upload to {name} (HTTP {code}); run the same command again, "
            "which does not send finished files again."
        ) from None
    except ValueError as error:  # of an answer that is no JSON, and of a card with bad metadata
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} was not committed ({reason[:200].rstrip('.')}); check the front matter of the "
            "card, HF_ENDPOINT and the proxy."
        ) from None
    except (ConnectionError, errors.HTTPError, RuntimeError) as error:  # type: ignore[attr-defined]
        cause = error.__cause__ or error  # the client wraps what broke the upload of a file
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise UserError(
            f"the upload to {name} broke off ({reason[:200].rstrip('.')}); run the same command "
            "again, which does not send finished files again."
        ) from None
