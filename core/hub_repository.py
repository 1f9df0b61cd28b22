"""Repositories of the hub (models and datasets), and what the cache on this machine has of them.

The cache (in HF_HOME) is shared by all stages, processes and nodes. What it has in full is used
without a request to the hub: a run needs no network then, and does not change when somebody pushes
a commit. Only `Repository.newest` and downloads ask the hub.

A commit never changes, and the hub's client keeps the list of its files. So whether a snapshot is
complete is known offline, and a half-downloaded one is never taken for a smaller one.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.core.progress import Meter, counted, say

Kind = Literal["model", "dataset"]

DOWNLOADS = 8  # files at a time
ATTEMPTS = 3  # at one file whose connection breaks; within one, the hub's client continues the file
# files that are read before it is known which others are needed, and one that every repository
# has: the client warns if there is nothing to download
DESCRIPTIONS = [
    "README.md", ".huggingface.yaml", "config.json", "adapter_config.json", ".gitattributes"
]  # fmt: skip
_DAY = 86400.0  # seconds
_FULL = (errno.ENOSPC, errno.EDQUOT)


class HubUnreachableError(UserError):
    """The hub does not answer, for this reason, and the cache lacks what is needed."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Repository:
    """A repository at a revision: a branch, a tag or a commit; without one, the default branch."""

    kind: Kind
    name: str  # owner/name
    revision: str | None = None

    @staticmethod
    def parse(kind: Kind, text: str) -> Repository:
        """The repository that `owner/name` or `owner/name@revision` means."""
        name, _, revision = text.partition("@")
        return Repository(kind, name, revision or None)

    def __str__(self) -> str:
        return f"{self.kind} {self.name}{f'@{self.revision}' if self.revision else ''}"

    @property
    def address(self) -> str:
        """Its page."""
        from huggingface_hub import constants

        folder = "datasets/" if self.kind == "dataset" else ""
        return f"{constants.ENDPOINT}/{folder}{self.name}"

    @property
    def folder(self) -> Path:
        """Where the cache keeps it."""
        return cache_folder() / f"{self.kind}s--{self.name.replace('/', '--')}"

    def find(self) -> Snapshot:
        """The commit that the cache knows; if it knows none, that of the hub."""
        return self.cached() or self.newest()

    def cached(self) -> Snapshot | None:
        """The commit that the cache knows, with the list of its files; nothing is requested."""
        from huggingface_hub import errors, get_cached_repo_tree, resolve_revision

        try:
            commit = resolve_revision(
                self.name, repo_type=self.kind, revision=self.revision, local_files_only=True
            ).resolved
            files = get_cached_repo_tree(self.name, repo_type=self.kind, revision=commit)
        except (
            errors.RevisionResolutionError,
            errors.CachedRepoTreeNotFoundError,
            errors.HFValidationError,
        ):
            return None
        listed = {file.path: StoredFile(file.size, file.blob_id) for file in files}
        return Snapshot(self, commit, listed)

    def newest(self) -> Snapshot:
        """The commit that the revision has on the hub now, which the cache knows from then on.

        Raises `UserError`; `HubUnreachableError` if the hub does not answer.
        """
        from huggingface_hub import snapshot_download

        before = self.cached()
        name = self.ask()
        with hub_errors(self):
            snapshot_download(
                self.name, repo_type=self.kind, revision=self.revision, allow_patterns=DESCRIPTIONS
            )
        if name != self.name:
            say(f"{self} is called {name} on the hub now")
        snapshot = self.cached()
        if snapshot is None:  # the client only logs that it could not write the list
            raise UserError(
                f"the hub's cache {cache_folder()} cannot be written; set HF_HOME to another "
                "folder."
            )
        if before is not None and before.commit != snapshot.commit:
            say(f"{self}: commit {before.commit[:7]} is replaced by {snapshot.commit[:7]}")
        return snapshot

    def ask(self) -> str:
        """Its name on the hub now. Raises `UserError`, as `newest` does, and downloads nothing."""
        from huggingface_hub import HfApi, constants

        with hub_errors(self):
            found = HfApi().repo_info(
                self.name, repo_type=self.kind, revision=self.revision,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
                expand=["sha"],  # type: ignore[arg-type]  # and no list of files
            )  # fmt: skip
            return str(found.id)

    def remove_leftovers(self) -> None:
        """Remove parts of files that killed downloads left, which the client never uses again.

        A part that was written to within a day may belong to a download that runs.
        """
        for path in (self.folder / "blobs").glob("*.incomplete"):
            if time.time() - path.stat().st_mtime > _DAY:
                say(f"{self}: removing {path.name}, which a killed download left")
                path.unlink(missing_ok=True)

    def unlisted(self) -> Path | None:
        """A snapshot in the cache without a list of its files, as older clients left it."""
        from huggingface_hub import errors, snapshot_download

        try:
            return Path(
                snapshot_download(
                    self.name, repo_type=self.kind, revision=self.revision, local_files_only=True
                )
            )
        except (errors.LocalEntryNotFoundError, errors.HFValidationError):
            return None


