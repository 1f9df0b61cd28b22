"""Digests of files, remembered by size and modification time, so that a file is read once.

As in git's index: a file whose size and modification time are those of the last time has the same
digest. Otherwise it is read again, so touching or copying a file changes nothing.

Of files of weights larger than 16 MiB, samples are read: 64 KiB at 64 places. Training changes
nearly every element, and reading a hundred gigabytes would take minutes.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import astuple, dataclass
from pathlib import Path

from cpt_merge.core.progress import say_once

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SMALL = 16 * 2**20  # bytes
SAMPLES, SAMPLE = 64, 2**16  # places, and bytes read at each
_RACY = 2_000_000_000  # ns: a file this young may change again within its modification time
_BLOCK = 2**22


@dataclass(frozen=True)
class _Known:
    """What a file was when it was read."""

    size: int
    modified: int  # ns
    digest: str


_known: dict[str, _Known] = {}  # by absolute path


def file_digest(path: Path) -> str:
    """16 hexadecimal digits that change with the content of a file."""
    stat, name = path.stat(), str(path.absolute())
    before = _known.get(name)
    if before and (before.size, before.modified) == (stat.st_size, stat.st_mtime_ns):
        return before.digest
    sampled = stat.st_size > SMALL and path.suffix in WEIGHTS
    digest = _read(path, stat.st_size, sampled)
    if sampled and before and before.digest == digest:
        say_once(
            f"{path} has another modification time but the same size and samples as before; it "
            "counts as unchanged"
        )
    if time.time_ns() - stat.st_mtime_ns > _RACY:
        _known[name] = _Known(stat.st_size, stat.st_mtime_ns, digest)
    return digest


def recall_digests(content: str) -> None:
    """Take the digests that `known_digests` gave, unless newer ones are known."""
    try:
        found = {
            name: _Known(int(size), int(modified), str(digest))
            for name, (size, modified, digest) in json.loads(content).items()
        }
    except (ValueError, TypeError, AttributeError):
        return  # of another version: files are read again
    for name, known in found.items():
        _known.setdefault(name, known)


def known_digests() -> str:
    """All that is known, as text for a file."""
    return json.dumps({name: astuple(known) for name, known in sorted(_known.items())})


def _read(path: Path, size: int, sampled: bool) -> str:
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if sampled:
            for number in range(SAMPLES):
                file.seek((size - SAMPLE) * number // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
        else:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()[:16]