class StoredFile(NamedTuple):
    """What the list of a commit says of a file."""

    size: int  # bytes
    blob: str  # git's digest of the content


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository, all of its files, and those of them that the cache has."""

    repository: Repository
    commit: str
    files: Mapping[str, StoredFile] = field(repr=False)  # by name

    def __str__(self) -> str:
        return f"{self.repository.kind} {self.repository.name}@{self.commit[:7]}"

    @property
    def identity(self) -> str:
        """`owner/name@commit`, as `identity` gives it for a folder."""
        return f"{self.repository.name}@{self.commit}"

    def path(self, name: str) -> Path | None:
        """Where the cache has a file; None if it does not have it in its full size."""
        path = self._stored(name)
        return path if path and path.stat().st_size == self.files[name].size else None

    def _stored(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        kind = self.repository.kind
        found = try_to_load_from_cache(
            self.repository.name, name, repo_type=kind, revision=self.commit
        )
        return Path(found) if isinstance(found, str) else None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the files that the cache does not have."""
        return [name for name in names if self.path(name) is None]

    def size(self, names: Iterable[str]) -> int:
        """The bytes of some files."""
        return sum(self.files[name].size for name in names)

    def download(self, names: Iterable[str]) -> int:
        """Download the files that the cache does not have, and return how many these were.

        Raises `UserError`. Whatever stops it, finished files are kept.
        """
        missing = self.missing(names)
        if not missing:
            return 0
        self.repository.ask()  # the client tries for half a minute to reach a hub for each file
        self._check_space(missing)
        size = self.size(missing)
        scale, unit = (1e9, "GB") if size >= 1e10 else (1e6, "MB") if size >= 1e6 else (1e3, "kB")
        label = f"{self}: {counted(len(missing), 'file')}"
        with Meter(label, size / scale, unit) as meter, hub_errors(self.repository):
            progress = _Progress(meter, scale)
            with ThreadPoolExecutor(DOWNLOADS) as pool:
                running = [pool.submit(self._download_one, name, progress) for name in missing]
                try:
                    for done in as_completed(running):
                        done.result()
                except BaseException:
                    progress.stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return len(missing)

    def _download_one(self, name: str, progress: _Progress) -> None:
        from huggingface_hub import errors, hf_hub_download

        for attempt in range(1, ATTEMPTS + 1):
            bar = _FileBar(progress)
            try:
                hf_hub_download(
                    self.repository.name, name, repo_type=self.repository.kind,
                    revision=self.commit, tqdm_class=bar,  # type: ignore[call-overload]
                    force_download=self._stored(name) is not None,  # in another size
                )  # fmt: skip
            except errors.HTTPError as error:  # type: ignore[attr-defined]  # of the HTTP library
                bar.end_at(0)
                if attempt == ATTEMPTS or isinstance(error, errors.HfHubHTTPError):
                    raise
                say(f"{self}: {name}: {_reason(error)}; downloading it again")
                time.sleep(attempt)
            else:
                bar.end_at(
                    self.files[name].size
                )  # a file that another commit has too is not sent again
                return

    def _check_space(self, missing: list[str]) -> None:
        cache = cache_folder()
        place = next(one for one in (cache, *cache.parents) if one.is_dir())
        if shutil.disk_usage(place).free < self.size(missing):
            raise _disk_is_full(self.repository, self.size(missing) / 1e9)


class _Progress:
    """Adds the bytes of all files to one meter, and ends the downloads when `stop` is set."""

    def __init__(self, meter: Meter, scale: float) -> None:
        self.stop = threading.Event()
        self._meter, self._scale, self._lock = meter, scale, threading.Lock()

    def add(self, size: float) -> None:
        """Count bytes. Raises `Interrupted` once the downloads are to end."""
        if self.stop.is_set():
            raise Interrupted("the download is stopped")
        with self._lock:
            self._meter.advance(size / self._scale)


class _FileBar:
    """What the hub's client takes for tqdm's class, and for the bar that the class makes."""

    def __init__(self, progress: _Progress) -> None:
        self.total, self._progress, self._counted = 0, progress, 0.0

    def __call__(self, *_: Any, **__: Any) -> _FileBar:
        return self

    def __enter__(self) -> _FileBar:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def update(self, size: float | None = 1) -> None:
        """Count bytes that were written; negative: that have to be written again."""
        self._counted += size or 0
        self._progress.add(size or 0)

    def end_at(self, size: float) -> None:
        """Count up or down to so many bytes."""
        self.update(size - self._counted)

    def update_transfer(self, *_: Any, **__: Any) -> None:
        """Bytes on the network are not shown."""

    set_postfix_str = set_transfer_postfix_str = refresh = close = update_transfer


def cache_folder() -> Path:
    """The hub's cache on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def identity(path: Path) -> str | None:
    """`owner/name@commit` of a folder that is a snapshot in the hub's cache; None for others."""
    kind, _, name = path.parent.parent.name.partition("--")
    if path.parent.name != "snapshots" or kind not in ("models", "datasets") or not name:
        return None
    return f"{name.replace('--', '/')}@{path.name}"


def shown_name(directory: Path) -> str:
    """What a model is called: in the hub's cache its repository, elsewhere its folder's name."""
    found = identity(directory)
    return found.partition("@")[0] if found else directory.name


@contextmanager
def hub_errors(repository: Repository) -> Iterator[None]:
    """Turn the errors of the hub's client into a `UserError` that names the repository."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        login = "" if error.response.status_code == 403 else ", then run `hf auth login`"
        raise UserError(
            f"{repository} is gated; accept its terms at {repository.address}{login}."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{repository} does not exist: the {repository.kind} has no such branch, tag or commit "
            "on the hub; correct what follows the @."
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{repository} is neither here nor on the hub; correct the name, or run "
            "`hf auth login` if it is private."
        ) from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        what = (
            "run `hf auth login` with a token that may read it"
            if code in (401, 403)
            else "try again later, or download it in another way and give its path"
        )
        raise UserError(f"the hub refuses to send {repository} (HTTP {code}); {what}.") from None
    except (errors.LocalEntryNotFoundError, ConnectionError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # the HTTP library's own class
        raise _unreachable(repository, error) from None
    except errors.NotASafetensorsRepoError:
        raise UserError(
            f"{repository} has no safetensors files, so its size is not known before it is "
            "downloaded; run `cpt-merge fetch RECIPE` first."
        ) from None
    except (ValueError, KeyError, TypeError):
        from huggingface_hub import constants

        raise UserError(
            f"what answers at {constants.ENDPOINT} when asked for {repository} is not a hub; check "
            "HF_ENDPOINT and the proxy."
        ) from None
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_is_full(repository) from None
        reason = error.strerror or str(error).splitlines()[0] or type(error).__name__
        raise UserError(
            f"{repository} could not be downloaded: {reason.rstrip('.')}; fix that and run the "
            "same command again."
        ) from None


def _unreachable(repository: Repository, error: BaseException) -> UserError:
    """The connection cannot be made, or broke."""
    import httpx2

    if isinstance(error, httpx2.ReadError | httpx2.WriteError | httpx2.RemoteProtocolError):
        return UserError(
            f"the download of {repository} broke off ({_reason(error)}); run the same command "
            "again, which keeps the finished files."
        )
    reason = _reason(error)
    return HubUnreachableError(
        f"{repository} is not here, nor in full in the hub's cache {cache_folder()}, and the hub "
        f"cannot be reached ({reason}); correct the name, or run `cpt-merge fetch RECIPE` (or "
        f"`hf download {repository.name}`) where there is a network.",
        reason,
    )


def _reason(error: BaseException) -> str:
    """Why a connection failed, in a few words."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    while not isinstance(error, httpx2.HTTPError | OfflineModeIsEnabled) and error.__cause__:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, httpx2.TimeoutException):
        return "it does not answer in time"
    return str(error).rpartition("] ")[2].partition("\n")[0].rstrip(".") or type(error).__name__


def _disk_is_full(repository: Repository, gigabytes: float | None = None) -> UserError:
    size = f", which takes {gigabytes:,.2f} GB" if gigabytes else ""
    return UserError(
        f"the hub's cache {cache_folder()} has no room for {repository}{size}; free disk space, or "
        "set HF_HOME to a folder on another disk."
    )
